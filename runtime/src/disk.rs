//! Disks of a pod's machine. A block device of the node becomes one disk, and so
//! does an image, however many containers use it: in the guest they then share
//! its cache.

mod stands_on;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use husk_protocol::agent::DeviceNumber;
use rustix::fs::{FileType, fstat};
use tokio::sync::OnceCell;

use crate::agent_client::Agent;
use crate::error::Error;
use crate::vm_plan::Disk;
use crate::vm_process::Vm;

/// All disks of a pod.
#[derive(Debug, Default)]
pub struct PodDisks {
    last: AtomicU32,
    shared: Mutex<BTreeMap<Key, Weak<PodDisk>>>,
    /// Each disk has one.
    told: Arc<Mutex<Told>>,
    /// Held by who takes them from the machine.
    unplugging: tokio::sync::Mutex<()>,
}

/// Serials of disks that the machine was told of.
#[derive(Debug, Default)]
struct Told {
    /// Nobody uses them any more.
    unused: Vec<String>,
    /// It may write to them: it has not said that they are gone.
    writable: BTreeSet<String>,
}

/// What makes two disks the same; and whether it is read-only.
type Key = (Backing, bool);

/// What a disk stands on, as long as it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backing {
    /// A block device of the node, by its number.
    Device(u64),
    /// A file.
    File {
        /// Of the file system.
        device: u64,
        /// In it.
        inode: u64,
    },
}

impl Backing {
    /// Of an open file or device.
    ///
    /// # Errors
    /// It is neither.
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        match metadata.file_type() {
            kind if kind.is_block_device() => Ok(Self::Device(metadata.rdev())),
            kind if kind.is_file() => Ok(Self::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            }),
            _ => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        }
    }
}

/// A container's use of a disk, until it is dropped. What the last one leaves has
/// to be taken from the machine ([`PodDisks::unplug_unused`]).
#[derive(Debug)]
pub struct DiskUse(Arc<PodDisk>);

#[derive(Debug)]
struct PodDisk {
    serial: String,
    file: OwnedFd,
    read_only: bool,
    plugged: OnceCell<()>,
    /// The machine has been told of it.
    was_told: AtomicBool,
    told: Arc<Mutex<Told>>,
}

impl Drop for PodDisk {
    fn drop(&mut self) {
        if *self.was_told.get_mut() {
            locked(&self.told)
                .unused
                .push(std::mem::take(&mut self.serial));
        }
    }
}

fn locked(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PodDisks {
    /// A disk of one container.
    pub fn add(&self, file: OwnedFd, read_only: bool) -> DiskUse {
        DiskUse(self.new_disk(file, read_only))
    }

    /// The disk that stands on `backing`; `open` opens it when it is none yet.
    ///
    /// # Errors
    /// As `open` says.
    pub fn share(
        &self,
        backing: Backing,
        read_only: bool,
        open: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<DiskUse> {
        self.share_in(&mut self.lock(), (backing, read_only), open)
    }

    /// The disks that images are, which nobody writes to; none when the pod would
    /// have more than `most` disks then.
    pub fn share_images(
        &self,
        images: Vec<(Backing, OwnedFd)>,
        most: usize,
    ) -> Option<Vec<DiskUse>> {
        let mut shared = self.lock();
        let is_new = |backing: &Backing| {
            let known = shared.get(&(*backing, true)).and_then(Weak::upgrade);
            known.is_none()
        };
        let new = images.iter().filter(|(backing, _)| is_new(backing)).count();
        if Arc::strong_count(&self.told) - 1 + new > most {
            return None;
        }
        images
            .into_iter()
            .map(|(backing, file)| {
                self.share_in(&mut shared, (backing, true), || Ok(file))
                    .ok()
            })
            .collect()
    }

    fn share_in(
        &self,
        shared: &mut BTreeMap<Key, Weak<PodDisk>>,
        key: Key,
        open: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<DiskUse> {
        let disk = match shared.get(&key).and_then(Weak::upgrade) {
            Some(disk) => disk,
            None => {
                let disk = self.new_disk(open()?, key.1);
                shared.retain(|_, disk| disk.strong_count() > 0);
                shared.insert(key, Arc::downgrade(&disk));
                disk
            }
        };
        Ok(DiskUse(disk))
    }

    fn new_disk(&self, file: OwnedFd, read_only: bool) -> Arc<PodDisk> {
        // Serials are not used again: the guest may still know the old ones.
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        Arc::new(PodDisk {
            serial: format!("disk-{number}"),
            file,
            read_only,
            plugged: OnceCell::new(),
            was_told: AtomicBool::new(false),
            told: Arc::clone(&self.told),
        })
    }

    /// Takes from the machine what nobody uses any more.
    pub async fn unplug_unused(&self, vm: &Vm, agent: &Agent) {
        // What somebody else is taking shall be gone as well when this returns.
        let _turn = self.unplugging.lock().await;
        let serials = std::mem::take(&mut locked(&self.told).unused);
        for serial in serials {
            // A machine that cannot is about to end or has ended.
            if let Err(error) = agent.remove_disk(&serial).await {
                tracing::warn!(serial, %error, "disk");
            }
            match vm.remove_device(serial.clone()).await {
                Ok(()) => drop(locked(&self.told).writable.remove(&serial)),
                // It has none of this name, or cannot let go of it.
                Err(error) => tracing::warn!(serial, %error, "disk"),
            }
        }
    }

    /// The machine has a disk to which it may write, as far as is known.
    pub fn may_be_written(&self) -> bool {
        !locked(&self.told).writable.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Weak<PodDisk>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DiskUse {
    /// By which the guest finds it.
    pub fn serial(&self) -> &str {
        &self.0.serial
    }

    /// The node's devices that it stands on, for the agent: what is said of I/O to
    /// those is said of this disk, too.
    pub fn stands_on(&self) -> Vec<DeviceNumber> {
        let Ok(stat) = fstat(&self.0.file) else {
            return Vec::new();
        };
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        let number = if is_device { stat.st_rdev } else { stat.st_dev };
        let devices = stands_on::devices(Path::new(stands_on::SYS), number);
        let tell = |(major, minor)| {
            let mut number = DeviceNumber {
                major,
                minor,
                io_only: true,
                ..DeviceNumber::default()
            };
            number.set_block_serial(self.serial().to_owned());
            number
        };
        devices.into_iter().map(tell).collect()
    }

    /// For a machine that is about to boot.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn for_boot(&self) -> io::Result<Disk> {
        let disk = self.0.for_machine()?;
        // It is when it has booted, and otherwise there is no machine.
        let _ = self.0.plugged.set(());
        Ok(disk)
    }

    /// Plugs it into a running machine, unless another container's use has.
    ///
    /// # Errors
    /// The machine or its guest could not.
    pub async fn plug(&self, vm: &Vm, agent: &Agent) -> Result<(), Error> {
        let plug = || async {
            vm.add_disk(self.0.for_machine().map_err(Error::Disk)?)
                .await?;
            agent.rescan_devices().await?;
            Ok::<_, Error>(())
        };
        self.0.plugged.get_or_try_init(plug).await?;
        Ok(())
    }
}

impl PodDisk {
    fn for_machine(&self) -> io::Result<Disk> {
        self.was_told.store(true, Ordering::Relaxed);
        if !self.read_only {
            locked(&self.told).writable.insert(self.serial.clone());
        }
        Ok(Disk {
            serial: self.serial.clone(),
            file: self.file.try_clone()?,
            read_only: self.read_only,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const DISK: Backing = Backing::Device(7);

    fn open() -> io::Result<OwnedFd> {
        Ok(File::open("/dev/null")?.into())
    }

    #[test]
    fn a_device_is_one_disk_as_long_as_it_is_used() {
        let disks = Arc::new(PodDisks::default());
        let first = disks.share(DISK, false, open).unwrap();
        let never = || Err(io::Error::other("opened again"));
        let second = disks.share(DISK, false, never).unwrap();
        assert_eq!(first.serial(), second.serial());
        let fixed = disks.share(DISK, true, open).unwrap();
        assert_ne!(first.serial(), fixed.serial());
        drop(first);
        let third = disks.share(DISK, false, never).unwrap();
        assert_eq!(second.serial(), third.serial());
        drop(second);
        let before = third.serial().to_owned();
        drop(third);
        assert_ne!(disks.share(DISK, false, open).unwrap().serial(), before);
    }

    #[test]
    fn what_the_last_use_leaves_is_known() {
        let disks = Arc::new(PodDisks::default());
        let unused = || disks.told.lock().unwrap().unused.clone();
        // Of a creation that failed before the machine heard of it.
        drop(disks.share(DISK, false, open).unwrap());
        let first = disks.share(DISK, false, open).unwrap();
        first.for_boot().unwrap();
        // One fails while the other is being deleted.
        let failing = disks.share(DISK, false, open).unwrap();
        drop(first);
        assert!(unused().is_empty());
        drop(failing);
        assert_eq!(unused(), ["disk-2"]);
    }

    #[tokio::test]
    async fn the_machine_may_write_until_it_has_said_that_a_disk_is_gone() {
        let (near, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let agent = Agent::new(near, Config::default().patience()).unwrap();
        let disks = Arc::new(PodDisks::default());
        let give = |read_only| disks.add(open().unwrap(), read_only).for_boot().unwrap();
        give(true);
        assert!(!disks.may_be_written());
        give(false);
        assert!(disks.may_be_written());
        let (vm, _asked) = Vm::pretended(|_| Ok(()));
        disks.unplug_unused(&vm, &agent).await;
        assert!(!disks.may_be_written());
        give(false);
        let (vm, _asked) = Vm::pretended(|_| Err("its worker does not end".into()));
        disks.unplug_unused(&vm, &agent).await;
        assert!(disks.may_be_written());
    }

    #[test]
    fn a_device_that_cannot_be_opened_is_none() {
        let disks = Arc::new(PodDisks::default());
        let refused = || Err(io::Error::from(io::ErrorKind::PermissionDenied));
        assert!(disks.share(DISK, false, refused).is_err());
        assert_eq!(disks.share(DISK, false, open).unwrap().serial(), "disk-1");
        assert_eq!(disks.add(open().unwrap(), true).serial(), "disk-2");
    }

    #[test]
    fn images_are_shared_as_far_as_there_is_room() {
        let dir = tempfile::tempdir().unwrap();
        let image = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, "").unwrap();
            let file = File::open(path).unwrap();
            (Backing::of(&file).unwrap(), OwnedFd::from(file))
        };
        let disks = Arc::new(PodDisks::default());
        let serials = |uses: &[DiskUse]| -> Vec<_> {
            uses.iter().map(|used| used.serial().to_owned()).collect()
        };
        let first = disks.share_images(vec![image("a"), image("b")], 3).unwrap();
        assert_eq!(serials(&first), ["disk-1", "disk-2"]);
        // What is there already needs no room.
        let second = disks.share_images(vec![image("b"), image("c")], 3).unwrap();
        assert_eq!(serials(&second), ["disk-2", "disk-3"]);
        assert!(
            disks
                .share_images(vec![image("a"), image("d")], 3)
                .is_none()
        );
        let own = disks.add(open().unwrap(), false);
        assert!(disks.share_images(vec![image("d")], 4).is_none());
        drop((first, own));
        let third = disks.share_images(vec![image("d")], 3).unwrap();
        assert_eq!(serials(&third), ["disk-5"]);
        assert!(Backing::of(&File::open(dir.path()).unwrap()).is_err());
    }
}
