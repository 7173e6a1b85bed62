//! Devices of the node that a container asks for.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::volume::{mount, shell, sleeper};
use super::{Bench, Case, case, husk_case};
use crate::block::{Frozen, LoopDevice, NodeMount};
use crate::cri::api::Device;
use crate::pod::Pod;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("device/block-volume", 60, block_volume),
    case("device/node-as-volume", 60, node_as_volume),
    case("device/ctr-flag", 40, ctr_flag),
    case("device/privileged", 40, privileged),
    husk_case("device/node-keeps-its-own", 40, node_keeps_its_own),
    husk_case("device/refused", 40, refused),
    husk_case("device/that-hangs", 120, that_hangs),
];

fn device(from: &str, to: &str, permissions: &str) -> Device {
    Device {
        container_path: to.into(),
        host_path: from.into(),
        permissions: permissions.into(),
    }
}

/// `volumeDevices`: the same disk to write for one container and to read for
/// another, at a path of its own.
fn block_volume(bench: &Bench) -> Result<()> {
    let disk = LoopDevice::new(&bench.folder().join("disk.img"), 16)?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let with = |access| sleeper(&cri, &pod, &[], &[device(&disk.path, "/dev/xvda", access)]);
    let writer = with("rwm")?;
    let write = "test -b /dev/xvda && blockdev --getsize64 /dev/xvda && \
                 printf 'on a raw disk' | dd of=/dev/xvda bs=512 seek=100 conv=notrunc,fsync 2>/dev/null";
    let seen = shell(&cri, &writer, write)?;
    ensure!(seen == "16777216", "size {seen:?}");
    let mut text = [0; 13];
    fs::File::open(&disk.file)?.read_exact_at(&mut text, 51_200)?;
    ensure!(
        &text == b"on a raw disk",
        "the node reads {:?}",
        String::from_utf8_lossy(&text)
    );

    let reader = with("r")?;
    let read = "dd if=/dev/xvda bs=512 skip=100 count=1 2>/dev/null | head -c 13";
    let seen = shell(&cri, &reader, read)?;
    ensure!(seen == "on a raw disk", "the reader sees {seen:?}");
    let refused = cri.exec_sync(&reader, &["sh", "-c", "echo x > /dev/xvda"], 10)?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("not permitted"),
        "{refused:?}"
    );
    // Direct access, as databases have it.
    let direct = "dd if=/dev/xvda bs=4096 skip=12 count=1 iflag=direct 2>/dev/null | tail -c 2048 | head -c 13";
    let seen = shell(&cri, &writer, direct)?;
    ensure!(seen == "on a raw disk", "directly: {seen:?}");

    // The next container has it again, and one that does not ask has none.
    cri.stop(&writer, 0)?;
    cri.remove(&writer)?;
    let next = with("rwm")?;
    let seen = shell(&cri, &next, read)?;
    ensure!(seen == "on a raw disk", "the next one sees {seen:?}");
    let without = sleeper(&cri, &pod, &[], &[])?;
    let seen = shell(&cri, &without, "ls /dev/xvda 2>&1 || true")?;
    ensure!(seen.contains("No such file"), "{seen:?}");
    pod.remove(&cri)
}

/// Volumes that are device nodes: whether they may be opened is for the rules
/// about devices to say.
fn node_as_volume(bench: &Bench) -> Result<()> {
    let disk = LoopDevice::new(&bench.folder().join("disk.img"), 4)?;
    let file = fs::File::options().write(true).open(&disk.file)?;
    file.write_all_at(b"first", 0)?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let node = mount(Path::new(&disk.path), "/mnt/disk");
    let closed = sleeper(&cri, &pod, std::slice::from_ref(&node), &[])?;
    let script = "test -b /mnt/disk && echo there; head -c 5 /mnt/disk 2>&1 || true";
    let seen = shell(&cri, &closed, script)?;
    ensure!(
        seen.starts_with("there\n") && seen.contains("not permitted"),
        "{seen:?}"
    );
    let open = sleeper(
        &cri,
        &pod,
        &[node],
        &[device(&disk.path, "/dev/own", "rwm")],
    )?;
    let script = "head -c 5 /mnt/disk; echo; printf SECOND | dd of=/dev/own conv=notrunc,fsync 2>/dev/null; \
                  head -c 6 /mnt/disk";
    let seen = shell(&cri, &open, script)?;
    ensure!(seen == "first\nSECOND", "{seen:?}");

    // What hides a file.
    let null = [mount(Path::new("/dev/null"), "/etc/motd")];
    let hidden = sleeper(&cri, &pod, &null, &[])?;
    let seen = shell(
        &cri,
        &hidden,
        "wc -c < /etc/motd; echo x > /etc/motd; test -c /etc/motd && echo device",
    )?;
    ensure!(seen == "0\ndevice", "{seen:?}");
    // What a guest has as well.
    let usual = [
        device("/dev/fuse", "/dev/fuse", "rwm"),
        device("/dev/net/tun", "/dev/own-tun", "rwm"),
    ];
    let usual = sleeper(&cri, &pod, &[], &usual)?;
    let script = "( : <> /dev/fuse ) && ( : <> /dev/own-tun ) && ls -d /dev/fuse /dev/own-tun";
    let seen = shell(&cri, &usual, script)?;
    ensure!(seen == "/dev/fuse\n/dev/own-tun", "{seen:?}");
    pod.remove(&cri)
}

/// A device that is none of the guest's.
fn refused(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let kvm = "/dev/kvm";
    for (mounts, devices) in [
        (vec![], vec![device(kvm, "/dev/mine", "rwm")]),
        (vec![mount(Path::new(kvm), "/dev/mine")], vec![]),
    ] {
        let refused = sleeper(&cri, &pod, &mounts, &devices);
        let said = refused
            .err()
            .map(|error| format!("{error:#}"))
            .unwrap_or_default();
        ensure!(
            said.contains("/dev/mine: the guest has no") && said.contains("kvm"),
            "{said:?}"
        );
    }
    let next = pod.start(&cri, &["echo", "works"])?;
    pod.await_log(&cri, &next, "works")?;
    pod.remove(&cri)
}

/// A disk that does not answer while it is written to: who has it next shall not get
/// what this pod has written, so the pod is not gone before its VMM.
fn that_hangs(bench: &Bench) -> Result<()> {
    let folder = bench.folder();
    let outer = LoopDevice::new(&folder.join("outer.img"), 64)?;
    outer.format()?;
    let place = folder.join("outer");
    let _mounted = NodeMount::new("ext4", &outer.path, "rw", &place)?;
    let disk = LoopDevice::new(&place.join("disk.img"), 16)?;
    let (ctr, id) = (&bench.ctr, bench.id());
    ctr.run_detached(&["--device", &disk.path], &id, &["sleep", "1000"])?;
    let frozen = Frozen::new(&place)?;
    let write = "dd if=/dev/zero of=$0 bs=4096 count=1 conv=notrunc,fsync > /dev/null 2>&1 &";
    let write = ["sh", "-c", write, &disk.path];
    ctr.exec(&[], &id, "write", &write)?.ok()?;
    thread::sleep(Duration::from_secs(5));

    ctr.call(&["task", "kill", "--signal", "KILL", &id])?.ok()?;
    ctr.await_state(&id, "STOPPED", ctr.deadline() * 3)?;
    for _ in 0..2 {
        let refused = ctr.call(&["task", "delete", &id])?;
        ensure!(
            refused.err().contains("may still write to the disks"),
            "{}",
            refused.tail()
        );
        ensure!(ctr.state(&id)? == Some("STOPPED"), "{:?}", ctr.state(&id));
    }
    drop(frozen);
    let began = Instant::now();
    while ctr.state(&id)?.is_some() {
        ensure!(began.elapsed() < ctr.deadline(), "the task is not deleted");
        thread::sleep(Duration::from_secs(1));
        ctr.call(&["task", "delete", &id])?;
    }
    ctr.remove(&id)
}

/// `ctr run --device`: a disk at the node's own path.
fn ctr_flag(bench: &Bench) -> Result<()> {
    let disk = LoopDevice::new(&bench.folder().join("disk.img"), 8)?;
    let file = fs::File::options().write(true).open(&disk.file)?;
    file.write_all_at(b"from the node", 0)?;
    let script = "blockdev --getsize64 $0; head -c 13 $0; echo; \
                  printf 'from the pod!' | dd of=$0 conv=notrunc,fsync 2>/dev/null; head -c 13 $0";
    let done = bench.ctr.run(
        &["--device", &disk.path],
        &bench.id(),
        &["sh", "-c", script, &disk.path],
    )?;
    let done = done.ok()?;
    ensure!(
        done.out() == "8388608\nfrom the node\nfrom the pod!",
        "{}",
        done.tail()
    );
    let text = fs::read(&disk.file)?;
    ensure!(
        text.starts_with(b"from the pod!") && text.len() == 8 << 20,
        "the file begins with {:?}",
        String::from_utf8_lossy(&text[..13.min(text.len())])
    );
    // One that has not asked for it has none.
    let script = "ls $0 2>&1; mknod /tmp/disk b 7 0; head -c 1 /tmp/disk 2>&1; true";
    let done = bench
        .ctr
        .run(&[], &bench.id(), &["sh", "-c", script, &disk.path])?;
    let done = done.ok()?;
    ensure!(
        done.out().contains("No such file or directory")
            && done.out().contains("Operation not permitted"),
        "{}",
        done.tail()
    );
    Ok(())
}

/// A privileged container has a disk that it asks for, too.
fn privileged(bench: &Bench) -> Result<()> {
    let disk = LoopDevice::new(&bench.folder().join("disk.img"), 8)?;
    let file = fs::File::options().write(true).open(&disk.file)?;
    file.write_all_at(b"asked for", 0)?;
    let script = "head -c 9 $0; test -c /dev/fuse && test -c /dev/null && echo; \
                  printf 'WRITTEN' | dd of=$0 conv=notrunc,fsync 2>/dev/null; head -c 7 $0";
    let done = bench.ctr.run(
        &["--privileged", "--device", &disk.path],
        &bench.id(),
        &["sh", "-c", script, &disk.path],
    )?;
    let done = done.ok()?;
    ensure!(done.out() == "asked for\nWRITTEN", "{}", done.tail());
    Ok(())
}

/// A privileged container gets what its guest has, and nothing of the node.
fn node_keeps_its_own(bench: &Bench) -> Result<()> {
    let disk = LoopDevice::new(&bench.folder().join("disk.img"), 8)?;
    let file = fs::File::options().write(true).open(&disk.file)?;
    file.write_all_at(b"of the node", 0)?;
    let script = "ls $0 /dev/kvm 2>&1; test -c /dev/fuse && test -c /dev/net/tun && echo the guest has its own; \
                  for disk in $(ls /sys/class/block); do \
                    test -b /dev/$disk || echo no node of $disk; head -c 11 /dev/$disk; done; true";
    let done = bench.ctr.run(
        &["--privileged"],
        &bench.id(),
        &["sh", "-c", script, &disk.path],
    )?;
    let done = done.ok()?;
    let seen = done.out();
    ensure!(
        seen.matches("No such file or directory").count() == 2
            && seen.contains("the guest has its own")
            && !seen.contains("no node of")
            && !seen.contains("of the node"),
        "{}",
        done.tail()
    );
    Ok(())
}
