//! Files on roots and volumes, as `ctr run` makes them.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

use super::{Bench, Case, Skip, case};
use crate::block::{LoopDevice, NodeMount};

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("storage/files", 60, files),
    case("storage/small-files", 120, small_files),
    case("storage/many-mounts", 40, many_mounts),
    case(
        "storage/file-system-of-a-driver",
        60,
        file_system_of_a_driver,
    ),
    case("storage/overlay-inside", 40, overlay_inside),
    case("storage/overlay-on-volume", 40, overlay_on_volume),
    case("storage/native-root", 60, native_root).forgiving(SNAPSHOTTER, &[]),
];

/// containerd makes it with the first snapshot.
const SNAPSHOTTER: &[&str] = &["native/metadata.db"];

/// Mounts an overlay, all of whose layers are below the working directory, and
/// does what image builders do: changes, removes and makes anew.
const OVERLAY: &str = "mkdir lower upper work merged lower/dir && echo low > lower/dir/file && \
     ln -s file lower/dir/link && \
     mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged && \
     cat merged/dir/file && echo high > merged/dir/file && cat merged/dir/file lower/dir/file && \
     mv merged/dir/link merged/link && readlink merged/link && \
     rm -r merged/dir && mkdir merged/dir && ls -A merged/dir | wc -l && \
     echo new > merged/dir/new && umount merged && \
     mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged && \
     ls -A merged/dir && umount merged";

/// What that prints.
const OVERLAID: &str = "low\nhigh\nlow\nfile\n0\nnew\n";

fn bind(from: &Path, to: &str) -> String {
    format!("type=bind,src={},dst={to},options=rbind:rw", from.display())
}

/// Hard links, holes, direct and mapped access, locks, attributes, io_uring and the
/// like, on the root and on a volume.
fn files(bench: &Bench) -> Result<()> {
    let volume = bench.folder().join("volume");
    fs::create_dir_all(&volume)?;
    let mount = bind(&volume, "/volume");
    let script = "for place in /root /volume; do echo on $place; probe files $place; done";
    let done = bench
        .ctr
        .run(&["--mount", &mount], &bench.id(), &["sh", "-c", script])?;
    let failed: Vec<String> = done
        .out()
        .lines()
        .filter(|line| !line.ends_with(" ok") && !line.starts_with("on /"))
        .map(str::to_owned)
        .collect();
    ensure!(failed.is_empty(), "{}", done.tail());
    let done = done.ok()?;
    ensure!(done.out().matches(" ok\n").count() == 26, "{}", done.tail());
    ensure!(fs::read_dir(&volume)?.next().is_none(), "files are left");
    Ok(())
}

fn small_files(bench: &Bench) -> Result<()> {
    // On hardware as many as the smallest bulk of a build.
    let count = match bench.node.slowness {
        1 => "100000",
        _ => "1500",
    };
    let volume = bench.folder().join("volume");
    fs::create_dir_all(&volume)?;
    let mount = bind(&volume, "/volume");
    let script = "mkdir /root/many && probe many /root/many $0 && probe many /volume $0";
    let mut command = bench.ctr.run_rm_command(
        &["--mount", &mount],
        &bench.id(),
        &["sh", "-c", script, count],
    );
    let done = crate::process::run(&mut command, bench.seconds(90))?.ok()?;
    let expected = format!("{count} files\n{count} files\n");
    ensure!(done.out() == expected, "{}", done.tail());
    Ok(())
}

/// More than other runtimes have descriptors, slots or names for.
fn many_mounts(bench: &Bench) -> Result<()> {
    const MOUNTS: usize = 40;
    let mut mounts = Vec::new();
    for number in 0..MOUNTS {
        let from = bench.folder().join(number.to_string());
        if number % 2 == 0 {
            fs::create_dir_all(&from)?;
            fs::write(from.join("file"), format!("in {number}\n"))?;
            mounts.push(bind(&from, &format!("/volumes/{number}")));
        } else {
            fs::write(&from, format!("is {number}\n"))?;
            mounts.push(bind(&from, &format!("/volumes/file-{number}")));
        }
    }
    let flags: Vec<&str> = mounts.iter().flat_map(|mount| ["--mount", mount]).collect();
    let script = "cat /volumes/*/file /volumes/file-* | sort -k2n";
    let done = bench.ctr.run(&flags, &bench.id(), &["sh", "-c", script])?;
    let done = done.ok()?;
    let expected: String = (0..MOUNTS)
        .map(|number| match number % 2 {
            0 => format!("in {number}\n"),
            _ => format!("is {number}\n"),
        })
        .collect();
    ensure!(done.out() == expected, "{}", done.tail());
    Ok(())
}

/// A directory on which the node has mounted a disk, as CSI drivers do: its
/// size and its end are the disk's.
fn file_system_of_a_driver(bench: &Bench) -> Result<()> {
    let disk = LoopDevice::new(&bench.folder().join("disk.img"), 16)?;
    disk.format()?;
    let place = bench.folder().join("mounted");
    let mounted = NodeMount::new("ext4", &disk.path, "rw", &place)?;
    let mount = bind(&place, "/volume");
    let script = "df -k /volume | tail -n 1 | awk '{ print ($2 > 8000 && $2 < 17000) }'; \
                  dd if=/dev/zero of=/volume/big bs=1M count=32 2>&1 | grep -o 'No space left on device'; \
                  rm /volume/big; echo kept > /volume/file; sync; rmdir /volume/lost+found && echo removed";
    let done = bench
        .ctr
        .run(&["--mount", &mount], &bench.id(), &["sh", "-c", script])?;
    let done = done.ok()?;
    ensure!(
        done.out() == "1\nNo space left on device\nremoved\n",
        "{}",
        done.tail()
    );
    ensure!(fs::read_to_string(place.join("file"))? == "kept\n");
    drop(mounted);
    ensure!(
        !place.join("file").exists(),
        "the file is not on the disk but below it"
    );
    Ok(())
}

fn overlay_inside(bench: &Bench) -> Result<()> {
    let script = format!("mount -t tmpfs none /mnt && cd /mnt && {OVERLAY}");
    let done = bench
        .ctr
        .run(&["--privileged"], &bench.id(), &["sh", "-c", &script])?;
    ensure!(done.out() == OVERLAID, "{}", done.tail());
    done.ok()?;
    Ok(())
}

/// As an engine in a container keeps its images.
fn overlay_on_volume(bench: &Bench) -> Result<()> {
    let volume = bench.folder().join("volume");
    fs::create_dir_all(&volume)?;
    let mount = bind(&volume, "/var/lib/engine");
    let script = format!("cd /var/lib/engine && {OVERLAY}");
    let done = bench.ctr.run(
        &["--privileged", "--mount", &mount],
        &bench.id(),
        &["sh", "-c", &script],
    )?;
    ensure!(done.out() == OVERLAID, "{}", done.tail());
    done.ok()?;
    ensure!(
        volume.join("upper/dir/new").exists(),
        "the layer is not on the volume"
    );
    Ok(())
}

/// A snapshot that is a plain directory.
fn native_root(bench: &Bench) -> Result<()> {
    let plugins = bench.ctr.call(&["plugins", "list"])?.ok()?.out();
    let is_there = |line: &str| line.contains("native") && line.trim_end().ends_with("ok");
    if !plugins.lines().any(is_there) {
        return Err(Skip("containerd has no native snapshotter here".into()).into());
    }
    let script = "cat /etc/motd; echo text > /etc/motd && cat /etc/motd; rm /etc/group; ls /etc/group 2>&1; \
                  stat -c %a /tmp";
    for _ in 0..2 {
        let done = bench.ctr.run(
            &["--snapshotter", "native"],
            &bench.id(),
            &["sh", "-c", script],
        )?;
        let done = done.ok()?;
        ensure!(
            done.out()
                == "a file of the image\ntext\nls: /etc/group: No such file or directory\n1777\n",
            "{}",
            done.tail()
        );
    }
    Ok(())
}
