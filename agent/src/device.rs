//! Devices of the guest: found in /sys, awaited through the kernel's events.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::makedev;

use crate::error::{Doing, OsError};
use crate::kernel_file;
use crate::watch::DeviceWatch;

/// A block device.
#[derive(Debug, Clone)]
pub struct Block {
    name: String,
    number: u64,
}

impl Block {
    /// Its node in the agent's /dev.
    pub fn node(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// Its directory in /sys.
    pub fn directory(&self) -> PathBuf {
        Path::new("/sys/block").join(&self.name)
    }

    /// Major and minor number.
    pub fn number(&self) -> u64 {
        self.number
    }
}

/// Looks until it is found or the deadline has passed, at first and after
/// every device event.
pub async fn wait_for<T>(
    deadline: Duration,
    find: impl Fn() -> Option<T>,
) -> io::Result<Option<T>> {
    // Most devices are there from the start.
    if let Some(found) = find() {
        return Ok(Some(found));
    }
    let watch = DeviceWatch::new()?;
    let found = async {
        loop {
            if let Some(found) = find() {
                return Ok(Some(found));
            }
            watch.changed().await?;
        }
    };
    tokio::time::timeout(deadline, found)
        .await
        .unwrap_or(Ok(None))
}

/// The virtio-blk device of this serial.
pub fn find_block(serial: &str) -> Option<Block> {
    let found = |path: &Path| text(&path.join("serial")).as_deref() == Some(serial);
    let path = entries("/sys/block").find(|path| found(path))?;
    let number = text(&path.join("dev"))?;
    let (major, minor) = number.split_once(':')?;
    Some(Block {
        name: path.file_name()?.to_str()?.to_owned(),
        number: makedev(major.parse().ok()?, minor.parse().ok()?),
    })
}

/// The virtio-fs device of this tag: its directory in /sys.
pub fn find_virtio_fs(tag: &str) -> Option<PathBuf> {
    entries("/sys/fs/virtiofs").find(|path| text(&path.join("tag")).as_deref() == Some(tag))
}

/// Looks for new PCI devices.
pub fn rescan() -> Result<(), OsError> {
    write("/sys/bus/pci/rescan", "1")
}

/// Removes a device before it is unplugged; its /sys directory is that of the
/// virtio device, whose parent is the PCI function.
pub fn remove(class_entry: &Path) -> Result<(), OsError> {
    let device = class_entry.join("device");
    let virtio = fs::canonicalize(&device).doing("find", device.display())?;
    let function = virtio.parent().unwrap_or(&virtio).join("remove");
    write(&function, "1")
}

/// Brings vCPUs online until there are so many, and all memory. Returns how
/// many vCPUs there are.
pub fn bring_online(vcpus: u32) -> Result<u32, OsError> {
    for block in entries("/sys/devices/system/memory") {
        let state = block.join("state");
        if text(&state).as_deref() == Some("offline") {
            write(&state, "online")?;
        }
    }
    let cpus = || {
        entries("/sys/devices/system/cpu").filter(|path| {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let number = name.strip_prefix("cpu").unwrap_or_default();
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        })
    };
    // The first one often has no switch: it can't be off.
    let is_offline = |path: &PathBuf| text(&path.join("online")).as_deref() == Some("0");
    let mut online = cpus().filter(|path| !is_offline(path)).count();
    for path in cpus().filter(is_offline) {
        if online >= vcpus as usize {
            break;
        }
        write(path.join("online"), "1")?;
        online += 1;
    }
    Ok(u32::try_from(online).unwrap_or(u32::MAX))
}

fn entries(directory: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim_end().to_owned())
}

fn write(path: impl AsRef<Path>, value: &str) -> Result<(), OsError> {
    let path = path.as_ref();
    kernel_file::write(path, value).doing("write", path.display())
}
