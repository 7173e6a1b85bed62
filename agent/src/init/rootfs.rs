//! Builds a container's view of files and enters it.

use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags, mount_change, unmount};

use super::devices::{self, NodeSource};
use super::mount_options::{Attributes, MountOptions, Recursion, root_propagation};
use super::plan::ContainerPlan;
use super::terminal::Terminal;
use super::{InitError, in_root, mounts, namespaces};
use crate::error::{Doing, OsError};
use crate::kernel_file;
use crate::oci::{NamespaceKind, Spec};

const READ_ONLY: Attributes = Attributes {
    set: MountAttrFlags::MOUNT_ATTR_RDONLY.bits(),
    clear: 0,
};

/// Mounts what the spec wants and makes it this process's root.
pub fn enter(plan: &ContainerPlan, terminal: bool) -> Result<Option<Terminal>, InitError> {
    let spec = &plan.spec;
    let propagation = propagation_of(spec)?;
    let shared = propagation.is_some_and(|(flag, _)| flag == libc::MS_SHARED);
    // A container that shares mounts with the pod stays the peer of its
    // volumes; every other one only receives.
    if !shared {
        let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change("/", flags).doing("set the propagation of", "/")?;
    }
    let root = attach_root(spec, &plan.stage)?;
    let own_cgroups = namespaces::find(spec, NamespaceKind::Cgroup).is_some();
    for mount in &spec.mounts {
        mounts::mount(&root, mount, own_cgroups)?;
    }
    let nodes = match namespaces::find(spec, NamespaceKind::User) {
        Some(_) => NodeSource::Bind,
        None => NodeSource::Make,
    };
    devices::populate(&root, spec, nodes)?;
    if plan.all_devices {
        devices::add_all(&root, spec, nodes)?;
    }
    let terminal = match terminal {
        true => Some(Terminal::open(&root)?),
        false => None,
    };
    if let Some(terminal) = &terminal {
        terminal.bind_console(&root)?;
    }
    write_sysctls(spec)?;
    make_read_only(&root, spec)?;
    mask(&root, spec)?;
    if spec.root.as_ref().is_some_and(|root| root.readonly) {
        mounts::set_attributes(&root, READ_ONLY, Recursion::Alone).doing("make read-only", "/")?;
    }
    pivot(&root)?;
    if let Some((flag, recursion)) = propagation {
        mounts::set_propagation(&root, flag, recursion).doing("set the propagation of", "/")?;
    }
    Ok(terminal)
}

fn propagation_of(spec: &Spec) -> Result<Option<(u64, Recursion)>, InitError> {
    match spec.linux.rootfs_propagation.as_deref() {
        None | Some("") => Ok(None),
        Some(name) => match root_propagation(name) {
            Some(propagation) => Ok(Some(propagation)),
            None => Err(InitError::Invalid {
                field: "linux.rootfsPropagation",
                reason: format!("{name:?} is unknown"),
            }),
        },
    }
}

/// pivot_root(2) wants a root that is a mount whose parent is private: the
/// stage's is.
fn attach_root(spec: &Spec, stage: &Path) -> Result<OwnedFd, InitError> {
    let path = spec.root.as_ref().map(|root| root.path.as_path());
    let path = path
        .filter(|path| path.is_absolute())
        .ok_or_else(|| InitError::Invalid {
            field: "root.path",
            reason: "not an absolute path".to_owned(),
        })?;
    let root = mounts::clone_tree(path, Recursion::Tree)?;
    if !in_root::is_directory(&root).doing("stat", path.display())? {
        return Err(InitError::Invalid {
            field: "root.path",
            reason: format!("{} is not a directory", path.display()),
        });
    }
    let stage = openat(CWD, stage, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .doing("open", stage.display())?;
    mounts::set_propagation(&root, libc::MS_PRIVATE, Recursion::Alone)
        .and_then(|()| mounts::attach(&root, &stage))
        .doing("mount", path.display())?;
    Ok(root)
}

/// Through the agent's /proc: what it shows are this process's namespaces.
fn write_sysctls(spec: &Spec) -> Result<(), InitError> {
    for (key, value) in &spec.linux.sysctl {
        let path = sysctl_path(key).ok_or_else(|| InitError::Invalid {
            field: "linux.sysctl",
            reason: format!("{key:?} is no key"),
        })?;
        kernel_file::write(path, value).doing("set sysctl", key)?;
    }
    Ok(())
}

/// The file of a sysctl; `.` and `/` both separate, the first one decides.
pub fn sysctl_path(key: &str) -> Option<PathBuf> {
    let relative = match key.find(['.', '/']) {
        Some(at) if key.as_bytes()[at] == b'/' => key.to_owned(),
        // In a dotted key, a slash stands for a dot of a name.
        _ => key
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect(),
    };
    let relative = Path::new(&relative);
    let plain = relative
        .components()
        .all(|c| matches!(c, Component::Normal(_)));
    (plain && !key.is_empty()).then(|| Path::new("/proc/sys").join(relative))
}

fn make_read_only(root: &OwnedFd, spec: &Spec) -> Result<(), OsError> {
    for path in &spec.linux.readonly_paths {
        let Some(at) = open_if_there(root, path)? else {
            continue;
        };
        mounts::clone_at(&at, Recursion::Tree)
            .and_then(|tree| {
                mounts::set_attributes(&tree, READ_ONLY, Recursion::Tree)?;
                mounts::attach(&tree, &at)
            })
            .doing("make read-only", path)?;
    }
    Ok(())
}

fn mask(root: &OwnedFd, spec: &Spec) -> Result<(), InitError> {
    for path in &spec.linux.masked_paths {
        let Some(at) = open_if_there(root, path)? else {
            continue;
        };
        let tree = if in_root::is_directory(&at).doing("stat", path)? {
            let mut options = MountOptions::parse(["ro", "nosuid", "nodev", "noexec"]);
            options.data.push("nr_inodes=1".to_owned());
            mounts::new_filesystem("tmpfs", None, &options, Path::new(path))?
        } else {
            // The agent's: the image has no say in what it is.
            mounts::clone_tree(Path::new("/dev/null"), Recursion::Alone)?
        };
        mounts::attach(&tree, &at).doing("mask", path)?;
    }
    Ok(())
}

fn open_if_there(root: &OwnedFd, path: &str) -> Result<Option<OwnedFd>, OsError> {
    match in_root::open(root, &in_root::clean(Path::new(path)), OFlags::PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(errno).doing("open", path),
    }
}

/// Makes a mounted directory this process's root and leaves the one before.
pub fn pivot(root: &OwnedFd) -> Result<(), OsError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = openat(CWD, "/", flags, Mode::empty()).doing("open", "the guest's root")?;
    rustix::process::fchdir(root)
        .and_then(|()| rustix::process::pivot_root(".", "."))
        .and_then(|()| rustix::process::fchdir(&old))
        .doing("change to", "the new root")?;
    // The old root lies over the new one now. What we unmount of it must not
    // vanish for the agent.
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change(".", flags)
        .and_then(|()| unmount(".", UnmountFlags::DETACH))
        .and_then(|()| rustix::process::chdir("/"))
        .doing("leave", "the guest's root")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_keys_stay_below_proc_sys() {
        let path = |key| sysctl_path(key).map(|path| path.display().to_string());
        assert_eq!(
            path("kernel.shmmax").as_deref(),
            Some("/proc/sys/kernel/shmmax")
        );
        assert_eq!(
            path("net/ipv4/ip_forward").as_deref(),
            Some("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.arp_filter").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/arp_filter")
        );
        assert_eq!(path("../x"), None);
        assert_eq!(path("net/../../x"), None);
        assert_eq!(path(""), None);
    }
}
