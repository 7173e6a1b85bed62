//! PCI devices of the node in pods.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::volume::{shell, sleeper};
use super::{Bench, Case, husk_case};
use crate::cri::api::Device;
use crate::drop_in::DropIn;
use crate::pci::{self, Lent};
use crate::pod::Pod;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    husk_case("device/vfio", 120, disk),
    husk_case("device/vfio-hot", 150, hot),
    husk_case("device/vfio-nvme", 120, nvme),
    husk_case("device/vfio-interfaces", 120, interfaces),
    husk_case("device/vfio-refused", 60, refused),
];

const ON: &str = "vfio = true\n";

/// Sets `$d` to the disk that is the guest's by PCI. It has no other.
const FIND: &str = "d=$(ls -d /dev/vd?); ";

/// What the node reads of the spare disk.
fn beginning(disk: &Path) -> Result<String> {
    let mut text = [0; 13];
    File::open(disk)?.read_exact_at(&mut text, 0)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// One pod after the other has it, and then the node again.
fn disk(bench: &Bench) -> Result<()> {
    let disk = pci::spare_disk()?;
    let address = pci::address_of(&disk)?;
    let file = File::options().write(true).open(&disk)?;
    file.write_all_at(b"from the node", 0)?;
    file.sync_all()?;
    drop(file);
    {
        let _on = DropIn::with(ON)?;
        let lent = Lent::new(&address)?;
        let with = ["--device", lent.group.as_str()];
        let run = |script: &str| {
            let script = format!("{FIND}{script}");
            let done = bench.ctr.run(&with, &bench.id(), &["sh", "-c", &script])?;
            Ok::<_, anyhow::Error>(done.ok()?.out())
        };
        let script = "blockdev --getsize64 $d; head -c 13 $d; echo; \
                      printf 'from the pod!' | dd of=$d conv=notrunc,fsync 2>/dev/null; \
                      cat /sys/block/$(basename $d)/serial; echo; \
                      readlink -f /sys/block/$(basename $d)/device | grep -o 0000:00:1f.0; \
                      ls -d /dev/vfio 2>&1; true";
        let seen = run(script)?;
        let wanted = "33554432\nfrom the node\nhusk-spare\n0000:00:1f.0\n";
        ensure!(
            seen.starts_with(wanted) && seen.contains("No such file"),
            "{seen:?}"
        );
        // As much at once as its queue takes, by the device's own access to memory.
        let script = "dd if=/dev/urandom of=/tmp/all bs=1M count=24 2>/dev/null; \
                      dd if=/tmp/all of=$d bs=1M seek=4 oflag=direct 2>/dev/null; \
                      dd if=$d of=/tmp/back bs=1M skip=4 count=24 iflag=direct 2>/dev/null; \
                      cmp /tmp/all /tmp/back && head -c 13 $d";
        let seen = run(script)?;
        ensure!(seen == "from the pod!", "{seen:?}");
    }
    let text = beginning(&pci::spare_disk()?)?;
    ensure!(text == "from the pod!", "the node reads {text:?}");
    Ok(())
}

/// Of NVMe disks.
const NVME: &str = "0x010802";

/// Hardware of nobody's making for machines: what one pod writes, the next reads.
fn nvme(bench: &Bench) -> Result<()> {
    let addresses = pci::of_class(NVME)?;
    let address = addresses.first().context("no spare NVMe disk")?;
    let _on = DropIn::with(ON)?;
    let lent = Lent::new(address)?;
    let with = ["--device", lent.group.as_str()];
    let run = |script: &str| {
        let script = format!("d=$(ls -d /dev/nvme?n1) && {script}");
        let done = bench.ctr.run(&with, &bench.id(), &["sh", "-c", &script])?;
        Ok::<_, anyhow::Error>(done.ok()?.out())
    };
    let seen = run("blockdev --getsize64 $d; \
                    dd if=/dev/urandom of=/tmp/all bs=1M count=24 2>/dev/null; \
                    dd if=/tmp/all of=$d bs=1M seek=4 oflag=direct conv=fsync 2>/dev/null; \
                    sha256sum < /tmp/all")?;
    let (size, written) = seen.split_once('\n').context("no sum")?;
    ensure!(size == "67108864", "{seen:?}");
    let read = run("dd if=$d bs=1M skip=4 count=24 iflag=direct 2>/dev/null | sha256sum")?;
    ensure!(read.trim() == written.trim(), "{written:?}, then {read:?}");
    Ok(())
}

/// A container of a pod that runs already has it, and so does the next; the machine
/// grows meanwhile.
fn hot(bench: &Bench) -> Result<()> {
    let disk = pci::spare_disk()?;
    let address = pci::address_of(&disk)?;
    let file = File::options().write(true).open(&disk)?;
    file.write_all_at(b"first", 0)?;
    file.sync_all()?;
    drop(file);
    let _on = DropIn::with(ON)?;
    let lent = Lent::new(&address)?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let plain = sleeper(&cri, &pod, &[], &[])?;
    let device = Device {
        container_path: lent.group.clone(),
        host_path: lent.group.clone(),
        permissions: "rwm".into(),
    };
    let with = || sleeper(&cri, &pod, &[], std::slice::from_ref(&device));
    let first = with()?;
    let script =
        format!("{FIND}head -c 5 $d; printf THIRD | dd of=$d conv=notrunc,fsync 2>/dev/null");
    let seen = shell(&cri, &first, &script)?;
    ensure!(seen == "first", "{seen:?}");
    // A container that did not ask for it has none, though the guest has.
    let seen = shell(
        &cri,
        &plain,
        "ls -d /dev/vd? 2>&1; ls /sys/block | grep -c vd; true",
    )?;
    ensure!(
        seen.contains("No such file") && seen.ends_with('1'),
        "{seen:?}"
    );
    // Memory that comes later is the device's to reach as well.
    let mut config = pod.container(&["sleep", "1000"]);
    config.devices = vec![device.clone()];
    if let Some(linux) = &mut config.linux {
        let resources = linux.resources.get_or_insert_default();
        resources.memory_limit_in_bytes = 1 << 30;
    }
    let large = pod.start_config(&cri, &config)?;
    // The guest takes it for programs first (`auto-movable`), and so for dd's buffers.
    let script = format!(
        "{FIND}kib() {{ awk '/MemTotal/ {{ print $2 }}' /proc/meminfo; }}; \
         i=0; while [ $(kib) -lt 800000 ] && [ $i -lt 200 ]; do sleep 0.2; i=$((i + 1)); done; \
         dd if=$d of=/dev/shm/all bs=4M iflag=direct 2>/dev/null || exit 1; \
         cmp $d /dev/shm/all || exit 1; head -c 5 /dev/shm/all; echo; kib"
    );
    let seen = shell(&cri, &large, &script)?;
    let (text, kib) = seen.split_once('\n').unwrap_or_default();
    let kib: u64 = kib.trim().parse()?;
    ensure!(text == "THIRD" && kib >= 800_000, "{seen:?}");
    // Who was there before has it until it ends; then it is the node's to give.
    for id in [&first, &large] {
        cri.stop(id, 0)?;
        cri.remove(id)?;
    }
    let opened = File::options().read(true).write(true).open(&lent.group);
    ensure!(opened.is_ok(), "the group is still held: {opened:?}");
    drop(opened);
    let seen = shell(&cri, &plain, "ls /sys/block | grep -c vd; true")?;
    ensure!(seen == "0", "the guest still has it: {seen:?}");
    let next = with()?;
    let seen = shell(&cri, &next, &format!("{FIND}head -c 5 $d"))?;
    ensure!(seen == "THIRD", "{seen:?}");
    pod.remove(&cri)
}

/// Two pods, each with an interface of the node, on one wire.
fn interfaces(bench: &Bench) -> Result<()> {
    let interfaces = pci::of_class("0x0200")?;
    let [near, far] = interfaces.as_slice() else {
        anyhow::bail!("the node has {} spare interfaces", interfaces.len());
    };
    let _on = DropIn::with(ON)?;
    let (near, far) = (Lent::new(near)?, Lent::new(far)?);
    let up = |number: u8| {
        format!(
            "i=$(ls /sys/class/net | grep -v lo) && ip addr add 10.77.0.{number}/24 dev $i && \
             ip link set $i up && cat /sys/class/net/$i/address && "
        )
    };
    let flags =
        |lent: &Lent| ["--cap-add", "CAP_NET_ADMIN", "--device", &lent.group].map(str::to_owned);
    let (near, far) = (flags(&near), flags(&far));
    let near: Vec<_> = near.iter().map(String::as_str).collect();
    let far: Vec<_> = far.iter().map(String::as_str).collect();
    let answering = bench.id();
    let script = format!("{}sleep 1000", up(1));
    bench
        .ctr
        .run_detached(&near, &answering, &["sh", "-c", &script])?;
    let script = format!("{}ping -c 3 -w 60 10.77.0.1", up(2));
    let done = bench.ctr.run(&far, &bench.id(), &["sh", "-c", &script])?;
    let done = done.ok()?;
    let seen = done.out();
    ensure!(
        seen.starts_with("52:54:00:00:01:0") && seen.contains(" 0% packet loss"),
        "{}",
        done.tail()
    );
    bench.ctr.remove(&answering)
}

/// What cannot be given is refused with the reason, and nothing of it stays.
fn refused(bench: &Bench) -> Result<()> {
    let disk = pci::spare_disk()?;
    let said = |group: &str| {
        let device = ["--device", group];
        let done = bench.ctr.run(&device, &bench.id(), &["true"])?;
        ensure!(done.code() != 0, "it was given: {}", done.tail());
        Ok(done.err())
    };
    let lent = Lent::new(&pci::address_of(&disk)?)?;
    let off = said(&lent.group)?;
    ensure!(
        off.contains("pods get no PCI devices of this node: `vfio` is false"),
        "{off:?}"
    );
    let _on = DropIn::with(ON)?;
    {
        let _mine = File::options().read(true).write(true).open(&lent.group)?;
        let busy = said(&lent.group)?;
        ensure!(
            busy.contains("open it: ") && busy.contains("busy"),
            "{busy:?}"
        );
    }
    // One of the chipset's devices, whose group has a disk controller as well.
    let smbus = pci::of_class("0x0c0500")?;
    let [smbus] = smbus.as_slice() else {
        anyhow::bail!("the node has {} SMBus controllers", smbus.len());
    };
    let smbus = Lent::new(smbus)?;
    let bound = said(&smbus.group)?;
    ensure!(
        bound.contains("of its IOMMU group is bound to") && bound.contains("not to vfio-pci"),
        "{bound:?}"
    );
    // A device that is not there any more, by a node of its number.
    ensure!(fs::metadata(&lent.group).is_ok(), "{} has gone", lent.group);
    let given = ["--device", lent.group.as_str()];
    let script = format!("{FIND}test -b $d");
    let done = bench.ctr.run(&given, &bench.id(), &["sh", "-c", &script])?;
    done.ok()?;
    Ok(())
}
