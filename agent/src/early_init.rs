//! What a kernel expects of its first process before anything else: the file
//! systems of the kernel, a root that containers can leave, the loopback.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::mount::{
    MountFlags, MountPropagationFlags, mount, mount_bind, mount_change, mount_move, mount_remount,
};
use rustix::process::{Resource, Rlimit};

use crate::container::cgroup;
use crate::error::{Doing, OsError};
use crate::kernel_file;
use crate::sandbox::STAGE;
use crate::settings::Settings;

const PLAIN: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NOEXEC)
    .union(MountFlags::NODEV);
const TEMPORARY: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);

struct Filesystem {
    fstype: &'static str,
    path: &'static str,
    flags: MountFlags,
    data: &'static std::ffi::CStr,
}

const fn filesystem(
    fstype: &'static str,
    path: &'static str,
    flags: MountFlags,
    data: &'static std::ffi::CStr,
) -> Filesystem {
    Filesystem {
        fstype,
        path,
        flags,
        data,
    }
}

/// In order: later ones lie on earlier ones.
const FILESYSTEMS: [Filesystem; 9] = [
    filesystem("proc", "/proc", PLAIN, c""),
    filesystem("sysfs", "/sys", PLAIN, c""),
    filesystem("devtmpfs", "/dev", DEVICES, c"mode=0755"),
    filesystem(
        "devpts",
        "/dev/pts",
        DEVICES,
        c"mode=0620,gid=5,ptmxmode=0666",
    ),
    filesystem("tmpfs", "/dev/shm", TEMPORARY, c"mode=1777"),
    filesystem("mqueue", "/dev/mqueue", PLAIN, c""),
    // Device nodes of raw storages lie there.
    filesystem("tmpfs", "/run", MountFlags::NOSUID, c"mode=0755"),
    filesystem("tmpfs", "/tmp", TEMPORARY, c"mode=1777"),
    filesystem(
        "cgroup2",
        "/sys/fs/cgroup",
        PLAIN,
        // The last one: processes join without waiting for an RCU grace period.
        c"nsdelegate,memory_recursiveprot,favordynmods",
    ),
];

/// Of a guest, as its PID 1. The log works after this.
pub fn guest(settings: &Settings) -> Result<(), OsError> {
    leave_initramfs()?;
    for filesystem in &FILESYSTEMS {
        make_directory(filesystem.path)?;
        mount(
            filesystem.fstype,
            filesystem.path,
            filesystem.fstype,
            filesystem.flags,
            filesystem.data,
        )
        .doing("mount", filesystem.path)?;
    }
    share_mounts()?;
    raise_limits()?;
    cgroup::prepare(&settings.cgroup_root)?;
    bring_up_loopback()?;
    seal_initramfs()
}

/// Of a test, in namespaces of its own on a machine that has booted.
pub fn hosted(settings: &Settings) -> Result<(), OsError> {
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", flags).doing("set the propagation of", "/")?;
    mount("tmpfs", "/run", "tmpfs", MountFlags::NOSUID, c"mode=0755").doing("mount", "/run")?;
    mount("proc", "/proc", "proc", PLAIN, c"").doing("mount", "/proc")?;
    share_mounts()?;
    cgroup::prepare(&settings.cgroup_root)?;
    bring_up_loopback()
}

/// The initramfs is no mount that pivot_root(2) could leave: a second mount of
/// the same files, moved over it, is.
fn leave_initramfs() -> Result<(), OsError> {
    const NEW: &str = "/.root";
    make_directory(NEW)?;
    mount_bind("/", NEW)
        .and_then(|()| rustix::process::chdir(NEW))
        .and_then(|()| mount_move(".", "/"))
        .and_then(|()| rustix::process::chroot("."))
        .and_then(|()| rustix::process::chdir("/"))
        .doing("leave", "the initramfs")
}

/// This program lies there, and containers can reach the file of a running one
/// through /proc whatever they see of the mounts. So it is the file system that
/// becomes read-only, not a mount of it.
fn seal_initramfs() -> Result<(), OsError> {
    mount_remount("/", MountFlags::RDONLY, c"").doing("make read-only", "/")
}

/// Containers that ask for it see mounts that come later. The stage stays
/// private: pivot_root(2) wants that.
fn share_mounts() -> Result<(), OsError> {
    let flags = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    mount_change("/", flags).doing("set the propagation of", "/")?;
    fs::create_dir_all(STAGE).doing("make", STAGE)?;
    mount_bind(STAGE, STAGE)
        .and_then(|()| mount_change(STAGE, MountPropagationFlags::PRIVATE))
        .doing("mount", STAGE)
}

/// What the spec doesn't limit, containers inherit: the kernel's first process
/// has less than an init system gives a node's services.
fn raise_limits() -> Result<(), OsError> {
    const FILES: u64 = 1 << 20;
    /// As many as the kernel can number; it starts with 32768.
    const PIDS: &str = "4194304";
    kernel_file::write("/proc/sys/kernel/pid_max", PIDS).doing("raise", "kernel.pid_max")?;
    let limits = [
        (Resource::Nofile, Some(FILES)),
        (Resource::Nproc, None),
        (Resource::Core, None),
    ];
    for (resource, limit) in limits {
        let values = Rlimit {
            current: limit,
            maximum: limit,
        };
        rustix::process::setrlimit(resource, values).doing("raise", "a resource limit")?;
    }
    Ok(())
}

fn make_directory(path: &str) -> Result<(), OsError> {
    match fs::create_dir(Path::new(path)) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.doing("make", path),
    }
}

/// Of the network namespace that the calling thread is in.
pub fn bring_up_loopback() -> Result<(), OsError> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )
    .doing("open", "a socket")?;
    // SAFETY: zeros are a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: the request names an interface and its flags, as SIOCSIFFLAGS reads them.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).doing("bring up", "lo"),
    }
}
