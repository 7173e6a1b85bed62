//! `ctr run`: a container that runs to its end, and what it sees of its spec.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Bench, Case, Skip, case};

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("run/output", 20, output),
    case("run/stderr-apart", 20, stderr_apart),
    case("run/exit-codes", 30, exit_codes),
    case("run/env-cwd-user", 30, env_cwd_user),
    case("run/root-file-system", 20, root_file_system),
    case("run/read-only-root", 20, read_only_root),
    case("run/bind-mounts", 30, bind_mounts),
    case("run/memory-limit", 30, memory_limit),
    case("run/kernel-files", 20, kernel_files),
    case("run/missing-command", 20, missing_command),
    case("run/rm-leaves-nothing", 20, rm_leaves_nothing),
    case("run/many-layers", 60, many_layers),
    case("run/block-root", 60, block_root).forgiving(SNAPSHOTTER, &[]),
];

/// containerd makes it with the first snapshot.
const SNAPSHOTTER: &[&str] = &["blockfile/metadata.db"];

fn output(bench: &Bench) -> Result<()> {
    let done = bench
        .ctr
        .run(&[], &bench.id(), &["echo", "hello", "from a pod"])?
        .ok()?;
    ensure!(done.out() == "hello from a pod\n", "{}", done.tail());
    ensure!(done.stderr.is_empty(), "{}", done.tail());
    Ok(())
}

fn stderr_apart(bench: &Bench) -> Result<()> {
    let script = "echo to-out; echo to-err >&2; echo out-again";
    let done = bench
        .ctr
        .run(&[], &bench.id(), &["sh", "-c", script])?
        .ok()?;
    ensure!(
        done.out() == "to-out\nout-again\n" && done.err() == "to-err\n",
        "{}",
        done.tail()
    );
    Ok(())
}

fn exit_codes(bench: &Bench) -> Result<()> {
    // A process that dies by a signal counts as 128 + n; as PID 1 of its
    // namespace a shell can't kill itself, so a child does.
    let killed = "sh -c 'kill -9 $$'; exit $?";
    for (script, code) in [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 255", 255),
        (killed, 137),
    ] {
        bench
            .ctr
            .run(&[], &bench.id(), &["sh", "-c", script])?
            .expect_code(code)?;
    }
    Ok(())
}

fn env_cwd_user(bench: &Bench) -> Result<()> {
    let flags = [
        "--env",
        "GREETING=hei maailma",
        "--cwd",
        "/tmp",
        "--user",
        "1000:1000",
    ];
    let script =
        "echo $GREETING; echo $FROM_IMAGE; pwd; id -u; id -g; test -w /etc && echo writable; true";
    let done = bench
        .ctr
        .run(&flags, &bench.id(), &["sh", "-c", script])?
        .ok()?;
    ensure!(
        done.out() == "hei maailma\nyes\n/tmp\n1000\n1000\n",
        "{}",
        done.tail()
    );
    let named = bench
        .ctr
        .run(
            &["--user", "web"],
            &bench.id(),
            &["sh", "-c", "id -un; id -G"],
        )?
        .ok()?;
    ensure!(named.out().starts_with("web\n1000"), "{}", named.tail());
    Ok(())
}

fn root_file_system(bench: &Bench) -> Result<()> {
    let script = "cat /etc/motd; echo new > /etc/new; mkdir -p /a/b; mv /etc/new /a/b/moved; \
                  cat /a/b/moved; ln -s moved /a/b/link; cat /a/b/link; rm /etc/motd; ls /etc/motd; \
                  chown 1000 /a; stat -c %u /a; test -x /bin/busybox && echo runs";
    let done = bench
        .ctr
        .run(&[], &bench.id(), &["sh", "-c", script])?
        .ok()?;
    ensure!(
        done.out() == "a file of the image\nnew\nnew\n1000\nruns\n",
        "{}",
        done.tail()
    );
    // The next container of the image has the file again.
    let again = bench
        .ctr
        .run(&[], &bench.id(), &["cat", "/etc/motd"])?
        .ok()?;
    ensure!(again.out() == "a file of the image\n", "{}", again.tail());
    Ok(())
}

fn read_only_root(bench: &Bench) -> Result<()> {
    let script = "touch /etc/x 2>&1; cat /etc/motd";
    let done = bench
        .ctr
        .run(&["--read-only"], &bench.id(), &["sh", "-c", script])?
        .ok()?;
    ensure!(
        done.out().contains("Read-only file system"),
        "{}",
        done.tail()
    );
    ensure!(
        done.out().ends_with("a file of the image\n"),
        "{}",
        done.tail()
    );
    Ok(())
}

fn bind_mounts(bench: &Bench) -> Result<()> {
    let (writable, fixed) = (
        bench.folder().join("writable"),
        bench.folder().join("fixed"),
    );
    fs::create_dir_all(&writable)?;
    fs::create_dir_all(&fixed)?;
    fs::write(writable.join("in"), "from the host\n")?;
    fs::write(fixed.join("in"), "kept\n")?;
    let file = bench.folder().join("single");
    fs::write(&file, "one file\n")?;
    let flag = |from: &std::path::Path, to: &str, mode: &str| {
        format!(
            "type=bind,src={},dst={to},options=rbind:{mode}",
            from.display()
        )
    };
    let mounts = [
        flag(&writable, "/mnt/rw", "rw"),
        flag(&fixed, "/mnt/ro", "ro"),
        flag(&file, "/etc/single", "ro"),
    ];
    let flags: Vec<&str> = mounts.iter().flat_map(|mount| ["--mount", mount]).collect();
    let script = "cat /mnt/rw/in /mnt/ro/in /etc/single; echo from the pod > /mnt/rw/out; \
                  mkdir /mnt/rw/folder; touch /mnt/ro/out 2>&1; touch /etc/single 2>&1; true";
    let done = bench
        .ctr
        .run(&flags, &bench.id(), &["sh", "-c", script])?
        .ok()?;
    ensure!(
        done.out().starts_with("from the host\nkept\none file\n"),
        "{}",
        done.tail()
    );
    ensure!(
        done.out().matches("Read-only file system").count() == 2,
        "{}",
        done.tail()
    );
    ensure!(fs::read_to_string(writable.join("out"))? == "from the pod\n");
    ensure!(writable.join("folder").is_dir() && !fixed.join("out").exists());
    Ok(())
}

fn memory_limit(bench: &Bench) -> Result<()> {
    let limit = (64_u64 << 20).to_string();
    let flags = ["--memory-limit", &limit];
    let small = bench.ctr.run(
        &flags,
        &bench.id(),
        &["sh", "-c", "probe pattern 1000000 | probe check 1000000"],
    )?;
    small.ok()?;
    let big = bench
        .ctr
        .run(&flags, &bench.id(), &["probe", "eat", "200"])?;
    big.expect_code(137)?;
    Ok(())
}

fn kernel_files(bench: &Bench) -> Result<()> {
    // What programs look up to know where they are: /proc is mounted and of
    // the container, /sys and /dev are there, a private PID namespace.
    let script = "cat /proc/1/comm; echo $$; test -c /dev/null && test -c /dev/urandom && echo devices; \
                  echo gone > /dev/null; test -d /sys/class && echo sysfs; ls /dev/pts >/dev/null && echo pts; \
                  df /dev/shm | tail -1 | cut -d' ' -f1; head -c 4 /dev/zero | wc -c; hostname >/dev/null && echo host";
    let done = bench
        .ctr
        .run(&[], &bench.id(), &["sh", "-c", script])?
        .ok()?;
    ensure!(
        done.out() == "sh\n1\ndevices\nsysfs\npts\nshm\n4\nhost\n",
        "{}",
        done.tail()
    );
    Ok(())
}

fn missing_command(bench: &Bench) -> Result<()> {
    for (command, reason) in [
        (
            "no-such-command",
            &["executable file not found", "no such file", "not found"][..],
        ),
        ("/bin/not-there", &["no such file", "not found"]),
        (
            "/bin/not-executable",
            &["permission denied", "not executable"],
        ),
    ] {
        let done = bench.ctr.run(&[], &bench.id(), &[command])?;
        ensure!(done.code() != 0, "exit code 0 for {command}");
        let said = done.err().to_lowercase();
        ensure!(
            reason.iter().any(|reason| said.contains(reason)),
            "{command}: {}",
            done.tail()
        );
        ensure!(
            said.contains(command),
            "the reason does not name {command}: {}",
            done.tail()
        );
    }
    // In a running container the answer comes within a second.
    let id = bench.id();
    bench.ctr.run_detached(&[], &id, &["sleep", "1000"])?;
    let warm = bench.ctr.exec(&[], &id, "warm", &["true"])?.ok()?;
    let missing = bench.ctr.exec(&[], &id, "missing", &["no-such-command"])?;
    ensure!(
        missing.code() != 0 && missing.err().contains("no-such-command"),
        "{}",
        missing.tail()
    );
    // ctr's own start is not the runtime's: an exec that works is the measure.
    let extra = missing.took.saturating_sub(warm.took);
    ensure!(
        extra < Duration::from_secs(1),
        "answered after {extra:?} more than an exec that works"
    );
    bench.ctr.remove(&id)
}

fn rm_leaves_nothing(bench: &Bench) -> Result<()> {
    let id = bench.id();
    bench.ctr.run(&[], &id, &["true"])?.ok()?;
    for list in [
        &["task", "ls"][..],
        &["container", "ls"],
        &["snapshots", "ls"],
    ] {
        let shown = bench.ctr.call(list)?.ok()?.out();
        ensure!(!shown.contains(&id), "{list:?} still shows {id}:\n{shown}");
    }
    Ok(())
}

/// Paths of so many layers do not fit into the options of one mount.
fn many_layers(bench: &Bench) -> Result<()> {
    const IMAGE: &str = "husk.test/layers:1";
    const LAYERS: usize = 70;
    crate::image::install_layers(&bench.node, IMAGE, LAYERS)?;
    let ctr = bench.ctr.with_image(IMAGE);
    let done = ctr.run(&[], &bench.id(), &["/probe", "count", "/layers"]);
    bench
        .ctr
        .call(&["images", "remove", "--sync", IMAGE])?
        .ok()?;
    let done = done?.ok()?;
    ensure!(done.out() == format!("{LAYERS}\n"), "{}", done.tail());
    Ok(())
}

/// A snapshot that is a disk.
fn block_root(bench: &Bench) -> Result<()> {
    let plugins = bench.ctr.call(&["plugins", "list"])?.ok()?.out();
    let is_there = |line: &str| line.contains("blockfile") && line.trim_end().ends_with("ok");
    if !plugins.lines().any(is_there) {
        return Err(Skip("containerd has no blockfile snapshotter here".into()).into());
    }
    let flags = ["--snapshotter", "blockfile"];
    let script = "grep ' / ' /proc/mounts | cut -d' ' -f3; cat /etc/motd; \
                  echo text > /etc/motd && sync && cat /etc/motd";
    for _ in 0..2 {
        let done = bench
            .ctr
            .run(&flags, &bench.id(), &["sh", "-c", script])?
            .ok()?;
        ensure!(
            done.out() == "ext4\na file of the image\ntext\n",
            "{}",
            done.tail()
        );
    }
    Ok(())
}
