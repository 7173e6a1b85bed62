//! What is mounted in the guest before a container uses it, and its undoing.

mod huge_pages;
mod mounting;

use std::fs;
use std::future::ready;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use husk_protocol::agent::{OverlayStorage, Storage, TmpfsStorage, storage};
use husk_protocol::path;
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, openat};
use rustix::mount::{UnmountFlags, unmount};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::device::{self, Block};
use crate::error::{Doing, Error, OsError};
use crate::init::InitError;
use crate::init::mount_options::{MountOptions, Recursion};
use crate::init::mounts;
pub use mounting::{mount_all, mount_all_for};

/// How long a device that the host has plugged may take to appear.
const DEADLINE: Duration = Duration::from_secs(10);

/// A block device that nobody has.
const NO_DEVICE: u64 = 0;

/// A storage that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("storage at {mount_point:?}: {reason}")]
    Invalid {
        mount_point: String,
        reason: &'static str,
    },
    #[error("{device} did not appear within {seconds} s")]
    Deadline { device: String, seconds: u64 },
    #[error("storage at {mount_point:?} was not mounted within {seconds} s")]
    Unanswered { mount_point: String, seconds: u64 },
    #[error("storage at {mount_point:?}")]
    Mount {
        mount_point: String,
        #[source]
        source: InitError,
    },
    #[error(transparent)]
    Os(#[from] OsError),
}

/// A mounted storage: what has to be undone.
#[derive(Debug)]
pub struct Mounted {
    mount_point: PathBuf,
    kind: Kind,
    /// Directories made on the way, outermost first.
    directories: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Mount,
    File,
    Node,
    /// Others have it as well; it stays.
    Kept,
}

/// Undoes all, last first. What can't be undone is logged: nobody could do
/// more about it.
pub async fn unmount_all(mounted: Vec<Mounted>) {
    let undone = tokio::task::spawn_blocking(move || {
        for storage in mounted.iter().rev() {
            storage.undo();
        }
    });
    if let Err(error) = undone.await {
        log::error!("unmounting: {error}");
    }
}

/// Looks at these paths, those below the shared tree, so that the kernel mounts
/// what is mounted there on the host. Left to the containers it would do so in
/// each one's mount namespace, and they would share neither sockets nor locks
/// nor mapped memory.
pub async fn reach_shared(paths: Vec<PathBuf>) {
    let looking = tokio::task::spawn_blocking(move || {
        let shared = Path::new(path::SHARED);
        for path in paths.iter().filter(|path| path.starts_with(shared)) {
            // One that is not there is told of when the container mounts it.
            let _ = fs::metadata(path);
        }
    });
    if let Err(error) = looking.await {
        log::error!("looking at the shared tree: {error}");
    }
}

/// Unmounts what the shared tree's submounts have mounted at these paths by
/// themselves, so that the host may take the files away.
pub async fn unmount_shared(paths: Vec<String>) -> Result<(), Error> {
    let shared = Path::new(path::SHARED);
    let plain = |path: &Path| {
        path.components()
            .all(|part| !matches!(part, Component::ParentDir))
    };
    for path in &paths {
        let path = Path::new(path);
        if path == shared || !path.starts_with(shared) || !plain(path) {
            return Err(Error::Invalid {
                field: "unused_paths",
                reason: format!("{} is not below {}", path.display(), path::SHARED),
            });
        }
    }
    let unmounting = tokio::task::spawn_blocking(move || {
        for path in paths {
            match unmount(&path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
                // Nobody has ever looked into it.
                Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
                Err(errno) => log::warn!("cannot unmount {path}: {errno}"),
            }
        }
    });
    Ok(unmounting
        .await
        .map_err(io::Error::other)
        .doing("unmount", "the shared tree")?)
}

/// Finds what it needs, then has another thread mount it: that may wait for a device
/// or a server.
async fn begin_mount(
    storage: Storage,
) -> Result<JoinHandle<Result<Mounted, StorageError>>, StorageError> {
    let mount_point = PathBuf::from(&storage.mount_point);
    let invalid = |reason| StorageError::Invalid {
        mount_point: storage.mount_point.clone(),
        reason,
    };
    let plain = mount_point
        .components()
        .all(|part| !matches!(part, std::path::Component::ParentDir));
    if !mount_point.is_absolute() || !plain || mount_point.parent().is_none() {
        return Err(invalid("not an absolute path"));
    }
    let source = match storage.source.clone().ok_or_else(|| invalid("no source"))? {
        storage::Source::Block(block) => {
            let device = match (block.serial.as_str(), block.fstype.as_str()) {
                ("", "") => None,
                (serial, _) => Some(find_disk(serial).await?),
            };
            match device {
                Some(device) if !block.fstype.is_empty() => Source::filesystem(
                    &block.fstype,
                    Some(device.node().display().to_string()),
                    vec![],
                ),
                device => Source::Node(device.map_or(NO_DEVICE, |device| device.number())),
            }
        }
        storage::Source::VirtioFs(fs) => {
            find_virtio_fs(&fs.tag).await?;
            Source::filesystem("virtiofs", Some(fs.tag), vec![])
        }
        storage::Source::Tmpfs(tmpfs) => Source::filesystem("tmpfs", None, tmpfs_data(&tmpfs)),
        storage::Source::Overlay(overlay) => {
            Source::filesystem("overlay", None, overlay_data(&overlay))
        }
        storage::Source::Bind(bind) => Source::Bind(PathBuf::from(bind.source)),
        storage::Source::HugePages(pages) => {
            Source::filesystem("hugetlbfs", None, huge_pages::data(&pages))
        }
        _ => return Err(invalid("unknown kind")),
    };
    let is_of_pod = storage.has_huge_pages();
    Ok(tokio::task::spawn_blocking(move || match is_of_pod {
        true => huge_pages::attach(source, mount_point, &storage),
        false => source.attach(mount_point, &storage.options),
    }))
}

/// The disk of this serial, which the host may just have plugged.
pub async fn find_disk(serial: &str) -> Result<Block, StorageError> {
    let find = || device::find_block(serial);
    let found = device::wait_for(DEADLINE, find).await;
    let found = found.doing("find block device", serial)?;
    found.ok_or_else(|| absent(serial))
}

/// The disk of this serial, if it is there now.
pub async fn find_present_disk(serial: &str) -> Result<Option<Block>, StorageError> {
    let found = timeout(DEADLINE, device::find_block(serial)).await;
    found.map_err(|_| absent(serial))
}

fn absent(serial: &str) -> StorageError {
    StorageError::Deadline {
        device: format!("block device {serial:?}"),
        seconds: DEADLINE.as_secs(),
    }
}

async fn find_virtio_fs(tag: &str) -> Result<(), StorageError> {
    let find = || ready(device::find_virtio_fs(tag));
    let found = device::wait_for(DEADLINE, find).await;
    let found = found.doing("find virtio-fs", tag)?;
    found.map(|_| ()).ok_or_else(|| StorageError::Deadline {
        device: format!("virtio-fs {tag:?}"),
        seconds: DEADLINE.as_secs(),
    })
}

fn tmpfs_data(tmpfs: &TmpfsStorage) -> Vec<(String, String)> {
    let mut data = Vec::new();
    if tmpfs.size_bytes != 0 {
        data.push(("size".to_owned(), tmpfs.size_bytes.to_string()));
    }
    if tmpfs.mode != 0 {
        data.push(("mode".to_owned(), format!("{:o}", tmpfs.mode & 0o7777)));
    }
    data
}

fn overlay_data(overlay: &OverlayStorage) -> Vec<(String, String)> {
    // One option a layer: no escaping, and no bound on their sum.
    let layers = overlay.lower.iter();
    let mut data: Vec<_> = layers
        .map(|path| ("lowerdir+".to_owned(), path.clone()))
        .collect();
    if !overlay.upper.is_empty() {
        data.push(("upperdir".to_owned(), overlay.upper.clone()));
        data.push(("workdir".to_owned(), overlay.work.clone()));
    }
    data
}

/// What is mounted, once its device is there.
#[derive(Debug)]
enum Source {
    Filesystem {
        fstype: String,
        source: Option<String>,
        data: Vec<(String, String)>,
    },
    Bind(PathBuf),
    /// By its number.
    Node(u64),
}

impl Source {
    fn filesystem(fstype: &str, source: Option<String>, data: Vec<(String, String)>) -> Self {
        Self::Filesystem {
            fstype: fstype.to_owned(),
            source,
            data,
        }
    }

    fn attach(self, mount_point: PathBuf, options: &[String]) -> Result<Mounted, StorageError> {
        let mut mounted = Mounted {
            directories: make_directories(mount_point.parent().unwrap_or(Path::new("/")))?,
            mount_point,
            kind: Kind::Mount,
        };
        match self.attach_at(&mut mounted, options) {
            Ok(()) => Ok(mounted),
            Err(source) => {
                mounted.remove_names();
                Err(StorageError::Mount {
                    mount_point: mounted.mount_point.display().to_string(),
                    source,
                })
            }
        }
    }

    fn attach_at(self, mounted: &mut Mounted, options: &[String]) -> Result<(), InitError> {
        let at = mounted.mount_point.clone();
        let mut options = MountOptions::parse(options.iter().map(String::as_str));
        let tree = match self {
            Self::Node(number) => {
                mounted.kind = Kind::Node;
                let mode = Mode::from_raw_mode(0o600);
                mknodat(CWD, &at, FileType::BlockDevice, mode, number)
                    .doing("make", at.display())?;
                return Ok(());
            }
            Self::Bind(source) => {
                let tree = mounts::clone_tree(&source, options.bind.unwrap_or(Recursion::Tree))?;
                let metadata = fs::metadata(&source).doing("stat", source.display())?;
                if metadata.is_dir() {
                    mounted.directories.extend(make_directories(&at)?);
                } else {
                    mounted.kind = Kind::File;
                    let open = fs::OpenOptions::new().create(true).append(true).open(&at);
                    open.doing("make", at.display())?;
                }
                mounts::set_attributes(&tree, options.attributes, Recursion::Alone)
                    .doing("set the attributes of", at.display())?;
                tree
            }
            Self::Filesystem {
                fstype,
                source,
                data,
            } => {
                mounted.directories.extend(make_directories(&at)?);
                // Of the file system too, not of this mount alone: a read-only
                // disk can't be had otherwise.
                if options.attributes.set & rustix::mount::MountAttrFlags::MOUNT_ATTR_RDONLY.bits()
                    != 0
                {
                    options.data.push("ro".to_owned());
                }
                let pairs = data.iter().map(|(key, value)| format!("{key}={value}"));
                options.data.splice(0..0, pairs);
                mounts::new_filesystem(&fstype, source.as_deref().map(Path::new), &options, &at)?
            }
        };
        let target: OwnedFd = openat(CWD, &at, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .doing("open", at.display())?;
        mounts::attach(&tree, &target).doing("mount", at.display())?;
        mounts::set_attributes(&tree, options.recursive, Recursion::Tree)
            .doing("set the attributes of", at.display())?;
        for (propagation, recursion) in options.propagation {
            mounts::set_propagation(&tree, propagation, recursion)
                .doing("set the propagation of", at.display())?;
        }
        Ok(())
    }
}

impl Mounted {
    fn undo(&self) {
        if self.kind == Kind::Kept {
            return;
        }
        if self.kind != Kind::Node {
            let path = &self.mount_point;
            let unmounted = match unmount(path, UnmountFlags::NOFOLLOW) {
                Err(rustix::io::Errno::BUSY) => {
                    log::warn!("{} is still in use", path.display());
                    unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
                }
                unmounted => unmounted,
            };
            if let Err(errno) = unmounted {
                log::error!("cannot unmount {}: {errno}", path.display());
            }
        }
        self.remove_names();
    }

    fn remove_names(&self) {
        if self.kind != Kind::Mount {
            // It may be missing: also called when its making failed.
            let _ = fs::remove_file(&self.mount_point);
        }
        for directory in self.directories.iter().rev() {
            // Others may have put something into it.
            let _ = fs::remove_dir(directory);
        }
    }
}

/// Makes a directory and its parents; returns those that were missing.
fn make_directories(path: &Path) -> Result<Vec<PathBuf>, OsError> {
    let mut missing: Vec<PathBuf> = path
        .ancestors()
        .take_while(|path| !path.exists())
        .map(Path::to_owned)
        .collect();
    missing.reverse();
    for path in &missing {
        match fs::create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.doing("make", path.display())?,
        }
    }
    Ok(missing)
}
