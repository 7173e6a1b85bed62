//! `/dev` of a container.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, Uid, chmodat, chownat, makedev, mknodat, statat, symlinkat,
    unlinkat,
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

struct Node<'a> {
    path: &'a Path,
    kind: FileType,
    device: u64,
    mode: u32,
    owner: (u32, u32),
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
    let is_bound =
        |mount: &Mount| in_root::clean(&mount.destination) == Path::new("/dev") && mount.is_bind();
    if spec.mounts.iter().any(is_bound) {
        return Ok(());
    }
    for (path, major, minor) in DEFAULT {
        let node = Node {
            path: Path::new(path),
            kind: FileType::CharacterDevice,
            device: makedev(major, minor),
            mode: 0o666,
            owner: (0, 0),
        };
        make(root, &node, source).doing("make", path)?;
    }
    for device in &spec.linux.devices {
        make(root, &node_of(device)?, source).doing("make", device.path.display())?;
    }
    for (target, path) in LINKS {
        link(root, target, Path::new(path)).doing("link", path)?;
    }
    Ok(())
}

/// Drops the block devices that aren't the container's own: where its spec was
/// written, their numbers are those of other disks.
pub fn drop_foreign(devices: &mut Vec<Device>, own: &[u64]) {
    let is_foreign =
        |device: &Device| device.kind == DeviceKind::Block && !own.contains(&device.number());
    // One line: a privileged container's spec has all of its node's.
    if let Some(first) = devices.iter().find(|device| is_foreign(device)) {
        let count = devices.iter().filter(|device| is_foreign(device)).count();
        let path = first.path.display();
        log::warn!("{path}: block devices of the host are left out, {count} in all");
    }
    devices.retain(|device| !is_foreign(device));
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
    })
}

fn make(root: &OwnedFd, node: &Node<'_>, source: NodeSource) -> Result<(), std::io::Error> {
    let path = in_root::clean(node.path);
    if source == NodeSource::Bind && node.kind != FileType::Fifo {
        let tree = mounts::clone_tree(&path, Recursion::Alone).map_err(|error| error.source)?;
        let at = in_root::ensure_file(root, &path).map_err(|error| error.source)?;
        return Ok(mounts::attach(&tree, &at)?);
    }
    let (directory, name) = split(root, &path).map_err(|error| error.source)?;
    let mode = Mode::from_raw_mode(node.mode);
    match mknodat(&directory, &name, node.kind, mode, node.device) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let stat = statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            let same = FileType::from_raw_mode(stat.st_mode) == node.kind
                && (stat.st_rdev == node.device || node.kind == FileType::Fifo);
            if !same {
                unlinkat(&directory, &name, AtFlags::empty())?;
                mknodat(&directory, &name, node.kind, mode, node.device)?;
            }
        }
        Err(errno) => return Err(errno.into()),
    }
    let (uid, gid) = (Uid::from_raw(node.owner.0), Gid::from_raw(node.owner.1));
    chownat(
        &directory,
        &name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    // The image's own process doesn't run yet: the name is still our node.
    Ok(chmodat(&directory, &name, mode, AtFlags::empty())?)
}

fn link(root: &OwnedFd, target: &str, path: &Path) -> Result<(), std::io::Error> {
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
