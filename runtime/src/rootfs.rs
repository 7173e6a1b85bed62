//! A container's root file system: what the snapshotter hands over decides how
//! it reaches the guest. Directories are mounted into the shared tree, block
//! devices and images become disks; an overlay over images that the node has
//! mounted is made in the guest, over disks of them (`layers`).

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use husk_protocol::agent::{BlockStorage, Storage};
use husk_protocol::path;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use ttrpc::Code;

use crate::host_mount::{self, HostMount};
use crate::id::Id;
use crate::shared_tree::{ContainerTree, ROOTFS, SharedTreeError};

pub mod layers;

/// File systems that the guest mounts itself from a disk.
const DISK_FILE_SYSTEMS: [&str; 4] = ["ext4", "xfs", "erofs", "btrfs"];

/// How a root file system reaches the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootfsPlan {
    /// Through the shared tree.
    Tree(Vec<TreeMount>),
    /// As a disk.
    Disk(DiskMount),
}

/// A mount as containerd asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeMount {
    kind: String,
    source: PathBuf,
    target: String,
    options: Vec<String>,
}

/// A file system on a block device or in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskMount {
    source: PathBuf,
    fstype: String,
    options: Vec<String>,
}

/// A root file system that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// It is not there.
    #[error("root file system {path}")]
    Missing {
        /// Where it should be.
        path: PathBuf,
        /// Why it is not.
        #[source]
        source: io::Error,
    },
    /// It is no directory.
    #[error("root file system {0} is no directory")]
    NoDirectory(PathBuf),
    /// The kernel refuses to mount it.
    #[error("mounting the root file system, type {kind}, from {path}")]
    Mount {
        /// File system type.
        kind: String,
        /// From where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A disk among several mounts.
    #[error("several mounts with a block device among them are not supported as root file system")]
    Mixed,
    /// A target that is not in the root.
    #[error("root file system's mount has the target {0:?}, which is not there in the root")]
    Target(String),
    /// The shared tree.
    #[error(transparent)]
    Tree(#[from] SharedTreeError),
}

impl RootfsError {
    /// What containerd is told.
    pub fn code(&self) -> Code {
        match self {
            Self::Missing { .. } => Code::NOT_FOUND,
            Self::NoDirectory(_) | Self::Target(_) => Code::INVALID_ARGUMENT,
            Self::Mixed => Code::UNIMPLEMENTED,
            Self::Mount { .. } | Self::Tree(_) => Code::UNKNOWN,
        }
    }
}

impl RootfsPlan {
    /// What to do for the mounts of a request; without any, the directory at
    /// `root` is the root file system.
    ///
    /// # Errors
    /// The mounts are of a form that we do not serve.
    pub fn new(mounts: &[Mount], root: PathBuf) -> Result<Self, RootfsError> {
        match mounts {
            [] => Ok(Self::Tree(vec![TreeMount {
                kind: "bind".to_owned(),
                source: root,
                target: String::new(),
                options: vec!["rbind".to_owned()],
            }])),
            [mount] if is_disk(mount) => Ok(Self::Disk(DiskMount {
                source: PathBuf::from(&mount.source),
                fstype: mount.type_.clone(),
                options: mount.options.clone(),
            })),
            mounts if mounts.iter().any(is_disk) => Err(RootfsError::Mixed),
            mounts => Ok(Self::Tree(mounts.iter().map(tree_mount).collect())),
        }
    }
}

fn is_disk(mount: &Mount) -> bool {
    DISK_FILE_SYSTEMS.contains(&mount.type_.as_str())
}

fn tree_mount(mount: &Mount) -> TreeMount {
    TreeMount {
        kind: mount.type_.clone(),
        source: PathBuf::from(&mount.source),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

/// Mounts into the tree; the path of the root in the guest. Blocks.
///
/// # Errors
/// A source is not there or the kernel refuses.
pub fn mount_tree(tree: &mut ContainerTree, mounts: &[TreeMount]) -> Result<String, RootfsError> {
    let at = tree.add_root(ROOTFS)?;
    let (first, others) = match mounts {
        [first, others @ ..] if first.target.trim_matches('/').is_empty() => (first, others),
        mounts => {
            let target = mounts.first().map(|mount| mount.target.clone());
            return Err(RootfsError::Target(target.unwrap_or_default()));
        }
    };
    first.check_source()?;
    let root = HostMount::new(&first.kind, &first.source, &at, &first.options)
        .map_err(|source| first.failed(source))?;
    // With what is mounted in it below, also when that fails.
    let guest_root = tree.keep_root(root);
    for mount in others {
        mount.check_source()?;
        let target = open_below(&at, &mount.target)?;
        let target = PathBuf::from(format!("/proc/self/fd/{}", target.as_raw_fd()));
        host_mount::attach(&mount.kind, &mount.source, &target, &mount.options)
            .map_err(|source| mount.failed(source))?;
    }
    Ok(guest_root)
}

impl TreeMount {
    fn check_source(&self) -> Result<(), RootfsError> {
        match self.kind.as_str() {
            "bind" => check_directory(&self.source),
            _ => Ok(()),
        }
    }

    fn failed(&self, source: io::Error) -> RootfsError {
        RootfsError::Mount {
            kind: self.kind.clone(),
            path: self.source.clone(),
            source,
        }
    }
}

fn check_directory(path: &Path) -> Result<(), RootfsError> {
    let metadata = fs::metadata(path).map_err(|source| RootfsError::Missing {
        path: path.to_owned(),
        source,
    })?;
    if metadata.is_dir() {
        Ok(())
    } else {
        Err(RootfsError::NoDirectory(path.to_owned()))
    }
}

/// containerd says where in the root a mount goes, and the image what lies on
/// the way there: a symbolic link leads to a place in the root, as it will in
/// the guest.
fn open_below(root: &Path, target: &str) -> Result<OwnedFd, RootfsError> {
    let fail = |_| RootfsError::Target(target.to_owned());
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags | OFlags::DIRECTORY, Mode::empty()).map_err(fail)?;
    let beneath = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, target, flags, Mode::empty(), beneath).map_err(fail)
}

impl DiskMount {
    /// Opens the device or file.
    ///
    /// # Errors
    /// It is not there or not for us.
    pub fn open(&self) -> Result<OwnedFd, RootfsError> {
        let fail = |source| RootfsError::Missing {
            path: self.source.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(!self.read_only())
            .open(&self.source)
            .map_err(fail)?;
        let kind = file.metadata().map_err(fail)?.file_type();
        if kind.is_file() || kind.is_block_device() {
            Ok(file.into())
        } else {
            Err(fail(io::Error::from(io::ErrorKind::InvalidInput)))
        }
    }

    /// The guest may not write to it.
    pub fn read_only(&self) -> bool {
        self.fstype == "erofs" || self.options.iter().any(|option| option == "ro")
    }

    /// What the agent mounts, and where.
    pub fn storage(&self, serial: &str, container: &Id) -> (Storage, String) {
        let mount_point = format!("{}/{container}/{ROOTFS}", path::CONTAINERS);
        let mut storage = Storage {
            mount_point: mount_point.clone(),
            options: self.guest_options(),
            ..Storage::default()
        };
        storage.set_block(BlockStorage {
            serial: serial.to_owned(),
            fstype: self.fstype.clone(),
            ..BlockStorage::default()
        });
        (storage, mount_point)
    }

    fn guest_options(&self) -> Vec<String> {
        self.options
            .iter()
            .filter(|option| *option != "loop")
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared_tree::SharedTree;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|&o| o.to_owned()).collect(),
            ..Mount::default()
        }
    }

    fn plan(mounts: &[Mount]) -> Result<RootfsPlan, RootfsError> {
        RootfsPlan::new(mounts, "/bundle/rootfs".into())
    }

    #[test]
    fn binds_the_specs_root_without_mounts() {
        let Ok(RootfsPlan::Tree(mounts)) = plan(&[]) else {
            panic!("no tree");
        };
        assert_eq!(mounts[0].source, Path::new("/bundle/rootfs"));
        assert_eq!(mounts[0].kind, "bind");
    }

    #[test]
    fn shares_directories_and_attaches_disks() {
        let overlay = mount("overlay", "overlay", &["lowerdir=/a:/b"]);
        assert!(matches!(
            plan(std::slice::from_ref(&overlay)),
            Ok(RootfsPlan::Tree(_))
        ));
        let disk = mount("ext4", "/dev/mapper/x", &["ro", "loop", "noatime"]);
        let Ok(RootfsPlan::Disk(planned)) = plan(std::slice::from_ref(&disk)) else {
            panic!("no disk");
        };
        assert!(planned.read_only());
        let id = Id::new("container", "c").unwrap();
        let (storage, root) = planned.storage("disk-1", &id);
        assert_eq!(root, "/run/husk/containers/c/rootfs");
        assert_eq!(storage.options, ["ro", "noatime"]);
        assert_eq!(storage.block().serial, "disk-1");
        assert!(matches!(plan(&[disk, overlay]), Err(RootfsError::Mixed)));
    }

    #[test]
    fn names_a_root_that_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let id = Id::new("container", "c").unwrap();
        let mut tree = ContainerTree::create(&SharedTree::pretended(dir.path()), &id).unwrap();
        let Ok(RootfsPlan::Tree(mounts)) = RootfsPlan::new(&[], "/no/such/root".into()) else {
            panic!("no tree");
        };
        let error = mount_tree(&mut tree, &mounts).unwrap_err();
        assert_eq!(error.code(), Code::NOT_FOUND);
        assert!(error.to_string().contains("/no/such/root"));
    }

    #[test]
    fn keeps_targets_below_the_root() {
        if !host_mount::own_namespace() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let [image, data, outside] = ["image", "data", "outside"].map(|name| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        });
        std::os::unix::fs::symlink(&outside, image.join("link")).unwrap();
        let inside = image.join(outside.strip_prefix("/").unwrap());
        fs::create_dir_all(&inside).unwrap();
        fs::write(data.join("file"), "text").unwrap();
        let id = Id::new("container", "c").unwrap();
        let shared = SharedTree::create(&dir.path().join("pod/tree")).unwrap();
        let bind = |source: &Path, target: &str| TreeMount {
            kind: "bind".to_owned(),
            source: source.to_owned(),
            target: target.to_owned(),
            options: Vec::new(),
        };
        let mut tree = ContainerTree::create(&shared, &id).unwrap();
        let mounts = [bind(&image, "/"), bind(&data, "/link")];
        let guest = mount_tree(&mut tree, &mounts).unwrap();
        assert_eq!(guest, "/run/husk/shared/c/rootfs");
        let root = shared.path().join("c/rootfs");
        let shown = root.join(outside.strip_prefix("/").unwrap()).join("file");
        assert!(shown.exists());
        assert!(!outside.join("file").exists() && !inside.join("file").exists());
        drop(tree);
        assert!(!root.exists());

        for mounts in [
            vec![bind(&image, "/below")],
            vec![bind(&image, ""), bind(&data, "/none")],
        ] {
            let mut tree = ContainerTree::create(&shared, &id).unwrap();
            let error = mount_tree(&mut tree, &mounts).unwrap_err();
            assert!(matches!(error, RootfsError::Target(_)), "{error}");
        }
    }
}
