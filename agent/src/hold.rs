//! PID 1 of the PID namespace that a pod's containers share, when they do: a
//! copy of this program, `husk-agent hold FD`, which only collects orphans.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::WaitOptions;

use crate::container::LaunchError;
use crate::error::{Doing, OsError};
use crate::init::capabilities::Capabilities;
use crate::init::channel::{AgentChannel, HelperChannel};
use crate::init::mount_options::MountOptions;
use crate::init::plan::{Order, Report};
use crate::init::{self, InitError, mounts, namespaces, rootfs};
use crate::sandbox::STAGE;

/// Whom nothing belongs to.
const NOBODY: u32 = 65534;

/// A held PID namespace.
#[derive(Debug)]
pub struct PidNamespace(File);

impl PidNamespace {
    /// Makes one.
    pub async fn make() -> Result<Self, LaunchError> {
        let (mut channel, theirs) = AgentChannel::pair().doing("make", "a channel")?;
        spawn(theirs)?;
        let mut namespace = None;
        loop {
            let report = channel.receive::<Report>().await;
            match (report.doing("hear", "the holder")?, namespace.take()) {
                (Some((Report::Child(pid), _)), _) => {
                    let file = format!("/proc/{pid}/ns/pid");
                    namespace = Some(File::open(&file).doing("open", &file)?);
                    let answered = channel.send(&Order::Continue).await;
                    answered.doing("tell", "the holder")?;
                }
                // It ends with the guest: nobody waits.
                (Some((Report::Ready, _)), Some(namespace)) => return Ok(Self(namespace)),
                (Some((Report::Failure(failure), _)), _) => {
                    return Err(LaunchError::Reported(failure));
                }
                _ => return Err(LaunchError::Ended),
            }
        }
    }

    /// To join it.
    pub fn file(&self) -> io::Result<File> {
        self.0.try_clone()
    }
}

fn spawn(channel: OwnedFd) -> Result<(), OsError> {
    Command::new("/proc/self/exe")
        .args(["hold", &channel.as_raw_fd().to_string()])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .doing("start", "the holder")?;
    Ok(())
}

/// Makes the namespace, tells of it, and stays.
pub fn main(fd: RawFd) -> ! {
    if let Ok(mut channel) = HelperChannel::from_inherited(fd) {
        let Err(error) = hold(&mut channel);
        // If the agent is gone there is nobody to tell.
        let _ = channel.send(&Report::Failure(error.into()), None);
    }
    std::process::exit(1)
}

fn hold(channel: &mut HelperChannel) -> Result<Infallible, InitError> {
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
    unshare(CloneFlags::CLONE_NEWNS).doing("make", "a mount namespace")?;
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
