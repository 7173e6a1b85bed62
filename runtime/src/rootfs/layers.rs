//! A root of images: an overlay whose lower layers are EROFS images that the node
//! has mounted, as containerd's EROFS snapshotter prepares it. Each image becomes
//! a disk, one for all containers of the pod, and the guest mounts them and the
//! overlay itself. The writable layer stays the snapshotter's directory, which the
//! guest reaches through the shared tree.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_protocol::agent::{BlockStorage, OverlayStorage, Storage};
use husk_protocol::path;
use rustix::io::Errno;

use super::{RootfsError, TreeMount};
use crate::disk::{Backing, DiskUse, PodDisks};
use crate::host_mount::HostMount;
use crate::id::Id;
use crate::lower_layers;
use crate::mounts_below::unescaped;
use crate::shared_tree::{ContainerTree, LAYERS, ROOTFS};

/// Most images of one root: each disk that the guest has to find takes it some
/// milliseconds, and it takes a slot of the machine.
const IMAGES_MOST: usize = 8;

/// Most disks of a pod until no further images become disks: there are 32 slots
/// (`vmm/src/pci/bus.rs`), and volumes that are disks need some as well.
const DISKS_MOST: usize = 16;

/// What the guest and the machine are told of such a root.
#[derive(Debug)]
pub struct LayeredRoot {
    /// The images, one for each storage but the last.
    pub disks: Vec<DiskUse>,
    /// What the agent mounts.
    pub storages: Vec<Storage>,
    /// The root in the guest.
    pub root: String,
}

/// An overlay over images.
#[derive(Debug, PartialEq, Eq)]
struct Layers {
    /// Files or loop devices, the top layer's first.
    images: Vec<PathBuf>,
    upper: Option<Upper>,
    options: Vec<String>,
}

/// Where the overlay writes.
#[derive(Debug, PartialEq, Eq)]
struct Upper {
    /// The directory that holds both: renames between them take one mount.
    dir: PathBuf,
    upper: String,
    work: String,
}

/// Prepares a root of images; none when it is not one, or when there is no room
/// for the disks: it is then mounted on the node. Blocks.
///
/// # Errors
/// The writable layer cannot be mounted into the tree.
pub fn mount(
    tree: &mut ContainerTree,
    mounts: &[TreeMount],
    pod: &Arc<PodDisks>,
    container: &Id,
) -> Result<Option<LayeredRoot>, RootfsError> {
    let [mount] = mounts else {
        return Ok(None);
    };
    let Some(layers) = Layers::find(mount) else {
        return Ok(None);
    };
    let opened: io::Result<Vec<_>> = layers.images.iter().map(|path| open(path)).collect();
    let opened = match opened {
        Ok(opened) => opened,
        Err(error) => {
            tracing::warn!(%error, "layers stay on the node");
            return Ok(None);
        }
    };
    let Some(disks) = pod.share_images(opened, DISKS_MOST) else {
        return Ok(None);
    };
    let written = match &layers.upper {
        None => None,
        Some(Upper { dir, .. }) => {
            let at = tree.add_root(LAYERS)?;
            let bound = HostMount::new("bind", dir, &at, &[]);
            Some(tree.keep_root(bound.map_err(|source| mount.failed(source))?))
        }
    };
    let serials = disks.iter().map(DiskUse::serial);
    let (storages, root) = layers.storages(serials, written.as_deref(), container);
    Ok(Some(LayeredRoot {
        disks,
        storages,
        root,
    }))
}

fn open(path: &Path) -> io::Result<(Backing, OwnedFd)> {
    let file = File::open(path)?;
    let mut head = [0; SUPER_BLOCK_BYTES];
    file.read_exact_at(&mut head, SUPER_BLOCK_AT)?;
    if !is_for_guest(&head) {
        let text = format!("{} is no image that every guest can mount", path.display());
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    Ok((Backing::of(&file)?, file.into()))
}

/// Where an image's super block is, and how much of it is looked at
/// (`fs/erofs/erofs_fs.h` of Linux).
const SUPER_BLOCK_AT: u64 = 1024;
const SUPER_BLOCK_BYTES: usize = 96;

/// `EROFS_SUPER_MAGIC_V1`.
const MAGIC: u32 = 0xE0F5_E1E2;

/// `EROFS_FEATURE_INCOMPAT_*`, up to the long prefixes of attributes.
const FEATURES: u32 = 0x7f;

/// `EROFS_FEATURE_INCOMPAT_COMPR_CFGS`: the image names its algorithms.
const NAMES_ALGORITHMS: u32 = 1 << 1;

/// The algorithm that the guest's kernel has, LZ4.
const ALGORITHMS: u16 = 1 << 0;

/// Whether the guest can mount the image: a node may have a newer kernel, and of
/// an image that consists of several files this would be one.
fn is_for_guest(head: &[u8; SUPER_BLOCK_BYTES]) -> bool {
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let (magic, features, algorithms, extra_devices) = (word(0), word(80), half(84), half(86));
    let is_known = features & NAMES_ALGORITHMS == 0 || algorithms & !ALGORITHMS == 0;
    magic == MAGIC && features & !FEATURES == 0 && is_known && extra_devices == 0
}

impl Layers {
    fn find(mount: &TreeMount) -> Option<Self> {
        if mount.kind != "overlay" || !mount.target.trim_matches('/').is_empty() {
            return None;
        }
        let lower = lower_layers::given(&mount.options)?;
        let is_short = lower.split(':').count() <= IMAGES_MOST;
        if !is_short {
            return None;
        }
        let table = fs::read("/proc/thread-self/mountinfo").ok()?;
        let layers = Self::parse(mount, &images(&String::from_utf8_lossy(&table)))?;
        let can_keep_books = layers.upper.as_ref().is_none_or(Upper::has_attributes);
        can_keep_books.then_some(layers)
    }

    /// `images` are the sources of the images that are mounted, by mount point.
    fn parse(mount: &TreeMount, images: &BTreeMap<PathBuf, PathBuf>) -> Option<Self> {
        let (mut lower, mut upper, mut work, mut options) = (None, None, None, Vec::new());
        for option in &mount.options {
            match option.split_once('=') {
                Some(("lowerdir", value)) => lower = Some(value),
                Some(("upperdir", value)) => upper = Some(value),
                Some(("workdir", value)) => work = Some(value),
                // The node can map the layers; disks it cannot.
                Some(("uidmap" | "gidmap", _)) => return None,
                // Names of directories on the node, which the guest cannot see.
                Some(("lowerdir+" | "datadir+", _)) => return None,
                _ => options.push(option.clone()),
            }
        }
        // An escaped colon makes two names, none of which is a mount point.
        let images = lower?
            .split(':')
            .map(|dir| images.get(Path::new(dir)).cloned())
            .collect::<Option<Vec<_>>>()?;
        let upper = match (upper, work) {
            (None, None) => None,
            (Some(upper), Some(work)) => Some(Upper::new(Path::new(upper), Path::new(work))?),
            _ => return None,
        };
        Some(Self {
            images,
            upper,
            options,
        })
    }

    /// What the agent mounts, and the root. `written` is where the guest has the
    /// directory of the writable layer.
    fn storages<'a>(
        &self,
        serials: impl Iterator<Item = &'a str>,
        written: Option<&str>,
        container: &Id,
    ) -> (Vec<Storage>, String) {
        let place = format!("{}/{container}", path::CONTAINERS);
        let mut storages = Vec::new();
        let mut overlay = OverlayStorage::default();
        for (index, serial) in serials.enumerate() {
            let mut storage = Storage {
                mount_point: format!("{place}/{LAYERS}/{index}"),
                options: vec!["ro".to_owned()],
                ..Storage::default()
            };
            storage.set_block(BlockStorage {
                serial: serial.to_owned(),
                fstype: "erofs".to_owned(),
                ..BlockStorage::default()
            });
            overlay.lower.push(storage.mount_point.clone());
            storages.push(storage);
        }
        if let (Some(Upper { upper, work, .. }), Some(written)) = (&self.upper, written) {
            overlay.upper = format!("{written}/{upper}");
            overlay.work = format!("{written}/{work}");
        }
        let root = format!("{place}/{ROOTFS}");
        let mut storage = Storage {
            mount_point: root.clone(),
            options: self.options.clone(),
            ..Storage::default()
        };
        storage.set_overlay(overlay);
        storages.push(storage);
        (storages, root)
    }
}

impl Upper {
    fn new(upper: &Path, work: &Path) -> Option<Self> {
        let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
        let dir = upper.parent().filter(|dir| Some(*dir) == work.parent())?;
        Some(Self {
            dir: dir.to_owned(),
            upper: name(upper)?,
            work: name(work)?,
        })
    }

    /// Whether the file system has room for what overlayfs notes of a file, which
    /// the file server keeps in attributes of users.
    fn has_attributes(&self) -> bool {
        let none: &mut [u8] = &mut [];
        let asked = rustix::fs::getxattr(&self.dir, c"user.husk.trusted.overlay.opaque", none);
        !matches!(asked, Err(Errno::OPNOTSUPP))
    }
}

/// The sources of the EROFS images in a table of mounts (`proc_pid_mountinfo(5)`),
/// by mount point; but for those that are not a whole file or device.
fn images(table: &str) -> BTreeMap<PathBuf, PathBuf> {
    let path = |text: &str| PathBuf::from(OsStr::from_bytes(&unescaped(text)));
    let mut images = BTreeMap::new();
    for line in table.lines() {
        let Some((mount, file_system)) = line.split_once(" - ") else {
            continue;
        };
        let mut mount = mount.split(' ').skip(3);
        let (Some(root), Some(at)) = (mount.next(), mount.next()) else {
            continue;
        };
        // Whatever is mounted last is what is seen.
        images.remove(&path(at));
        let mut file_system = file_system.split(' ');
        let (Some("erofs"), Some(source)) = (file_system.next(), file_system.next()) else {
            continue;
        };
        let options = file_system.next().unwrap_or_default();
        let is_whole = !options.split(',').any(|option| {
            ["fsid=", "domain_id=", "fsoffset="]
                .iter()
                .any(|part| option.starts_with(part))
        });
        let source = path(source);
        if root == "/" && is_whole && source.is_absolute() {
            images.insert(path(at), source);
        }
    }
    images
}

#[cfg(test)]
mod tests;
