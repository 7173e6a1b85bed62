//! PCI devices of the node that a container has: found by their slots, and what the
//! guest's drivers make of them.

use std::fs;
use std::future::ready;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::device;
use crate::error::{Doing, Error};
use crate::netlink;
use crate::oci::DeviceKind;

/// How long a driver may take for a device that was just plugged.
const DEADLINE: Duration = Duration::from_secs(10);

/// Deeper than any driver nests what it makes.
const DEPTH: usize = 12;

/// Class of disks, and of interfaces.
const STORAGE: &str = "0x01";
const NETWORK: &str = "0x02";

/// A device of the guest that came out of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Below /dev.
    pub name: String,
    /// Block or character.
    pub kind: DeviceKind,
    /// Major and minor.
    pub number: (u32, u32),
}

/// What drivers have made of a function.
#[derive(Debug, Default, PartialEq, Eq)]
struct Made {
    nodes: Vec<Node>,
    /// What interfaces stand on, by their names on their buses.
    interfaces: Vec<String>,
}

/// The directory in /sys of a function of bus 0, if it is there.
pub fn function(slot: u32) -> Option<PathBuf> {
    let address = format!("0000:00:{slot:02x}.0");
    let path = fs::canonicalize(Path::new("/sys/bus/pci/devices").join(address));
    path.ok().filter(|_| slot < 32)
}

/// Waits for a function that was plugged and for its driver; the devices that this
/// made, and interfaces are the pod's.
pub async fn claim(slot: u32) -> Result<Vec<Node>, Error> {
    let find = || ready(function(slot).and_then(|function| finished(&function)));
    let found = device::wait_for(DEADLINE, find).await;
    let found = found.doing("find PCI device in slot", slot)?;
    let made = match found {
        Some(made) => made,
        None => late(slot)?,
    };
    for interface in &made.interfaces {
        netlink::bring_in_device(interface).doing("take into the pod", interface)?;
    }
    Ok(made.nodes)
}

/// What there is of a function that is not finished in time.
fn late(slot: u32) -> Result<Made, Error> {
    let invalid = |reason| Error::Invalid {
        field: "pci_slots",
        reason,
    };
    let function = function(slot);
    let function = function.ok_or_else(|| invalid(format!("no PCI device came to slot {slot}")))?;
    let id = |name: &str| text(&function.join(name)).unwrap_or_default();
    let (vendor, device) = (id("vendor"), id("device"));
    if !function.join("driver").exists() {
        let reason = format!("the guest's kernel has no driver for PCI device {vendor}:{device}");
        return Err(invalid(reason.replace("0x", "")));
    }
    log::warn!("PCI device {vendor}:{device}: its driver has made no device of it");
    Ok(collect(&function))
}

/// What a function's driver has made of it, once that is what its class promises.
fn finished(function: &Path) -> Option<Made> {
    if !function.join("driver").exists() {
        return None;
    }
    let made = collect(function);
    let class = text(&function.join("class")).unwrap_or_default();
    let has_disk = made.nodes.iter().any(|node| node.kind == DeviceKind::Block);
    let is_finished = match class {
        class if class.starts_with(STORAGE) => has_disk,
        class if class.starts_with(NETWORK) => !made.interfaces.is_empty(),
        _ => true,
    };
    is_finished.then_some(made)
}

fn collect(function: &Path) -> Made {
    let mut made = Made::default();
    walk(function, DEPTH, &mut made);
    made.nodes.sort_by(|one, other| one.name.cmp(&other.name));
    made
}

fn walk(directory: &Path, depth: usize, made: &mut Made) {
    if let Some(node) = node(directory) {
        made.nodes.push(node);
    }
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        // Links lead to what stands on something else.
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let name = directory.file_name().and_then(|name| name.to_str());
        if entry.file_name() == "net"
            && let Some(name) = name
        {
            made.interfaces.push(name.to_owned());
        }
        walk(&entry.path(), depth, made);
    }
}

/// The device that a directory of /sys is, if it is one.
fn node(directory: &Path) -> Option<Node> {
    let number = text(&directory.join("dev"))?;
    let (major, minor) = number.split_once(':')?;
    let uevent = text(&directory.join("uevent"))?;
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))?;
    let subsystem = fs::read_link(directory.join("subsystem")).ok()?;
    Some(Node {
        name: name.to_owned(),
        kind: match subsystem.file_name()?.to_str()? {
            "block" => DeviceKind::Block,
            _ => DeviceKind::Character,
        },
        number: (major.parse().ok()?, minor.parse().ok()?),
    })
}

fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Function(tempfile::TempDir);

    impl Function {
        fn new(class: &str) -> Self {
            let function = Self(tempfile::tempdir().unwrap());
            fs::write(function.0.path().join("class"), class).unwrap();
            function
        }

        fn bind(&self) {
            symlink("/", self.0.path().join("driver")).unwrap();
        }

        fn device(&self, path: &str, subsystem: &str, number: &str) {
            let device = self.0.path().join(path);
            fs::create_dir_all(&device).unwrap();
            let name = path.rsplit('/').next().unwrap();
            fs::write(device.join("dev"), number).unwrap();
            fs::write(device.join("uevent"), format!("A=b\nDEVNAME={name}\n")).unwrap();
            symlink(format!("/sys/class/{subsystem}"), device.join("subsystem")).unwrap();
        }

        fn finished(&self) -> Option<Made> {
            finished(self.0.path())
        }
    }

    fn node(name: &str, kind: DeviceKind, number: (u32, u32)) -> Node {
        Node {
            name: name.to_owned(),
            kind,
            number,
        }
    }

    #[test]
    fn a_disk_is_waited_for() {
        let function = Function::new("0x010802\n");
        assert_eq!(function.finished(), None);
        function.bind();
        // Its namespaces come after its controller.
        function.device("nvme/nvme0", "nvme", "241:0\n");
        assert_eq!(function.finished(), None);
        function.device("nvme/nvme0/nvme0n1", "block", "259:0\n");
        function.device("nvme/nvme0/nvme0n1/nvme0n1p1", "block", "259:1\n");
        // Through links go ways back.
        symlink(
            function.0.path(),
            function.0.path().join("nvme/nvme0/device"),
        )
        .unwrap();
        let made = function.finished().unwrap();
        assert_eq!(
            made.nodes,
            [
                node("nvme0", DeviceKind::Character, (241, 0)),
                node("nvme0n1", DeviceKind::Block, (259, 0)),
                node("nvme0n1p1", DeviceKind::Block, (259, 1)),
            ]
        );
        assert!(made.interfaces.is_empty());
    }

    #[test]
    fn an_interface_is_waited_for() {
        let function = Function::new("0x020000\n");
        function.bind();
        assert_eq!(function.finished(), None);
        fs::create_dir_all(function.0.path().join("virtio5/net/eth1")).unwrap();
        let made = function.finished().unwrap();
        assert_eq!(made.interfaces, ["virtio5"]);
        assert!(made.nodes.is_empty());
    }

    #[test]
    fn of_others_a_driver_is_enough() {
        let function = Function::new("0x0b4000\n");
        assert_eq!(function.finished(), None);
        function.bind();
        assert_eq!(function.finished(), Some(Made::default()));
    }

    #[test]
    fn a_slot_that_cannot_be_is_empty() {
        assert_eq!(super::function(32), None);
        assert_eq!(super::function(u32::MAX), None);
    }
}
