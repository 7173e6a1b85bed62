//! Mounts inside a container's root, made with descriptors only: no path of
//! the image is resolved by anything but `in_root`.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::InitError;
use super::copy_up::copy_up;
use super::in_root;
use super::mount_options::{Attributes, MountOptions, Recursion};
use crate::error::{Doing, OsError};
use crate::oci::Mount;

/// Makes one mount of the spec below `root`, in a cgroup namespace of the
/// container's own or in the guest's.
pub fn mount(root: &OwnedFd, mount: &Mount, own_cgroups: bool) -> Result<(), InitError> {
    let target = in_root::clean(&mount.destination);
    let options = mount.options.iter().map(String::as_str);
    let options = MountOptions::parse(options);
    let source = mount.source.as_deref();
    let fstype = mount.kind.as_deref().unwrap_or("none");
    if target == Path::new("/") {
        return Err(InitError::Invalid {
            field: "mounts",
            reason: "the root can't be mounted over".to_owned(),
        });
    }
    if options.remount {
        let at = in_root::open(root, &target, OFlags::PATH).doing("open", target.display())?;
        return Ok(finish(&at, &options, &target)?);
    }
    if mount.maps_ids() {
        return Err(InitError::Invalid {
            field: "mounts",
            reason: format!("{} maps ids, which no mount here does", target.display()),
        });
    }
    if mount.is_bind() {
        let source = source.ok_or_else(|| InitError::Invalid {
            field: "mounts",
            reason: format!("{} has no source", target.display()),
        })?;
        let recursion = match options.bind {
            Some(recursion) => recursion,
            None if fstype == "rbind" => Recursion::Tree,
            None => Recursion::Alone,
        };
        let tree = clone_tree(source, recursion)?;
        let at = if in_root::is_directory(&tree).doing("stat", source.display())? {
            in_root::ensure_directory(root, &target)?
        } else {
            in_root::ensure_file(root, &target)?
        };
        set_attributes(&tree, options.attributes, Recursion::Alone)
            .and_then(|()| set_attributes(&tree, options.recursive, Recursion::Tree))
            .doing("set the attributes of", target.display())?;
        attach(&tree, &at).doing("mount", target.display())?;
        return Ok(finish(
            &tree,
            &MountOptions {
                propagation: options.propagation,
                ..Default::default()
            },
            &target,
        )?);
    }
    let mut at = in_root::ensure_directory(root, &target)?;
    if matches!(fstype, "proc" | "sysfs") {
        // Elsewhere than the spec says, masked paths would miss it.
        let strict = in_root::open_without_links(root, &target, OFlags::PATH);
        at = strict.map_err(|_| InitError::Invalid {
            field: "mounts",
            reason: format!("{} is a symbolic link in the image", target.display()),
        })?;
    }
    let tree = match guests_own(fstype) {
        // There is one hierarchy: a mount made in the guest's namespace would
        // take away the options that the agent's was made with.
        Some(path) if matches!(fstype, "cgroup" | "cgroup2") && !own_cgroups => {
            view_of(path, &options, &target)?
        }
        guests_own => match (
            new_filesystem(fstype, source, &options, &target),
            guests_own,
        ) {
            // The pod's own namespaces belong to the guest's first user
            // namespace, so a container in another one gets a view of the
            // guest's mount.
            (Err(InitError::Filesystem { source, .. }), Some(path))
                if source.raw_os_error() == Some(libc::EPERM) =>
            {
                view_of(path, &options, &target)?
            }
            (made, _) => made?,
        },
    };
    if options.copy_up {
        copy_up(&at, &tree).doing("copy to", target.display())?;
    }
    attach(&tree, &at).doing("mount", target.display())?;
    Ok(finish(
        &tree,
        &MountOptions {
            propagation: options.propagation,
            recursive: options.recursive,
            ..Default::default()
        },
        &target,
    )?)
}

/// Where the guest itself has such a file system.
fn guests_own(fstype: &str) -> Option<&'static Path> {
    match fstype {
        "proc" => Some(Path::new("/proc")),
        "sysfs" => Some(Path::new("/sys")),
        "mqueue" => Some(Path::new("/dev/mqueue")),
        "cgroup" | "cgroup2" => Some(Path::new("/sys/fs/cgroup")),
        _ => None,
    }
}

fn view_of(path: &Path, options: &MountOptions, target: &Path) -> Result<OwnedFd, OsError> {
    let tree = clone_tree(path, Recursion::Tree)?;
    set_attributes(&tree, options.attributes, Recursion::Tree)
        .doing("set the attributes of", target.display())?;
    Ok(tree)
}

fn finish(tree: &OwnedFd, options: &MountOptions, target: &Path) -> Result<(), OsError> {
    set_attributes(tree, options.attributes, Recursion::Alone)
        .and_then(|()| set_attributes(tree, options.recursive, Recursion::Tree))
        .doing("set the attributes of", target.display())?;
    for (propagation, recursion) in &options.propagation {
        set_propagation(tree, *propagation, *recursion)
            .doing("set the propagation of", target.display())?;
    }
    Ok(())
}

/// A new instance of a file system, mounted nowhere yet.
pub fn new_filesystem(
    fstype: &str,
    source: Option<&Path>,
    options: &MountOptions,
    target: &Path,
) -> Result<OwnedFd, InitError> {
    // The guest has version 2 alone.
    let fstype = if fstype == "cgroup" {
        "cgroup2"
    } else {
        fstype
    };
    let context = fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| filesystem_error(fstype, target, errno, None))?;
    configure(&context, source, options)
        .and_then(|()| {
            let attributes = MountAttrFlags::from_bits_retain(options.attributes.set);
            fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        })
        .map_err(|errno| filesystem_error(fstype, target, errno, Some(&context)))
}

fn configure(
    context: &OwnedFd,
    source: Option<&Path>,
    options: &MountOptions,
) -> Result<(), Errno> {
    if let Some(source) = source {
        fsconfig_set_string(context, "source", source)?;
    }
    for option in &options.data {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(context, key, value)?,
            None => fsconfig_set_flag(context, option.as_str())?,
        }
    }
    fsconfig_create(context)
}

fn filesystem_error(
    fstype: &str,
    target: &Path,
    errno: Errno,
    context: Option<&OwnedFd>,
) -> InitError {
    let mut buf = [0; 256];
    let count = context.and_then(|context| rustix::io::read(context, &mut buf).ok());
    // Each read is one line of the file system's log, "e " before errors.
    let line = count.map(|count| String::from_utf8_lossy(&buf[..count]).trim_end().to_owned());
    InitError::Filesystem {
        target: target.display().to_string(),
        fstype: fstype.to_owned(),
        log: line.unwrap_or_else(|| "mount refused".to_owned()),
        source: errno.into(),
    }
}

/// A detached copy of what is mounted at a path of the agent's.
pub fn clone_tree(path: &Path, recursion: Recursion) -> Result<OwnedFd, OsError> {
    open_tree(CWD, path, clone_flags(recursion)).doing("open", path.display())
}

/// A detached copy of the mount that an open file is on.
pub fn clone_at(fd: &OwnedFd, recursion: Recursion) -> Result<OwnedFd, Errno> {
    open_tree(
        fd,
        "",
        clone_flags(recursion) | OpenTreeFlags::AT_EMPTY_PATH,
    )
}

fn clone_flags(recursion: Recursion) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match recursion {
        Recursion::Alone => flags,
        Recursion::Tree => flags | OpenTreeFlags::AT_RECURSIVE,
    }
}

/// Attaches a detached tree over an open file or directory.
pub fn attach(tree: &OwnedFd, at: &impl AsFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", at, "", flags)
}

/// Changes attributes of a mount, or of it and all below.
pub fn set_attributes(
    tree: &OwnedFd,
    attributes: Attributes,
    recursion: Recursion,
) -> Result<(), Errno> {
    if attributes.is_empty() {
        return Ok(());
    }
    let change = MountAttr {
        attr_set: attributes.set.into(),
        attr_clr: attributes.clear.into(),
        ..Default::default()
    };
    mount_setattr(tree, &change, recursion)
}

/// Changes how mounts propagate; the flag is one of `MS_*`.
pub fn set_propagation(tree: &OwnedFd, flag: u64, recursion: Recursion) -> Result<(), Errno> {
    let change = MountAttr {
        propagation: flag,
        ..Default::default()
    };
    mount_setattr(tree, &change, recursion)
}

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
#[derive(Debug, Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

fn mount_setattr(tree: &OwnedFd, change: &MountAttr, recursion: Recursion) -> Result<(), Errno> {
    let flags = match recursion {
        Recursion::Alone => libc::AT_EMPTY_PATH,
        Recursion::Tree => libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
    };
    // SAFETY: the path is an empty C string, the struct is the kernel's and its size is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(change),
            size_of::<MountAttr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
    }
}
