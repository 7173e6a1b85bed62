//! What the process gives up before it listens to the VMM.
//!
//! Afterwards it sees the served tree and nothing else of the host, cannot
//! name a socket or a key, is a user of its own and holds only a file server's
//! capabilities. Mounts that the shim adds below the tree still appear. The shim
//! starts it in a PID namespace of its own, so it can name no other process
//! either.

use std::collections::BTreeSet;
use std::error::Error;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
};
use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, Gid, Uid, UnshareFlags};

use crate::credentials::CAPABILITIES;
use crate::server::Resources;

/// References to files held open at most. Each pins an inode of the host, and
/// the node's table of open files is shared by all pods, so this is not the
/// number of files that a pod may know.
const REFERENCES: u64 = 8192;

/// Descriptors open at most, the guest's open files among them, for the same
/// reason: what the process inherits may be millions.
const DESCRIPTORS: u64 = 1 << 18;

/// The mount flags of the tree's own mount, which only carries mount points:
/// a guest that could replace one of those would choose where the shim mounts.
/// What is mounted below keeps the flags that the shim gave it, which are
/// these, read-only apart.
const TREE: MountFlags = MountFlags::RDONLY
    .union(MountFlags::NODEV)
    .union(MountFlags::NOSUID)
    .union(MountFlags::NOEXEC);

/// The newest Landlock that is asked for; what a node's lacks is left out.
const LANDLOCK: ABI = ABI::V6;

/// Who the process is, however it acts on files. Not root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// The step that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct JailError {
    step: &'static str,
    #[source]
    source: Errno,
}

fn step<T>(step: &'static str, result: Result<T, Errno>) -> Result<T, JailError> {
    result.map_err(|source| JailError { step, source })
}

/// Leaves everything but the tree behind. `source` must be a mount point.
/// The capabilities stay, for [`crate::server::Server::new`] and [`lock`].
pub fn enter(source: &Path) -> Result<Resources, JailError> {
    // A mount of its own, whose `..` is itself.
    let proc_self_fd = step(
        "clone /proc/self/fd",
        rustix::mount::open_tree(
            rustix::fs::CWD,
            c"/proc/self/fd",
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        ),
    )?;
    forbid_core_dumps()?;
    let namespaces = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: nothing in this process relies on what is unshared; descriptors,
    // the subject of the function's warning, stay shared.
    step("enter new namespaces", unsafe {
        rustix::thread::unshare_unsafe(namespaces)
    })?;
    let path_only = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let this_thread = step(
        "open /proc/thread-self",
        rustix::fs::open(c"/proc/thread-self", path_only, Mode::empty()),
    )?;
    // Mounts of the shim arrive here, none of ours leaves.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    step(
        "stop mounts from leaving",
        rustix::mount::mount_change(c"/", slave),
    )?;
    step("enter the tree", rustix::process::chdir(source))?;
    step(
        "make the tree's own mount read-only",
        rustix::mount::mount_remount(c".", MountFlags::BIND | TREE, c""),
    )?;
    // The old root ends up on top of the new one and is taken off.
    step(
        "make the tree the root",
        rustix::process::pivot_root(c".", c"."),
    )?;
    step(
        "let go of the old root",
        rustix::mount::unmount(c".", UnmountFlags::DETACH),
    )?;
    step("enter the root", rustix::process::chdir(c"/"))?;
    let top = step(
        "open the root",
        rustix::fs::open(c"/", path_only, Mode::empty()),
    )?;
    // It tells of mounts below the root that its opener had.
    let mountinfo = step(
        "open the mount table",
        rustix::fs::openat(
            this_thread,
            c"mountinfo",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        ),
    )?;
    Ok(Resources {
        top,
        proc_self_fd,
        mountinfo: Some(mountinfo),
        reference_budget: limit_resources()?,
    })
}

/// Forbids core dumps, which would hold the guest's memory. Needs /proc.
///
/// Being undumpable is no help: the kernel takes that back whenever the process
/// changes the user it acts for, and asks fs.suid_dumpable instead. What is here
/// stays.
fn forbid_core_dumps() -> Result<(), JailError> {
    // Not 0, which a core_pattern that is a program ignores, while 1 is for it
    // to leave the process alone and too little for a file (fs/coredump.c).
    step(
        "forbid core dumps",
        rustix::process::setrlimit(Resource::Core, exactly(1)),
    )?;
    // A core_pattern that is a socket asks for no limit; what it gets holds no
    // mapping of any kind (core(5)).
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let filtered = rustix::fs::open(c"/proc/self/coredump_filter", flags, Mode::empty())
        .and_then(|filter| rustix::io::write(filter, b"0"));
    match filtered {
        // A kernel without core dumps.
        Err(Errno::NOENT) => Ok(()),
        result => step("keep memory out of core dumps", result.map(drop)),
    }
}

/// Limits what the process uses, and returns how many references to hold. The size
/// of files stays without a limit: they are the guest's.
fn limit_resources() -> Result<usize, JailError> {
    let inherited = rustix::process::getrlimit(Resource::Nofile).maximum;
    let files = inherited.unwrap_or(u64::MAX).min(DESCRIPTORS);
    for (resource, most) in [
        (Resource::Nofile, files),
        // This thread. Its user, which is yet to come, has no other process.
        (Resource::Nproc, 1),
        (Resource::Memlock, 0),
    ] {
        step(
            "limit resources",
            rustix::process::setrlimit(resource, exactly(most)),
        )?;
    }
    // The rest is for the guest's open files.
    Ok(usize::try_from((files / 2).min(REFERENCES)).unwrap_or(usize::MAX))
}

fn exactly(most: u64) -> Rlimit {
    Rlimit {
        current: Some(most),
        maximum: Some(most),
    }
}

/// Descriptors that are open and not on the list.
#[derive(Debug, thiserror::Error)]
#[error("descriptors {found:?} are open, not {listed:?}")]
pub struct DescriptorError {
    found: BTreeSet<RawFd>,
    listed: BTreeSet<RawFd>,
}

/// Refuses to go on with a descriptor besides the standard streams, the front
/// end's `socket` and `resources`.
pub fn check_descriptors(
    socket: BorrowedFd<'_>,
    resources: &Resources,
) -> Result<(), Box<dyn Error>> {
    let Resources {
        top,
        proc_self_fd,
        mountinfo,
        reference_budget: _,
    } = resources;
    let mut listed = BTreeSet::from([0, 1, 2, socket.as_raw_fd()]);
    listed.extend([top.as_raw_fd(), proc_self_fd.as_raw_fd()]);
    listed.extend(mountinfo.as_ref().map(AsRawFd::as_raw_fd));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(proc_self_fd, c".", flags, Mode::empty())?;
    let own = directory.as_raw_fd();
    let mut directory = Dir::new(directory)?;
    let mut found = BTreeSet::new();
    while let Some(entry) = directory.read().transpose()? {
        // Not `.` and `..`.
        let number = entry
            .file_name()
            .to_str()
            .unwrap_or_default()
            .parse::<RawFd>();
        found.extend(number.ok().filter(|number| *number != own));
    }
    match found.is_subset(&listed) {
        true => Ok(()),
        false => Err(DescriptorError { found, listed }.into()),
    }
}

/// Takes the way back: what is not a file server's capability leaves the
/// bounding set, no program gains any, root's user is `user`'s. Call before
/// [`crate::server::Server::new`], which drops the rest.
pub fn lock(user: User) -> Result<(), JailError> {
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if CAPABILITIES.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => (),
            // Past the last that the kernel knows.
            Err(Errno::INVAL) => break,
            Err(error) => return step("bound capabilities", Err(error)),
        }
    }
    step(
        "forbid new privileges",
        rustix::thread::set_no_new_privs(true),
    )?;
    step("change the user", change(user))?;
    // Until it first acts for another user, see `forbid_core_dumps`.
    step(
        "forbid tracing",
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable),
    )
}

/// Makes the process `user`'s, with the capabilities that it has. The way back is
/// closed by the system call filter, which knows `setfsuid` alone.
fn change(User { uid, gid }: User) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    let bits = rustix::thread::capabilities_secure_bits()?;
    rustix::thread::set_capabilities_secure_bits(bits | CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
}

/// The second line, behind mount namespace and system call filter: whatever has a
/// name is opened and changed below `top` alone, what is mounted there later
/// included. Landlock says nothing of attributes, of references (`O_PATH`), and of
/// what is open already. Needs `no_new_privs`.
pub fn rule_out(top: BorrowedFd<'_>) -> Result<(), RulesetError> {
    let handled = AccessFs::from_all(LANDLOCK);
    // Nothing is executed, and no device is opened.
    let unused = AccessFs::Execute | AccessFs::IoctlDev;
    let allowed: BitFlags<AccessFs> = handled & !unused;
    Ruleset::default()
        // The first Landlock lets nobody move a file to another directory.
        .set_compatibility(CompatLevel::SoftRequirement)
        .handle_access(AccessFs::Refer)?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(handled)?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .add_rule(PathBeneath::new(top, allowed))?
        .restrict_self()
        .map(drop)
}
