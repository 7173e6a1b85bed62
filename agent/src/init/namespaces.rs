//! Cgroup and namespaces of the process to be.

use std::os::fd::{BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, setresgid, setresuid};

use super::InitError;
use super::channel::HelperChannel;
use super::plan::{ContainerPlan, ExecPlan, Order, PidNamespace, Report};
use super::program;
use crate::error::{Doing, OsError};
use crate::kernel_file;
use crate::oci::{NamespaceKind, Spec};

/// libc has no name for it on every target.
const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(0x80);

/// Makes `/proc/self` of this process root's alone, so that a container which
/// sees it joining can't look into it.
pub fn hide_from_container() -> Result<(), OsError> {
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .doing("hide", "the helper")
}

/// Joins the first cgroup that takes processes.
pub fn join_cgroup(candidates: &[PathBuf]) -> Result<(), OsError> {
    let mut result = Ok(());
    for procs in candidates {
        let joined = kernel_file::write(procs, b"0");
        result = joined.doing("join", procs.display());
        match &result {
            // The container has delegated parts of its cgroup to itself: with
            // controllers below it, it may hold no processes of its own.
            Err(error) if error.is(libc::EBUSY) => continue,
            _ => return result,
        }
    }
    result
}

/// Enters the new namespaces of a container's first process. PID and time take
/// effect in the next child.
pub fn enter_new(channel: &mut HelperChannel, plan: &ContainerPlan) -> Result<(), InitError> {
    // Needs rights over the other namespace that a new user namespace lacks.
    if let PidNamespace::Join(fd) = plan.pid_namespace {
        // SAFETY: the agent left this descriptor open for us.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        setns(fd, CloneFlags::CLONE_NEWPID).doing("join", "the PID namespace")?;
    }
    if let Some(user) = find(&plan.spec, NamespaceKind::User) {
        log::debug!("user namespace {user:?}");
        if let Some(process) = &plan.spec.process {
            program::set_resource_limits(process)?;
        }
        match plan.users {
            Some(fd) => join_user_namespace(fd)?,
            None => enter_user_namespace(channel)?,
        }
    }
    let mut flags = CloneFlags::CLONE_NEWNS;
    for (kind, flag) in [
        (NamespaceKind::Ipc, CloneFlags::CLONE_NEWIPC),
        (NamespaceKind::Uts, CloneFlags::CLONE_NEWUTS),
    ] {
        // With a path it is the pod's, which we are in already.
        if matches!(find(&plan.spec, kind), Some(None)) {
            flags |= flag;
        }
    }
    if find(&plan.spec, NamespaceKind::Cgroup).is_some() {
        flags |= CloneFlags::CLONE_NEWCGROUP;
    }
    if find(&plan.spec, NamespaceKind::Time).is_some() {
        flags |= CLONE_NEWTIME;
    }
    if plan.pid_namespace == PidNamespace::Own {
        flags |= CloneFlags::CLONE_NEWPID;
    }
    unshare(flags).doing("make", "namespaces")?;
    if flags.contains(CLONE_NEWTIME) {
        write_time_offsets(&plan.spec)?;
    }
    if flags.contains(CloneFlags::CLONE_NEWUTS) {
        name_host(&plan.spec)?;
    }
    Ok(())
}

/// Joins the namespaces of a running container.
pub fn join(plan: &ExecPlan) -> Result<(), InitError> {
    // SAFETY: the agent left this descriptor open for us.
    let pidfd = unsafe { BorrowedFd::borrow_raw(plan.pidfd) };
    let flags = CloneFlags::from_bits_retain(plan.namespaces.cast_signed());
    if flags.contains(CloneFlags::CLONE_NEWUSER) {
        program::set_resource_limits(&plan.process)?;
    }
    setns(pidfd, flags).doing("join", "the container's namespaces")?;
    if flags.contains(CloneFlags::CLONE_NEWUSER) {
        become_namespace_root()?;
    }
    Ok(())
}

/// The namespace of this kind in a spec, and its path.
pub fn find(spec: &Spec, kind: NamespaceKind) -> Option<Option<&Path>> {
    let namespaces = &spec.linux.namespaces;
    let found = namespaces.iter().find(|namespace| namespace.kind == kind)?;
    let path = found.path.as_deref();
    Some(path.filter(|path| !path.as_os_str().is_empty()))
}

/// Becomes root in the user namespace of this descriptor.
pub fn join_user_namespace(fd: RawFd) -> Result<(), OsError> {
    // SAFETY: the agent left this descriptor open for us.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    setns(fd, CloneFlags::CLONE_NEWUSER).doing("join", "the pod's user namespace")?;
    become_namespace_root()
}

/// Becomes root in a new user namespace, of which the agent writes the maps.
pub fn enter_user_namespace(channel: &mut HelperChannel) -> Result<(), InitError> {
    unshare(CloneFlags::CLONE_NEWUSER).doing("make", "a user namespace")?;
    channel
        .send(&Report::IdMapsNeeded, None)
        .doing("tell", "the agent")?;
    let Order::Continue = channel.receive().doing("wait for", "the id maps")?;
    become_namespace_root()?;
    Ok(())
}

fn become_namespace_root() -> Result<(), OsError> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).doing("become", "root's group of the user namespace")?;
    setresuid(uid, uid, uid).doing("become", "root of the user namespace")
}

fn write_time_offsets(spec: &Spec) -> Result<(), OsError> {
    for (clock, offset) in &spec.linux.time_offsets {
        let line = format!("{clock} {} {}\n", offset.secs, offset.nanosecs);
        kernel_file::write("/proc/self/timens_offsets", line).doing("set", "a time offset")?;
    }
    Ok(())
}

fn name_host(spec: &Spec) -> Result<(), OsError> {
    if let Some(name) = &spec.hostname {
        rustix::system::sethostname(name.as_bytes()).doing("set host name", name)?;
    }
    if let Some(name) = &spec.domainname {
        rustix::system::setdomainname(name.as_bytes()).doing("set domain name", name)?;
    }
    Ok(())
}
