//! The agent's side of making a process: starts the helper, answers it, and
//! leaves nothing behind when it fails.

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use husk_protocol::deadline;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::attempt::Attempt;
use crate::error::{Doing, OsError};
use crate::init::channel::{AgentChannel, inherit, keep};
use crate::init::plan::{Failure, Kind, Order, Plan, Report};
use crate::kernel_file;
use crate::oci::IdMapping;
use crate::pidfd::PidFd;
use crate::reaper::{Exit, Reaper};
use crate::socket::DIAL_DEADLINE;
use crate::stdio::ChildStreams;

/// Mounts of hung file systems are the only slow thing a helper meets.
const DEADLINE: Duration = Duration::from_secs(35);

/// How long a killed helper may take to end: one in a request to a file system
/// that the container itself serves may take for ever.
const END_DEADLINE: Duration = Duration::from_secs(10);

// Its streams are dialled before.
const _: () = assert!(
    DIAL_DEADLINE.as_secs() + DEADLINE.as_secs() + END_DEADLINE.as_secs()
        < deadline::MAKING.as_secs()
);

/// A process that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// What the helper says.
    #[error("{0}")]
    Reported(Failure),
    #[error("the process ended while it was being made")]
    Ended,
    #[error("the process ended while it was being made: its memory limit is too low")]
    OutOfMemory,
    #[error("the process was not made within {seconds} s")]
    Deadline { seconds: u64 },
    #[error("the process was given up while it was being made")]
    GivenUp,
    #[error(transparent)]
    Os(#[from] OsError),
}

/// A prepared process.
#[derive(Debug)]
pub struct Launched {
    /// The process.
    pub child: Child,
    /// To tell it to go on, and to hear whether it could.
    pub channel: AgentChannel,
    /// The master of its terminal.
    pub terminal: Option<OwnedFd>,
    /// By when it has to run, if it needs no release.
    pub deadline: Instant,
}

/// A process of which its helper has told.
#[derive(Debug)]
pub struct Child {
    /// As our PID namespace numbers it.
    pub pid: i32,
    /// The same, for good.
    pub pidfd: PidFd,
    /// When it ends.
    pub exit: oneshot::Receiver<Exit>,
}

/// Makes a process up to the point where it reports to be ready. The inherited
/// descriptors are those that the plan names.
pub async fn launch(
    reaper: &Arc<Reaper>,
    plan: &Plan,
    streams: ChildStreams,
    inherited: &[OwnedFd],
    attempt: &Attempt,
) -> Result<Launched, LaunchError> {
    let deadline = Instant::now() + DEADLINE;
    let (channel, theirs) = AgentChannel::pair().doing("make", "a channel")?;
    for fd in inherited {
        inherit(fd).doing("leave open", fd.as_raw_fd())?;
    }
    let helper = Helper::spawn("init", &theirs, streams);
    drop(theirs);
    for fd in inherited {
        // Other helpers start while we talk to this one.
        keep(fd).doing("keep", fd.as_raw_fd())?;
    }
    let helper = helper?;
    let mut child = None;
    let dialogue = converse(channel, plan, &helper, reaper, &mut child);
    let result = attempt.work(before(deadline, dialogue)).await;
    match (result, child) {
        (Ok((channel, terminal)), Some(child)) => Ok(Launched {
            child,
            channel,
            terminal,
            deadline,
        }),
        (Ok(_), None) => Err(LaunchError::Ended),
        (Err(error), child) => {
            // Both end by themselves on any error of theirs; not on one of ours.
            let _ = helper.pidfd.signal(libc::SIGKILL);
            if let Some(child) = child {
                let _ = child.pidfd.signal(libc::SIGKILL);
                if tokio::time::timeout(END_DEADLINE, child.exit)
                    .await
                    .is_err()
                {
                    log::error!("process {} does not end", child.pid);
                }
            }
            Err(error)
        }
    }
}

/// The process that makes the child. The reaper collects it.
#[derive(Debug)]
pub struct Helper {
    pid: i32,
    pidfd: PidFd,
}

impl Helper {
    /// Starts a copy of this program in a role, told over a channel.
    pub fn spawn(role: &str, channel: &OwnedFd, streams: ChildStreams) -> Result<Self, OsError> {
        let or_null = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
        let helper = Command::new("/proc/self/exe")
            .args([role, &channel.as_raw_fd().to_string()])
            .env_clear()
            .stdin(or_null(streams.stdin))
            .stdout(or_null(streams.stdout))
            .stderr(or_null(streams.stderr))
            .spawn()
            .doing("start", "the helper")?;
        let pid = helper.id().cast_signed();
        // The reaper runs on this thread, so it has not been collected yet.
        let pidfd = PidFd::open(pid).doing("open", "the helper")?;
        Ok(Self { pid, pidfd })
    }

    /// As our PID namespace numbers it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The child it tells of, to be watched over from now on.
    pub fn child(&self, pid: i32, reaper: &Reaper) -> Result<Child, LaunchError> {
        let pidfd = PidFd::open(pid).map_err(|_| LaunchError::Ended)?;
        let exit = reaper.claim(pid);
        // The child is ours to collect when its parent is gone. Then it may
        // have been, and the number is nobody's, or another's.
        match self.pidfd.is_running() {
            true => Ok(Child { pid, pidfd, exit }),
            false => Err(LaunchError::Ended),
        }
    }
}

async fn converse(
    mut channel: AgentChannel,
    plan: &Plan,
    helper: &Helper,
    reaper: &Reaper,
    child: &mut Option<Child>,
) -> Result<(AgentChannel, Option<OwnedFd>), LaunchError> {
    channel.send(plan).await.doing("tell", "the helper")?;
    loop {
        let received = channel.receive::<Report>().await;
        match received.doing("hear", "the helper")? {
            Some((Report::IdMapsNeeded, _)) => {
                if let Kind::Container(plan) = &plan.kind {
                    let linux = &plan.spec.linux;
                    let (users, groups) = (&linux.uid_mappings, &linux.gid_mappings);
                    write_id_maps(helper.pid, users, groups)?;
                }
            }
            Some((Report::Child(pid), _)) => *child = Some(helper.child(pid, reaper)?),
            Some((Report::Ready, terminal)) => return Ok((channel, terminal)),
            Some((Report::Failure(failure), _)) => return Err(LaunchError::Reported(failure)),
            None => return Err(LaunchError::Ended),
        }
        let answered = channel.send(&Order::Continue).await;
        answered.doing("tell", "the helper")?;
    }
}

/// Gives maps to the user namespace that a process has just made.
pub fn write_id_maps(pid: i32, users: &[IdMapping], groups: &[IdMapping]) -> Result<(), OsError> {
    for (file, mappings) in [("uid_map", users), ("gid_map", groups)] {
        let line = |map: &IdMapping| format!("{} {} {}\n", map.container_id, map.host_id, map.size);
        let text: String = mappings.iter().map(line).collect();
        let path = format!("/proc/{pid}/{file}");
        kernel_file::write(&path, text).doing("write", &path)?;
    }
    Ok(())
}

/// Lets a prepared process run its program; returns when it does.
pub async fn release(mut channel: AgentChannel) -> Result<(), LaunchError> {
    // A process killed meanwhile has closed its end: its exit tells.
    let _ = channel.send(&Order::Continue).await;
    confirm(channel, Instant::now() + DEADLINE).await
}

/// Waits until a process that needs no release runs its program.
pub async fn confirm(mut channel: AgentChannel, deadline: Instant) -> Result<(), LaunchError> {
    let executed = async {
        match channel.receive::<Report>().await {
            Ok(Some((Report::Failure(failure), _))) => Err(LaunchError::Reported(failure)),
            // The end: the channel closes at the execution.
            _ => Ok(()),
        }
    };
    before(deadline, executed).await
}

async fn before<T>(
    deadline: Instant,
    work: impl Future<Output = Result<T, LaunchError>>,
) -> Result<T, LaunchError> {
    let done = tokio::time::timeout_at(deadline, work).await;
    done.unwrap_or(Err(LaunchError::Deadline {
        seconds: DEADLINE.as_secs(),
    }))
}
