//! How the VMM shuts itself in, before it reads anything: afterwards it sees no
//! file, no network, no other process, and has no privilege. What it works with
//! comes over the control socket.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use husk_vmm_spec::{CONTROL_FD, JailSpec};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    Scope,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid, UnshareFlags,
};

/// Most descriptors: each vsock stream, queue and interrupt vector has one.
pub const DESCRIPTORS: u64 = 8192;

/// Descriptors for which there is room from the start: a power of two, more than a
/// machine has that nothing was plugged into.
const PROVIDED: RawFd = 512;

/// Most threads beside the processors': the main one, the devices', KVM's that
/// splits large pages, and io_uring's of either thread that has a ring, eight that
/// end and one that need not (`vmm/virtio/src/block/engine.rs`).
const OTHER_THREADS: u64 = 2 + 1 + 2 * (8 + 1);

/// Most locked memory, bytes: Linux 6.18 counts io_uring's rings as such, of which
/// there is one for each slot of the bus, of 16 KiB here and with room to grow.
const LOCKED: u64 = 32 * (32 << 10);

/// Highest capability that a kernel may know of; there are 41 in 2026.
const CAPABILITIES: u32 = 63;

/// Where the empty file system is mounted until it becomes the root. Any
/// directory that every node has would do.
const STAGING: &str = "/dev";

/// A jail that could not be closed.
#[derive(Debug, thiserror::Error)]
#[error("jail: {step}")]
pub struct JailError {
    step: &'static str,
    #[source]
    source: io::Error,
}

fn failed(step: &'static str) -> impl Fn(Errno) -> JailError {
    move |source| JailError {
        step,
        source: source.into(),
    }
}

/// Shuts the process in. It must have one thread, and root's privileges to give
/// away.
///
/// # Errors
/// The host refuses a step; the process is then half shut in and of no use.
pub fn enter(spec: JailSpec) -> Result<(), JailError> {
    keep_only_the_control_socket()?;
    let this_thread = this_thread()?;
    leave_namespaces()?;
    leave_file_systems()?;
    limit_resources()?;
    provide_descriptors()?;
    become_somebody(spec)?;
    leave_users(spec, this_thread)?;
    drop_privileges()?;
    rule_out()
}

/// Lets the process have no more threads than a machine of `vcpus` processors
/// needs.
///
/// # Errors
/// The kernel refuses.
pub fn limit_threads(vcpus: u8) -> Result<(), JailError> {
    limit(Resource::Nproc, u64::from(vcpus) + OTHER_THREADS)
}

/// Standard streams lead nowhere; whatever else was inherited is closed.
fn keep_only_the_control_socket() -> Result<(), JailError> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("open /dev/null"))?;
    let streams = [
        rustix::stdio::dup2_stdin,
        rustix::stdio::dup2_stdout,
        rustix::stdio::dup2_stderr,
    ];
    for replace in streams {
        replace(&null).map_err(failed("replace the standard streams"))?;
    }
    drop::<OwnedFd>(null);
    // SAFETY: nothing in this process owns a descriptor above the control socket.
    let result = unsafe { libc::close_range(CONTROL_FD as u32 + 1, u32::MAX, 0) };
    match result {
        0 => Ok(()),
        _ => Err(JailError {
            step: "close inherited descriptors",
            source: io::Error::last_os_error(),
        }),
    }
}

/// New and empty ones of all that can be left; the PID namespace is new since
/// the shim started us.
fn leave_namespaces() -> Result<(), JailError> {
    let all = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: descriptors stay shared with nobody, as this is the only thread.
    unsafe { rustix::thread::unshare_unsafe(all) }.map_err(failed("leave the host's namespaces"))
}

/// The root becomes an empty, read-only file system; the host's is let go.
fn leave_file_systems() -> Result<(), JailError> {
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(failed("make mounts private"))?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount(
        "none",
        STAGING,
        "tmpfs",
        flags,
        Some(c"size=4k,nr_inodes=1,mode=0555"),
    )
    .map_err(failed("mount the empty root"))?;
    rustix::process::chdir(STAGING).map_err(failed("enter the empty root"))?;
    // The old root comes to lie on the new one, and is taken off it.
    rustix::process::pivot_root(".", ".").map_err(failed("pivot_root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("let the host's root go"))?;
    rustix::process::chdir("/").map_err(failed("stand in the empty root"))
}

/// The size of files stays without a limit: a disk may be a file, of any size, and
/// may come at any time, while a limit could never be raised again.
fn limit_resources() -> Result<(), JailError> {
    let limits = [
        (Resource::Nofile, DESCRIPTORS),
        // Guest memory must not land in a file. A core_pattern that is a
        // program ignores 0 and leaves alone what has 1 (fs/coredump.c).
        (Resource::Core, 1),
        (Resource::Memlock, LOCKED),
    ];
    limits
        .into_iter()
        .try_for_each(|(resource, most)| limit(resource, most))
}

/// Has the kernel make room for the descriptors of a usual machine while there is one
/// thread: a table that several share is made larger after what RCU calls a grace
/// period (`expand_fdtable` of Linux's fs/file.c), some 10 ms.
fn provide_descriptors() -> Result<(), JailError> {
    let null = rustix::stdio::stdin();
    rustix::io::fcntl_dupfd_cloexec(null, PROVIDED - 1)
        .map(drop)
        .map_err(failed("make room for descriptors"))
}

fn limit(resource: Resource, most: u64) -> Result<(), JailError> {
    let limit = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    rustix::process::setrlimit(resource, limit).map_err(failed("set resource limits"))
}

/// The directory of this thread in /proc, through which it can be reached when
/// nothing has a name any more.
fn this_thread() -> Result<OwnedFd, JailError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open("/proc/thread-self", flags, Mode::empty())
        .map_err(failed("open /proc/thread-self"))
}

/// Changes the user and keeps the capabilities, for one step more.
fn become_somebody(spec: JailSpec) -> Result<(), JailError> {
    let (uid, gid) = (Uid::from_raw(spec.uid), Gid::from_raw(spec.gid));
    rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)
        .map_err(failed("keep capabilities"))?;
    rustix::thread::set_thread_groups(&[]).map_err(failed("leave groups"))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed("change group"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed("change user"))
}

/// A user namespace in which there is nobody else: a capability that is won back
/// is one over nothing, as the other namespaces belong to the node's. A node may
/// have none to give; the shim says so then.
fn leave_users(spec: JailSpec, this_thread: OwnedFd) -> Result<(), JailError> {
    // Otherwise the files that are to be written are root's. Nobody else is this
    // user, who could trace it.
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)
        .map_err(failed("become dumpable"))?;
    // SAFETY: this is the only thread, and shares nothing.
    match unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) } {
        Ok(()) => {}
        // Not in this kernel; none left, or forbidden, on this node.
        Err(Errno::INVAL | Errno::NOSPC | Errno::PERM | Errno::ACCESS) => return Ok(()),
        Err(error) => return Err(failed("leave the host's users")(error)),
    }
    // user_namespaces(7): in this order, in one write each.
    let JailSpec { uid, gid } = spec;
    for (name, text) in [
        ("uid_map", format!("{uid} {uid} 1")),
        ("setgroups", "deny".to_owned()),
        ("gid_map", format!("{gid} {gid} 1")),
    ] {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::openat(this_thread.as_fd(), name, flags, Mode::empty())
            .and_then(|file| rustix::io::write(file, text.as_bytes()))
            .map_err(failed("be the only user"))?;
    }
    Ok(())
}

fn drop_privileges() -> Result<(), JailError> {
    for bit in 0..=CAPABILITIES {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows none from here on.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(failed("empty the bounding set")(error)),
        }
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(failed("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("set no_new_privs"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("become undumpable"))
}

/// The second line, behind empty namespaces and system call filters: Landlock
/// forbids every access to files by name, TCP ports, abstract sockets and signals
/// to others, as far as the node's kernel has it. Needs `no_new_privs`.
fn rule_out() -> Result<(), JailError> {
    let ruled_out = || {
        let newest = ABI::V6;
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(newest))?
            .handle_access(AccessNet::from_all(newest))?
            .scope(Scope::from_all(newest))?
            .create()?
            .restrict_self()
    };
    ruled_out()
        .map(drop)
        .map_err(|error: RulesetError| JailError {
            step: "restrict itself by Landlock",
            source: io::Error::other(error),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn landlock_rules_files_out() {
        // SAFETY: the call with these arguments only asks for the version.
        let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
        if version < 1 {
            println!("skipped: no Landlock here");
            return;
        }
        // A thread of its own, as it stays ruled out.
        std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            assert!(std::fs::File::open("/etc/passwd").is_ok());
            rule_out().unwrap();
            let error = std::fs::File::open("/etc/passwd").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        })
        .join()
        .unwrap();
    }
}
