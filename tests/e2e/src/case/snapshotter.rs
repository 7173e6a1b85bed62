//! Roots that are made of block devices: containerd's EROFS and devmapper
//! snapshotters.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{Bench, Case, Skip, case};
use crate::node::Runtime;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("run/erofs-root", 90, erofs_root).forgiving(EROFS, &[]),
    case("run/erofs-layers", 120, erofs_layers).forgiving(EROFS, &[]),
    case("run/devmapper-root", 90, devmapper_root).forgiving(DEVMAPPER, &[]),
];

/// Images of layers stay mounted as long as containerd has the snapshots.
const EROFS: &[&str] = &[
    "io.containerd.snapshotter.v1.erofs/snapshots/",
    "erofs/metadata.db",
    "block device loop",
];

/// containerd makes it with the first snapshot.
const DEVMAPPER: &[&str] = &["devmapper/metadata.db"];

/// What a container must find on a root, and what it can do with it.
const SCRIPT: &str = "grep ' / ' /proc/mounts | tail -n 1 | cut -d' ' -f3; cat /etc/motd; \
     stat -c %a /tmp /bin/setuid-probe; \
     echo text > /etc/motd && cat /etc/motd; rm /etc/group; ls /etc/group 2>&1; \
     mv /etc/passwd /root/moved && grep -c root /root/moved; \
     chown 1000:1000 /root/moved && stat -c %u /root/moved; \
     ln /root/moved /root/linked && stat -c %h /root/linked; \
     rm -r /etc && mkdir /etc && ls -A /etc | wc -l; sync";

/// What that prints, after the type of the root.
const SEEN: &str = "a file of the image\n1777\n4755\ntext\n\
     ls: /etc/group: No such file or directory\n1\n1000\n2\n0\n";

fn need(bench: &Bench, snapshotter: &str) -> Result<()> {
    let plugins = bench.ctr.call(&["plugins", "list"])?.ok()?.out();
    let is_it = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words
            .first()
            .is_some_and(|kind| kind.contains("snapshotter"))
            && words.get(1) == Some(&snapshotter)
            && words.last() == Some(&"ok")
    };
    match plugins.lines().any(is_it) {
        true => Ok(()),
        false => Err(Skip(format!("containerd has no {snapshotter} snapshotter here")).into()),
    }
}

/// A container sees its image and may change it; the next sees it as it was.
fn changes_its_root(bench: &Bench, snapshotter: &str, fstype: &str) -> Result<()> {
    for _ in 0..2 {
        let done = bench.ctr.run(
            &["--snapshotter", snapshotter],
            &bench.id(),
            &["sh", "-c", SCRIPT],
        )?;
        let done = done.ok()?;
        ensure!(done.out() == format!("{fstype}\n{SEEN}"), "{}", done.tail());
    }
    Ok(())
}

fn devmapper_root(bench: &Bench) -> Result<()> {
    need(bench, "devmapper")?;
    changes_its_root(bench, "devmapper", "ext4")
}

/// An image of one layer. What the container writes is in the snapshot.
fn erofs_root(bench: &Bench) -> Result<()> {
    need(bench, "erofs")?;
    changes_its_root(bench, "erofs", "overlay")?;

    let id = bench.id();
    let script = "echo kept > /root/file && rm /etc/motd && sync && sleep 1000";
    bench
        .ctr
        .run_detached(&["--snapshotter", "erofs"], &id, &["sh", "-c", script])?;
    let upper = upper_layer(bench, &id)?;
    let written =
        crate::process::eventually("the file is in the snapshot", bench.seconds(10), || {
            let text = fs::read_to_string(upper.join("root/file"));
            // It is made before it is written.
            Ok(text.ok().filter(|text| !text.is_empty()))
        })?;
    ensure!(written == "kept\n", "{written:?}");
    crate::process::eventually(
        "the file's absence is in the snapshot",
        bench.seconds(10),
        || Ok(is_whiteout(&upper.join("etc/motd")).then_some(())),
    )?;
    // A layer that husk's guest mounts is a disk, the only one that it has.
    let disks = ["sh", "-c", "ls /sys/block | grep -c ^vd"];
    let disks = bench.ctr.exec(&[], &id, "disks", &disks)?;
    if bench.runtime == Runtime::Husk {
        ensure!(disks.out() == "1\n", "disks: {}", disks.tail());
    }
    bench.ctr.remove(&id)?;
    let removed = bench
        .ctr
        .call(&["snapshots", "--snapshotter", "erofs", "ls"])?;
    let removed = removed.ok()?.out();
    ensure!(!removed.contains(&id), "its snapshot is left:\n{removed}");
    Ok(())
}

/// The writable directory of a container's snapshot.
fn upper_layer(bench: &Bench, id: &str) -> Result<PathBuf> {
    // Prints the commands that would mount it.
    let mounts = ["snapshots", "--snapshotter", "erofs", "mounts", "/mnt", id];
    let said = bench.ctr.call(&mounts)?.ok()?.out();
    let path = said
        .split(|byte: char| byte == ',' || byte.is_whitespace())
        .find_map(|option| option.strip_prefix("upperdir="));
    let path = path.with_context(|| format!("no upperdir in {said:?}"))?;
    Ok(PathBuf::from(path))
}

fn is_whiteout(path: &Path) -> bool {
    fs::symlink_metadata(path)
        .is_ok_and(|file| file.file_type().is_char_device() && file.rdev() == 0)
}

/// Several layers, the upper of which hides what is in a lower; and more than
/// become disks.
fn erofs_layers(bench: &Bench) -> Result<()> {
    need(bench, "erofs")?;
    for (image, layers) in [("husk.test/erofs:3", 3), ("husk.test/erofs:10", 10)] {
        crate::image::install_layers(&bench.node, image, layers)?;
        let done = bench.ctr.with_image(image).run(
            &["--snapshotter", "erofs"],
            &bench.id(),
            &["/probe", "count", "/layers"],
        );
        let removed = bench.ctr.call(&["images", "remove", "--sync", image]);
        let done = done?.ok()?;
        ensure!(done.out() == format!("{layers}\n"), "{}", done.tail());
        removed?.ok()?;
    }
    Ok(())
}
