//! The agent's side of making a process: starts the helper, answers it, and
//! leaves nothing behind when it fails.

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::oneshot;

use crate::error::{Doing, OsError};
use crate::init::channel::{AgentChannel, inherit};
use crate::init::plan::{Failure, Kind, Order, Plan, Report};
use crate::kernel_file;
use crate::oci::{IdMapping, Spec};
use crate::reaper::{Exit, Launching, Reaper};
use crate::stdio::ChildStreams;

/// Mounts of hung file systems are the only slow thing a helper meets.
const DEADLINE: Duration = Duration::from_secs(60);

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
    #[error(transparent)]
    Os(#[from] OsError),
}

/// A prepared process.
#[derive(Debug)]
pub struct Launched {
    /// As our PID namespace numbers it.
    pub pid: i32,
    /// When it ends.
    pub exit: oneshot::Receiver<Exit>,
    /// To tell it to go on, and to hear whether it could.
    pub channel: AgentChannel,
    /// The master of its terminal.
    pub terminal: Option<OwnedFd>,
}

/// Makes a process up to the point where it reports to be ready. The inherited
/// descriptors are those that the plan names.
pub async fn launch(
    reaper: &Arc<Reaper>,
    plan: &Plan,
    streams: ChildStreams,
    inherited: &[OwnedFd],
) -> Result<Launched, LaunchError> {
    let launching = reaper.launching();
    let (channel, theirs) = AgentChannel::pair().doing("make", "a channel")?;
    for fd in inherited {
        inherit(fd).doing("leave open", fd.as_raw_fd())?;
    }
    let helper = spawn(&theirs, streams)?;
    drop(theirs);
    let mut child = None;
    let dialogue = converse(channel, plan, helper, &launching, &mut child);
    let result = match tokio::time::timeout(DEADLINE, dialogue).await {
        Ok(result) => result,
        Err(_) => Err(LaunchError::Deadline {
            seconds: DEADLINE.as_secs(),
        }),
    };
    match (result, child) {
        (Ok((channel, terminal)), Some((pid, exit))) => Ok(Launched {
            pid,
            exit,
            channel,
            terminal,
        }),
        (Ok(_), None) => Err(LaunchError::Ended),
        (Err(error), child) => {
            // Both end by themselves on any error of theirs; not on a deadline.
            for pid in child
                .as_ref()
                .map(|(pid, _)| *pid)
                .into_iter()
                .chain([helper])
            {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            if let Some((_, exit)) = child {
                let _ = exit.await;
            }
            Err(error)
        }
    }
}

fn spawn(channel: &OwnedFd, streams: ChildStreams) -> Result<i32, OsError> {
    let or_null = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
    let helper = Command::new("/proc/self/exe")
        .args(["init", &channel.as_raw_fd().to_string()])
        .env_clear()
        .stdin(or_null(streams.stdin))
        .stdout(or_null(streams.stdout))
        .stderr(or_null(streams.stderr))
        .spawn()
        .doing("start", "the helper")?;
    // The reaper collects it.
    Ok(helper.id().cast_signed())
}

async fn converse(
    mut channel: AgentChannel,
    plan: &Plan,
    helper: i32,
    launching: &Launching,
    child: &mut Option<(i32, oneshot::Receiver<Exit>)>,
) -> Result<(AgentChannel, Option<OwnedFd>), LaunchError> {
    channel.send(plan).await.doing("tell", "the helper")?;
    loop {
        let received = channel.receive::<Report>().await;
        match received.doing("hear", "the helper")? {
            Some((Report::IdMapsNeeded, _)) => {
                if let Kind::Container(plan) = &plan.kind {
                    write_id_maps(helper, &plan.spec)?;
                }
                channel
                    .send(&Order::Continue)
                    .await
                    .doing("tell", "the helper")?;
            }
            Some((Report::Child(pid), _)) => *child = Some((pid, launching.claim(pid))),
            Some((Report::Ready, terminal)) => return Ok((channel, terminal)),
            Some((Report::Failure(failure), _)) => return Err(LaunchError::Reported(failure)),
            None => return Err(LaunchError::Ended),
        }
    }
}

fn write_id_maps(pid: i32, spec: &Spec) -> Result<(), OsError> {
    let maps = [
        ("uid_map", &spec.linux.uid_mappings),
        ("gid_map", &spec.linux.gid_mappings),
    ];
    for (file, mappings) in maps {
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
    confirm(channel).await
}

/// Waits until a process that needs no release runs its program.
pub async fn confirm(mut channel: AgentChannel) -> Result<(), LaunchError> {
    match tokio::time::timeout(DEADLINE, channel.receive::<Report>()).await {
        Ok(Ok(Some((Report::Failure(failure), _)))) => Err(LaunchError::Reported(failure)),
        // The end: the channel closes at the execution.
        Ok(_) => Ok(()),
        Err(_) => Err(LaunchError::Deadline {
            seconds: DEADLINE.as_secs(),
        }),
    }
}
