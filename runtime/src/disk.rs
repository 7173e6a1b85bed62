//! Disks of a pod's machine. A block device of the node becomes one disk, and so
//! does an image, however many containers use it: in the guest they then share
//! its cache.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

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
    count: Arc<()>,
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

/// A container's use of a disk.
#[derive(Debug)]
pub struct DiskUse {
    disk: Arc<PodDisk>,
    key: Option<Key>,
    disks: Arc<PodDisks>,
}

#[derive(Debug)]
struct PodDisk {
    serial: String,
    file: OwnedFd,
    read_only: bool,
    plugged: OnceCell<()>,
    _counted: Arc<()>,
}

impl PodDisks {
    /// A disk of one container.
    pub fn add(self: &Arc<Self>, file: OwnedFd, read_only: bool) -> DiskUse {
        DiskUse {
            disk: self.new_disk(file, read_only),
            key: None,
            disks: Arc::clone(self),
        }
    }

    /// The disk that stands on `backing`; `open` opens it when it is none yet.
    ///
    /// # Errors
    /// As `open` says.
    pub fn share(
        self: &Arc<Self>,
        backing: Backing,
        read_only: bool,
        open: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<DiskUse> {
        self.share_in(&mut self.lock(), (backing, read_only), open)
    }

    /// The disks that images are, which nobody writes to; none when the pod would
    /// have more than `most` disks then.
    pub fn share_images(
        self: &Arc<Self>,
        images: Vec<(Backing, OwnedFd)>,
        most: usize,
    ) -> Option<Vec<DiskUse>> {
        let mut shared = self.lock();
        let is_new = |backing: &Backing| {
            let known = shared.get(&(*backing, true)).and_then(Weak::upgrade);
            known.is_none()
        };
        let new = images.iter().filter(|(backing, _)| is_new(backing)).count();
        if Arc::strong_count(&self.count) - 1 + new > most {
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
        self: &Arc<Self>,
        shared: &mut BTreeMap<Key, Weak<PodDisk>>,
        key: Key,
        open: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<DiskUse> {
        let disk = match shared.get(&key).and_then(Weak::upgrade) {
            Some(disk) => disk,
            None => {
                let disk = self.new_disk(open()?, key.1);
                shared.insert(key, Arc::downgrade(&disk));
                disk
            }
        };
        Ok(DiskUse {
            disk,
            key: Some(key),
            disks: Arc::clone(self),
        })
    }

    fn new_disk(&self, file: OwnedFd, read_only: bool) -> Arc<PodDisk> {
        // Serials are not used again: the guest may still know the old ones.
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        Arc::new(PodDisk {
            serial: format!("disk-{number}"),
            file,
            read_only,
            plugged: OnceCell::new(),
            _counted: Arc::clone(&self.count),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Weak<PodDisk>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DiskUse {
    /// By which the guest finds it.
    pub fn serial(&self) -> &str {
        &self.disk.serial
    }

    /// For a machine that is about to boot.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn for_boot(&self) -> io::Result<Disk> {
        let disk = self.disk.for_machine()?;
        // It is when it has booted, and otherwise there is no machine.
        let _ = self.disk.plugged.set(());
        Ok(disk)
    }

    /// Plugs it into a running machine, unless another container's use has.
    ///
    /// # Errors
    /// The machine or its guest could not.
    pub async fn plug(&self, vm: &Vm, agent: &Agent) -> Result<(), Error> {
        let plug = || async {
            vm.add_disk(self.disk.for_machine().map_err(Error::Disk)?)
                .await?;
            agent.rescan_devices().await?;
            Ok::<_, Error>(())
        };
        self.disk.plugged.get_or_try_init(plug).await?;
        Ok(())
    }

    /// Gives it up; unplugged by the last who does.
    pub async fn give_up(self, machine: Option<(&Vm, &Agent)>) {
        let Self { disk, key, disks } = self;
        let serial = disk.serial.clone();
        let is_last = {
            // Who comes next finds either no disk or one that stays.
            let mut shared = disks.lock();
            let is_last = Arc::strong_count(&disk) == 1;
            if is_last && let Some(key) = key {
                shared.remove(&key);
            }
            drop(disk);
            is_last
        };
        if let (true, Some((vm, agent))) = (is_last, machine) {
            // A machine that cannot is about to end or has ended.
            if let Err(error) = agent.remove_disk(&serial).await {
                tracing::warn!(serial, %error, "disk");
            }
            if let Err(error) = vm.remove_device(serial.clone()).await {
                tracing::warn!(serial, %error, "disk");
            }
        }
    }
}

impl PodDisk {
    fn for_machine(&self) -> io::Result<Disk> {
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

    const DISK: Backing = Backing::Device(7);

    fn open() -> io::Result<OwnedFd> {
        Ok(File::open("/dev/null")?.into())
    }

    #[tokio::test]
    async fn a_device_is_one_disk_as_long_as_it_is_used() {
        let disks = Arc::new(PodDisks::default());
        let first = disks.share(DISK, false, open).unwrap();
        let never = || Err(io::Error::other("opened again"));
        let second = disks.share(DISK, false, never).unwrap();
        assert_eq!(first.serial(), second.serial());
        let fixed = disks.share(DISK, true, open).unwrap();
        assert_ne!(first.serial(), fixed.serial());
        first.give_up(None).await;
        let third = disks.share(DISK, false, never).unwrap();
        assert_eq!(second.serial(), third.serial());
        second.give_up(None).await;
        let before = third.serial().to_owned();
        third.give_up(None).await;
        assert_ne!(disks.share(DISK, false, open).unwrap().serial(), before);
        // One that was dropped without a word leaves nothing either.
        drop(disks.share(Backing::Device(8), false, open).unwrap());
        disks.share(Backing::Device(8), false, open).unwrap();
    }

    #[test]
    fn a_device_that_cannot_be_opened_is_none() {
        let disks = Arc::new(PodDisks::default());
        let refused = || Err(io::Error::from(io::ErrorKind::PermissionDenied));
        assert!(disks.share(DISK, false, refused).is_err());
        assert_eq!(disks.share(DISK, false, open).unwrap().serial(), "disk-1");
        assert_eq!(disks.add(open().unwrap(), true).serial(), "disk-2");
    }

    #[tokio::test]
    async fn images_are_shared_as_far_as_there_is_room() {
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
        for used in first {
            used.give_up(None).await;
        }
        drop(own);
        let third = disks.share_images(vec![image("d")], 3).unwrap();
        assert_eq!(serials(&third), ["disk-5"]);
        assert!(Backing::of(&File::open(dir.path()).unwrap()).is_err());
    }
}
