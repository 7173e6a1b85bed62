//! Devices of the guest: found in /sys, awaited through the kernel's events.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, Shared};
use futures::stream::{FuturesUnordered, StreamExt};
use rustix::fs::makedev;
use tokio::task::spawn_blocking;

use crate::error::{Doing, OsError};
use crate::kernel_file;
use crate::lock::lock;
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
pub async fn wait_for<T, F: Future<Output = Option<T>>>(
    deadline: Duration,
    find: impl Fn() -> F,
) -> io::Result<Option<T>> {
    let found = async {
        // Most devices are there from the start.
        if let Some(found) = find().await {
            return Ok(Some(found));
        }
        let watch = DeviceWatch::new()?;
        loop {
            if let Some(found) = find().await {
                return Ok(Some(found));
            }
            watch.changed().await?;
        }
    };
    tokio::time::timeout(deadline, found)
        .await
        .unwrap_or(Ok(None))
}

/// The virtio-blk device of this serial. Linux asks the disk for it, which answers
/// in its turn: late where its limit is used up, and never when it hangs. So none
/// waits for another.
pub async fn find_block(serial: &str) -> Option<Block> {
    find_block_in(Path::new("/sys/block"), serial).await
}

async fn find_block_in(directory: &Path, serial: &str) -> Option<Block> {
    let mut answers: FuturesUnordered<_> = entries(directory).filter_map(ask).collect();
    while let Some(answer) = answers.next().await {
        let found = answer.filter(|(of_disk, _)| of_disk == serial);
        if let Some((_, block)) = found {
            return Some(block);
        }
    }
    None
}

/// What a disk will have said: its serial, and what it is.
type Question = Shared<BoxFuture<'static, Option<(String, Block)>>>;

/// Those without an answer yet, by the numbers of the disks' directories, none of
/// which sysfs gives a second time.
static ASKED: Mutex<BTreeMap<u64, Question>> = Mutex::new(BTreeMap::new());

/// Asks the disk at this path in /sys, on a thread of its own, unless one asks it
/// already: one that hangs has one thread, however often it is looked for a disk.
fn ask(path: PathBuf) -> Option<Question> {
    let number = fs::metadata(&path).ok()?.ino();
    let mut asked = lock(&ASKED);
    let question = asked.entry(number).or_insert_with(|| {
        let answer = spawn_blocking(move || {
            let answer = block_at(&path);
            lock(&ASKED).remove(&number);
            answer
        });
        let answer = async {
            answer.await.unwrap_or_else(|error| {
                log::error!("asking a disk: {error}");
                None
            })
        };
        answer.boxed().shared()
    });
    Some(question.clone())
}

/// What lies at this path in /sys, and its serial. Blocks.
fn block_at(path: &Path) -> Option<(String, Block)> {
    let serial = text(&path.join("serial"))?;
    let number = text(&path.join("dev"))?;
    let (major, minor) = number.split_once(':')?;
    let block = Block {
        name: path.file_name()?.to_str()?.to_owned(),
        number: makedev(major.parse().ok()?, minor.parse().ok()?),
    };
    Some((serial, block))
}

/// The virtio-fs device of this tag: its directory in /sys.
pub fn find_virtio_fs(tag: &str) -> Option<PathBuf> {
    entries(Path::new("/sys/fs/virtiofs"))
        .find(|path| text(&path.join("tag")).as_deref() == Some(tag))
}

/// Looks for new PCI devices, whose drivers have found them when it returns.
pub async fn rescan() -> Result<(), OsError> {
    const FILE: &str = "/sys/bus/pci/rescan";
    let written = spawn_blocking(|| write(FILE, "1")).await;
    written.map_err(io::Error::other).doing("write", FILE)?
}

/// Removes a device before it is unplugged: the PCI function that the virtio
/// device stands on.
pub fn remove(virtio: &Path) -> Result<(), OsError> {
    let virtio = fs::canonicalize(virtio).doing("find", virtio.display())?;
    let function = virtio.parent().unwrap_or(&virtio).join("remove");
    write(&function, "1")
}

/// Removes a PCI function before it is unplugged, by its directory in /sys.
pub fn remove_function(function: &Path) -> Result<(), OsError> {
    write(function.join("remove"), "1")
}

/// The directory in /sys of a device of the virtio bus.
pub fn on_virtio_bus(name: &str) -> PathBuf {
    Path::new("/sys/bus/virtio/devices").join(name)
}

/// Brings vCPUs on- or offline until there are so many; the first one stays.
/// Returns how many there are. Memory needs no such help: the kernel takes what
/// is plugged.
pub fn set_vcpus(wanted: u32) -> Result<u32, OsError> {
    let mut vcpus: Vec<(u32, PathBuf)> = entries(Path::new("/sys/devices/system/cpu"))
        .filter_map(|path| {
            let name = path.file_name()?.to_str()?;
            Some((name.strip_prefix("cpu")?.parse().ok()?, path))
        })
        .collect();
    vcpus.sort_unstable();
    let mut online = 0;
    for (index, (_, path)) in (0..).zip(vcpus) {
        let switch = path.join("online");
        // The first one often has no switch: it can't be off.
        let state = text(&switch);
        let is_online = state.as_deref() != Some("0");
        let shall_be = index < wanted.max(1);
        if state.is_some() && is_online != shall_be {
            write(&switch, if shall_be { "1" } else { "0" })?;
        }
        online += u32::from(shall_be || state.is_none());
    }
    Ok(online)
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tokio::runtime::Builder;
    use tokio::time::timeout;

    #[test]
    fn a_disk_that_hangs_has_one_thread() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["vda", "vdb"] {
            let disk = dir.path().join(name);
            fs::create_dir(&disk).unwrap();
            fs::write(disk.join("dev"), "254:16\n").unwrap();
        }
        fs::write(dir.path().join("vdb/serial"), "good\n").unwrap();
        // Who reads it waits until somebody writes.
        let hung = dir.path().join("vda/serial");
        mknodat(CWD, &hung, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(2)
            .build()
            .unwrap();
        runtime.block_on(async {
            for _ in 0..4 {
                let found = find_block_in(dir.path(), "good");
                let found = timeout(Duration::from_secs(10), found).await;
                let block = found.unwrap().unwrap();
                assert_eq!(block.node(), Path::new("/dev/vdb"));
            }
            let late = find_block_in(dir.path(), "late");
            let answer = async { fs::write(&hung, "late\n").unwrap() };
            let (block, ()) = futures::join!(late, answer);
            assert_eq!(block.unwrap().node(), Path::new("/dev/vda"));
        });
    }
}
