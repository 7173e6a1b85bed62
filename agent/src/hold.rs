//! PID 1 of the PID namespace that a pod's containers share, when they do: a
//! copy of this program, `husk-agent hold FD`, which only collects orphans.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::WaitOptions;
use tokio::task::JoinHandle;

use crate::container::cgroup::Cgroup;
use crate::container::{Child, Helper, LaunchError};
use crate::error::{Doing, OsError};
use crate::init::capabilities::Capabilities;
use crate::init::channel::{AgentChannel, HelperChannel, inherit};
use crate::init::mount_options::MountOptions;
use crate::init::plan::{Order, Report};
use crate::init::{self, InitError, mounts, namespaces, rootfs};
use crate::kernel_file;
use crate::pod_namespaces::PodUsers;
use crate::reaper::Reaper;
use crate::sandbox::STAGE;
use crate::stdio::ChildStreams;

/// Whom nothing belongs to.
const NOBODY: u32 = 65534;

/// Its cgroup: containers' ids don't start with a dot.
const CGROUP: &str = ".holder";

/// A tracer shall get nothing from it that its own container doesn't give.
const LIMITS: [(&str, &str); 2] = [("pids.max", "1"), ("memory.max", "16M")];

/// How eagerly the kernel kills it for memory: all containers' processes end
/// with it. That of a node's pause container.
const OOM_SCORE: &str = "-998";

/// A held PID namespace.
#[derive(Debug)]
pub struct PidNamespace {
    file: File,
    /// Ends when nothing is left of the holder.
    watch: JoinHandle<()>,
}

impl PidNamespace {
    /// Makes one, which belongs to the pod's users if it has its own.
    pub async fn make(
        cgroup_root: &Path,
        reaper: &Reaper,
        users: Option<&PodUsers>,
    ) -> Result<Self, LaunchError> {
        let cgroup = Cgroup::create(cgroup_root, CGROUP)?;
        match make_in(&cgroup, reaper, users).await {
            Ok((file, holder)) => Ok(Self {
                file,
                watch: tokio::spawn(watch_over(holder, cgroup)),
            }),
            Err(error) => {
                remove(&cgroup).await;
                Err(error)
            }
        }
    }

    /// To join it.
    pub fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Whether its holder has ended, and every process in it.
    pub fn has_ended(&self) -> bool {
        self.watch.is_finished()
    }
}

async fn make_in(
    cgroup: &Cgroup,
    reaper: &Reaper,
    users: Option<&PodUsers>,
) -> Result<(File, Child), LaunchError> {
    cgroup.filter_devices(&[], &[])?;
    let (mut channel, theirs) = AgentChannel::pair().doing("make", "a channel")?;
    let users = users.map(PodUsers::file).transpose();
    let users = users.doing("open", "the pod's user namespace")?;
    if let Some(users) = &users {
        // Nothing waits until the helper has it, so no other one is started.
        inherit(users).doing("leave open", users.as_raw_fd())?;
    }
    let helper = Helper::spawn("hold", &theirs, ChildStreams::default())?;
    drop(theirs);
    let order = (cgroup.procs_file(), users.as_ref().map(AsRawFd::as_raw_fd));
    drop(users);
    let sent = channel.send(&order).await;
    sent.doing("tell", "the holder")?;
    let mut holder = None;
    loop {
        let report = channel.receive::<Report>().await;
        match (report.doing("hear", "the holder")?, holder.take()) {
            (Some((Report::Child(pid), _)), _) => {
                let file = format!("/proc/{pid}/ns/pid");
                let namespace = File::open(&file).doing("open", &file)?;
                holder = Some((namespace, helper.child(pid, reaper)?));
                // It is made: no other process is.
                limit(cgroup)?;
                protect(pid);
                let answered = channel.send(&Order::Continue).await;
                answered.doing("tell", "the holder")?;
            }
            (Some((Report::Ready, _)), Some(holder)) => return Ok(holder),
            (Some((Report::Failure(failure), _)), _) => {
                return Err(LaunchError::Reported(failure));
            }
            _ => return Err(LaunchError::Ended),
        }
    }
}

fn limit(cgroup: &Cgroup) -> Result<(), OsError> {
    for (name, value) in LIMITS {
        match kernel_file::write(cgroup.path().join(name), value) {
            // A kernel of somebody else's may lack the controller.
            Err(error) if error.kind() == io::ErrorKind::NotFound => log::warn!("no {name}"),
            written => written.doing("set the holder's", name)?,
        }
    }
    Ok(())
}

fn protect(pid: i32) {
    // On a machine of somebody else's we may lack the right.
    if let Err(error) = kernel_file::write(format!("/proc/{pid}/oom_score_adj"), OOM_SCORE) {
        log::warn!("cannot set the holder's oom_score_adj: {error}");
    }
}

async fn watch_over(holder: Child, cgroup: Cgroup) {
    let _ = holder.exit.await;
    log::error!("the holder of the pod's PID namespace has ended, and all processes in it");
    remove(&cgroup).await;
}

async fn remove(cgroup: &Cgroup) {
    if let Err(error) = cgroup.remove().await {
        log::error!("{}: {error}", cgroup.path().display());
    }
}

/// Makes the namespace, tells of it, and stays.
pub fn main(fd: RawFd) -> ! {
    HelperChannel::serve(fd, hold)
}

fn hold(channel: &mut HelperChannel) -> Result<Infallible, InitError> {
    let order = channel.receive().doing("read", "the cgroup")?;
    let (procs, users): (PathBuf, Option<RawFd>) = order;
    namespaces::join_cgroup(&[procs])?;
    if let Some(users) = users {
        namespaces::join_user_namespace(users)?;
    }
    unshare(CloneFlags::CLONE_NEWPID).doing("make", "a PID namespace")?;
    init::become_child(channel)?;
    leave_files()?;
    give_up_rights()?;
    channel
        .send(&Report::Ready, None)
        .doing("tell", "the agent")?;
    close_all().doing("close", "inherited descriptors")?;
    collect()
}

/// Containers that may trace processes reach what this one sees: nothing.
fn leave_files() -> Result<(), InitError> {
    let flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP;
    unshare(flags).doing("make", "namespaces")?;
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", flags).doing("set the propagation of", "/")?;
    let options = MountOptions::parse(["ro", "nosuid", "nodev", "noexec"]);
    let root = mounts::new_filesystem("tmpfs", None, &options, Path::new("/"))?;
    let stage =
        openat(CWD, STAGE, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).doing("open", STAGE)?;
    mounts::attach(&root, &stage).doing("mount", STAGE)?;
    Ok(rootfs::pivot(&root)?)
}

/// And what it may do: nothing.
fn give_up_rights() -> Result<(), OsError> {
    let nothing = Capabilities::default();
    nothing.limit_bounding()?;
    setgroups(&[]).doing("drop", "groups")?;
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setresgid(gid, gid, gid).doing("change to group", gid)?;
    setresuid(uid, uid, uid).doing("change to user", uid)?;
    nothing.finish()?;
    rustix::thread::set_no_new_privs(true).doing("set", "no_new_privs")?;
    // Neither may that user's other processes trace it.
    namespaces::hide_from_container()
}

fn close_all() -> io::Result<()> {
    // SAFETY: numbers. Nothing is used after it but signals and children; the
    // channel is never dropped.
    match unsafe { libc::syscall(libc::SYS_close_range, 0_u32, u32::MAX, 0_u32) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn collect() -> ! {
    // Containers see this process.
    let _ = rustix::thread::set_name(c"husk-agent");
    // SAFETY: sets made by the library, on the stack until the calls return.
    unsafe {
        let mut child = std::mem::zeroed();
        libc::sigemptyset(&raw mut child);
        libc::sigaddset(&raw mut child, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const child, std::ptr::null_mut());
        loop {
            libc::sigwaitinfo(&raw const child, std::ptr::null_mut());
            while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        }
    }
}
