//! Devices of the node that a container asks for: a block device becomes a disk
//! of the machine, a character device the guest's of the same name.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_protocol::agent::{BlockStorage, DeviceNumber, Storage};
use husk_protocol::path;
use rustix::fs::{major, makedev, minor};
use ttrpc::Code;

use crate::bundle::device::{self, Device, DeviceKind};
use crate::bundle::{Bundle, DeviceRule};
use crate::disk::{Backing, DiskUse, PodDisks};
use crate::error::Error;
use crate::id::Id;
use crate::vfio::{self, GroupUse, PodGroups};

/// What is listed beside groups of PCI devices, and is the shim's to use.
const VFIO: &str = "vfio/vfio";

/// A block device that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("device {path}: the node's block device {name}")]
pub struct DeviceError {
    /// In the container.
    path: PathBuf,
    /// On the node.
    name: String,
    #[source]
    source: io::Error,
}

impl DeviceError {
    /// What containerd is told.
    pub fn code(&self) -> Code {
        match self.source.kind() {
            io::ErrorKind::NotFound => Code::NOT_FOUND,
            _ => Code::UNKNOWN,
        }
    }
}

/// The devices of a container.
#[derive(Debug)]
pub struct Devices {
    rules: Vec<DeviceRule>,
    container: Id,
    pod: Arc<PodDisks>,
    disks: Vec<DiskUse>,
    groups: Vec<GroupUse>,
    numbers: Vec<DeviceNumber>,
    storages: Vec<Storage>,
    asked: Vec<usize>,
    all: bool,
}

/// What the guest is told of a container's devices.
#[derive(Debug)]
pub struct GuestDevices {
    /// Which entries of the spec's list are for it.
    pub asked: Vec<usize>,
    /// What the numbers in the spec stand for.
    pub numbers: Vec<DeviceNumber>,
    /// Device nodes that are mounted like volumes, and volumes of huge pages.
    pub storages: Vec<Storage>,
    /// The container gets all that the guest has.
    pub all: bool,
    /// Where the guest finds the PCI devices of the node.
    pub pci_slots: Vec<u8>,
}

impl Devices {
    /// Opens what the spec's list has. Blocks.
    ///
    /// # Errors
    /// A block device cannot be opened, or a PCI device not be had.
    pub fn open(
        container: &Id,
        bundle: &Bundle,
        pod: &Arc<PodDisks>,
        groups: &Arc<PodGroups>,
    ) -> Result<Self, Error> {
        let (listed, rules) = (bundle.devices(), bundle.device_rules());
        let mut devices = Self {
            rules: rules.to_vec(),
            container: container.clone(),
            pod: Arc::clone(pod),
            disks: Vec::new(),
            groups: Vec::new(),
            numbers: Vec::new(),
            storages: Vec::new(),
            asked: device::asked_for(listed, rules, is_nodes),
            all: device::has_all(listed, rules),
        };
        for index in devices.asked.clone() {
            let device = &listed[index];
            match (device.kind, device.number()) {
                (DeviceKind::Block, Some(number)) => {
                    devices.disk(&device.path, number)?;
                }
                (DeviceKind::Character, Some(number)) => {
                    let name = name(DeviceKind::Character, number).unwrap_or_default();
                    if let Some(number) = vfio::number(&name) {
                        devices.groups.push(groups.share(number)?);
                    } else if name != VFIO {
                        devices.character(number, name);
                        continue;
                    }
                    // The guest has others in its place.
                    devices.asked.retain(|asked| *asked != index);
                }
                _ => {}
            }
        }
        Ok(devices)
    }

    /// A node of a block device at `destination`; the guest's path of it. One
    /// that the container may not read is a node that nobody can open, as it is
    /// with other runtimes.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn mount_block(&mut self, destination: &Path, number: u64) -> Result<String, DeviceError> {
        let number = (major(number), minor(number));
        let serial = self.disk(destination, number)?.unwrap_or_default();
        let index = self.storages.len();
        let mount_point = format!("{}/{}/devices/{index}", path::CONTAINERS, self.container);
        let mut storage = Storage {
            mount_point: mount_point.clone(),
            ..Storage::default()
        };
        storage.set_block(BlockStorage {
            serial,
            ..BlockStorage::default()
        });
        self.storages.push(storage);
        Ok(mount_point)
    }

    /// A volume that is memory of the guest; the guest's path of it.
    pub fn mount_in_guest(&mut self, storage: Storage) -> String {
        let mount_point = storage.mount_point.clone();
        // A container may have it at several places.
        if !self.storages.contains(&storage) {
            self.storages.push(storage);
        }
        mount_point
    }

    /// The guest's path of a character device; none: the node has no name for
    /// it, so it is no device that a guest could have as well.
    pub fn mount_character(&self, number: u64) -> Option<String> {
        let name = name(DeviceKind::Character, (major(number), minor(number)))?;
        Some(format!("/dev/{name}"))
    }

    /// What the guest is told, and what has to be plugged before.
    pub fn finish(self) -> (GuestDevices, Vec<DiskUse>, Vec<GroupUse>) {
        let guest = GuestDevices {
            asked: self.asked,
            numbers: self.numbers,
            storages: self.storages,
            all: self.all,
            pci_slots: self
                .groups
                .iter()
                .flat_map(GroupUse::slots)
                .copied()
                .collect(),
        };
        (guest, self.disks, self.groups)
    }

    /// The serial of the disk that a block device becomes, if the container may
    /// read it.
    fn disk(&mut self, path: &Path, number: (u32, u32)) -> Result<Option<String>, DeviceError> {
        let access = device::block_access(&self.rules, number);
        let Some(name) = name(DeviceKind::Block, number).filter(|_| access.read) else {
            return Ok(None);
        };
        let read_only = !access.write || is_read_only(number);
        let open = || open_block(&name, number, read_only);
        let disk = self
            .pod
            .share(
                Backing::Device(makedev(number.0, number.1)),
                read_only,
                open,
            )
            .map_err(|source| DeviceError {
                path: path.to_owned(),
                name: name.clone(),
                source,
            })?;
        let serial = disk.serial().to_owned();
        // Listed and mounted, it is one disk all the same.
        if !self.disks.iter().any(|known| known.serial() == serial) {
            self.disks.push(disk);
            self.tell(number, |entry| entry.set_block_serial(serial.clone()));
        }
        Ok(Some(serial))
    }

    fn character(&mut self, number: (u32, u32), name: String) {
        if !name.is_empty() {
            self.tell(number, |entry| entry.set_character_name(name));
        }
    }

    fn tell(&mut self, (major, minor): (u32, u32), set: impl FnOnce(&mut DeviceNumber)) {
        let mut entry = DeviceNumber {
            major,
            minor,
            ..DeviceNumber::default()
        };
        set(&mut entry);
        self.numbers.push(entry);
    }
}

/// The entry is that of the node's own /dev.
fn is_nodes(device: &Device) -> bool {
    let Ok(metadata) = fs::symlink_metadata(&device.path) else {
        return false;
    };
    let number = device.number().map(|(major, minor)| makedev(major, minor));
    metadata.file_type().is_block_device() && Some(metadata.rdev()) == number
}

fn in_sys(kind: DeviceKind, (major, minor): (u32, u32)) -> PathBuf {
    let class = match kind {
        DeviceKind::Block => "block",
        _ => "char",
    };
    PathBuf::from(format!("/sys/dev/{class}/{major}:{minor}"))
}

/// Name of a device of the node below /dev, as its kernel says.
fn name(kind: DeviceKind, number: (u32, u32)) -> Option<String> {
    let text = fs::read_to_string(in_sys(kind, number).join("uevent")).ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    name.map(str::to_owned)
}

fn is_read_only(number: (u32, u32)) -> bool {
    let text = fs::read_to_string(in_sys(DeviceKind::Block, number).join("ro"));
    text.is_ok_and(|text| text.trim() == "1")
}

/// The name may have been given to another device meanwhile.
fn open_block(name: &str, number: (u32, u32), read_only: bool) -> io::Result<OwnedFd> {
    let file: File = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(Path::new("/dev").join(name))?;
    let metadata = file.metadata()?;
    let is_it =
        metadata.file_type().is_block_device() && metadata.rdev() == makedev(number.0, number.1);
    match is_it {
        true => Ok(file.into()),
        false => Err(io::Error::from(io::ErrorKind::NotFound)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_devices_as_the_kernel_does() {
        assert_eq!(name(DeviceKind::Character, (1, 3)).unwrap(), "null");
        assert_eq!(name(DeviceKind::Character, (4000, 0)), None);
        assert_eq!(
            name(DeviceKind::Block, (1, 3)).filter(|name| name == "null"),
            None
        );
    }

    #[test]
    fn opens_no_other_device() {
        let error = open_block("null", (1, 3), true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
