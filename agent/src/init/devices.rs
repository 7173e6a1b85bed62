//! `/dev` of a container.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid, chmod, chownat, fstat, major, makedev, minor,
    mknodat, openat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::mount_options::Recursion;
use super::{InitError, in_root, mounts};
use crate::error::{Doing, OsError};
use crate::oci::{Device, DeviceKind, Mount, Spec};

/// What every container has, whatever its spec says.
const DEFAULT: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

/// What a container has of its own, or the agent for itself.
const OWN: [&str; 6] = [
    "/dev/console",
    "/dev/hvc0",
    "/dev/mqueue",
    "/dev/ptmx",
    "/dev/pts",
    "/dev/shm",
];

struct Node<'a> {
    path: &'a Path,
    kind: FileType,
    device: u64,
    mode: u32,
    owner: (u32, u32),
    /// The guest's own, where it is known; else it is found by its number.
    guests: Option<&'a Path>,
}

impl Node<'_> {
    /// Whether a file is this device.
    fn is(&self, stat: &Stat) -> bool {
        FileType::from_raw_mode(stat.st_mode) == self.kind
            && (stat.st_rdev == self.device || self.kind == FileType::Fifo)
    }
}

/// How nodes come to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeSource {
    /// Made by number.
    Make,
    /// Bound from the agent's `/dev`: a user namespace may not make nodes.
    Bind,
}

/// Fills `/dev`, unless it is the guest's own that was bound there.
pub fn populate(root: &OwnedFd, spec: &Spec, source: NodeSource) -> Result<(), InitError> {
    if is_bound(spec) {
        return Ok(());
    }
    for (path, major, minor) in DEFAULT {
        let node = Node {
            path: Path::new(path),
            kind: FileType::CharacterDevice,
            device: makedev(major, minor),
            mode: 0o666,
            owner: (0, 0),
            guests: Some(Path::new(path)),
        };
        make(root, &node, source)?;
    }
    for device in &spec.linux.devices {
        make(root, &node_of(device)?, source)?;
    }
    for (target, path) in LINKS {
        link(root, target, Path::new(path)).doing("link", path)?;
    }
    Ok(())
}

fn is_bound(spec: &Spec) -> bool {
    let is_dev = |mount: &Mount| in_root::clean(&mount.destination) == Path::new("/dev");
    spec.mounts
        .iter()
        .any(|mount| is_dev(mount) && mount.is_bind())
}

/// Adds every other device of the guest, as the agent's `/dev` has it.
pub fn add_all(root: &OwnedFd, spec: &Spec, source: NodeSource) -> Result<(), InitError> {
    if is_bound(spec) {
        return Ok(());
    }
    let mut open = vec![PathBuf::from("/dev")];
    while let Some(directory) = open.pop() {
        let entries = fs::read_dir(&directory).doing("list", directory.display())?;
        for entry in entries {
            let entry = entry.doing("list", directory.display())?;
            let path = entry.path();
            // One of those may go meanwhile, and then it is none.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            let kind = metadata.file_type();
            if kind.is_dir() && !OWN.iter().any(|own| path == Path::new(own)) {
                open.push(path);
                continue;
            }
            let is_device = kind.is_char_device() || kind.is_block_device();
            let is_own = OWN.iter().any(|own| path == Path::new(own));
            let is_named = |device: &Device| in_root::clean(&device.path) == path;
            if !is_device || is_own || spec.linux.devices.iter().any(is_named) {
                continue;
            }
            let node = Node {
                path: &path,
                kind: FileType::from_raw_mode(metadata.mode()),
                device: metadata.rdev(),
                mode: metadata.mode() & 0o7777,
                owner: (metadata.uid(), metadata.gid()),
                guests: Some(&path),
            };
            make(root, &node, source)?;
        }
    }
    Ok(())
}

fn node_of(device: &Device) -> Result<Node<'_>, InitError> {
    let kind = match device.kind {
        DeviceKind::Block => FileType::BlockDevice,
        DeviceKind::Character => FileType::CharacterDevice,
        DeviceKind::Pipe => FileType::Fifo,
        DeviceKind::All => {
            return Err(InitError::Invalid {
                field: "linux.devices",
                reason: format!("{} is of no type", device.path.display()),
            });
        }
    };
    Ok(Node {
        path: &device.path,
        kind,
        device: device.number(),
        mode: device.file_mode.unwrap_or(0o666) & 0o7777,
        owner: (device.uid.unwrap_or(0), device.gid.unwrap_or(0)),
        guests: None,
    })
}

fn make(root: &OwnedFd, node: &Node<'_>, source: NodeSource) -> Result<(), InitError> {
    let path = in_root::clean(node.path);
    if source == NodeSource::Bind && node.kind != FileType::Fifo {
        let tree = clone_guests(node)?;
        let at = in_root::ensure_file(root, &path)?;
        return Ok(mounts::attach(&tree, &at).doing("make", path.display())?);
    }
    Ok(make_by_number(root, node, &path).doing("make", path.display())?)
}

/// The guest's own node of a device: the path is the container's, and may be
/// anything here.
fn clone_guests(node: &Node<'_>) -> Result<OwnedFd, InitError> {
    let absent = || InitError::Invalid {
        field: "linux.devices",
        reason: format!(
            "{}: the guest has no node of {}:{}",
            node.path.display(),
            major(node.device),
            minor(node.device)
        ),
    };
    let guests = match node.guests {
        Some(path) => path.to_owned(),
        None => find_guests(node.kind, node.device).ok_or_else(absent)?,
    };
    let tree = mounts::clone_tree(&guests, Recursion::Alone)?;
    let stat = fstat(&tree).doing("stat", guests.display())?;
    match node.is(&stat) {
        true => Ok(tree),
        false => Err(absent()),
    }
}

/// Where the kernel says that a device's node is.
fn find_guests(kind: FileType, device: u64) -> Option<PathBuf> {
    let kind = match kind {
        FileType::BlockDevice => "block",
        _ => "char",
    };
    let directory = format!("/sys/dev/{kind}/{}:{}", major(device), minor(device));
    let uevent = fs::read_to_string(Path::new(&directory).join("uevent")).ok()?;
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))?;
    let mut parts = Path::new(name).components();
    let plain = parts.all(|part| matches!(part, Component::Normal(_)));
    plain.then(|| Path::new("/dev").join(name))
}

fn make_by_number(root: &OwnedFd, node: &Node<'_>, path: &Path) -> Result<(), io::Error> {
    let (directory, name) = split(root, path).map_err(|error| error.source)?;
    let mode = Mode::from_raw_mode(node.mode);
    match mknodat(&directory, &name, node.kind, mode, node.device) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let stat = statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            if !node.is(&stat) {
                unlinkat(&directory, &name, AtFlags::empty())?;
                mknodat(&directory, &name, node.kind, mode, node.device)?;
            }
        }
        Err(errno) => return Err(errno.into()),
    }
    Ok(hand_over(&directory, &name, node)?)
}

/// Gives a node its owner and mode. Not by its name: the directory may be a volume's,
/// where another container puts a link to a file of the guest's in its place.
fn hand_over(directory: &OwnedFd, name: &Path, node: &Node<'_>) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = openat(directory, name, flags, Mode::empty())?;
    if !node.is(&fstat(&made)?) {
        return Err(Errno::EXIST);
    }
    let (uid, gid) = (Uid::from_raw(node.owner.0), Gid::from_raw(node.owner.1));
    chownat(&made, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    // The one way to it that needs neither a name nor the device opened.
    let path = format!("/proc/self/fd/{}", made.as_raw_fd());
    chmod(path, Mode::from_raw_mode(node.mode))
}

fn link(root: &OwnedFd, target: &str, path: &Path) -> Result<(), io::Error> {
    let (directory, name) = split(root, path).map_err(|error| error.source)?;
    match symlinkat(target, &directory, &name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn split(root: &OwnedFd, path: &Path) -> Result<(OwnedFd, PathBuf), OsError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let name = path.file_name().unwrap_or_default();
    Ok((
        in_root::ensure_directory(root, parent)?,
        PathBuf::from(name),
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode_of(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_link_in_place_of_a_node_leads_nowhere() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let owner = fs::metadata(directory.path()).unwrap();
        let node = Node {
            path: Path::new("/dev/p"),
            kind: FileType::Fifo,
            device: 0,
            mode: 0o666,
            owner: (owner.uid(), owner.gid()),
            guests: None,
        };
        let made = OwnedFd::from(fs::File::open(directory.path()).unwrap());
        let private = Mode::from_raw_mode(0o600);
        mknodat(&made, "p", FileType::Fifo, private, 0).unwrap();
        hand_over(&made, Path::new("p"), &node).unwrap();
        assert_eq!(mode_of(&at("p")), 0o666);
        // Between its making and this, another container was there.
        mknodat(&made, "other", FileType::Fifo, private, 0).unwrap();
        fs::remove_file(at("p")).unwrap();
        symlink("other", at("p")).unwrap();
        assert_eq!(hand_over(&made, Path::new("p"), &node), Err(Errno::EXIST));
        assert_eq!(mode_of(&at("other")), 0o600);
        fs::remove_file(at("p")).unwrap();
        fs::write(at("p"), "").unwrap();
        assert_eq!(hand_over(&made, Path::new("p"), &node), Err(Errno::EXIST));
    }
}
