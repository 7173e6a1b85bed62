//! The helper: a fresh, single-threaded copy of this program that turns itself
//! into a container's process. The agent starts it as `husk-agent init FD` and
//! tells it what to become over that descriptor (see `plan`).

pub mod capabilities;
pub mod channel;
mod copy_up;
pub mod devices;
mod executable;
mod hook;
mod in_root;
pub mod mount_options;
pub mod mounts;
pub mod namespaces;
pub mod plan;
pub mod program;
pub mod rootfs;
mod seccomp;
pub mod terminal;

use std::convert::Infallible;
use std::io;
use std::os::fd::{OwnedFd, RawFd};

use nix::unistd::{ForkResult, fork};
use rustix::io::retry_on_intr;

use crate::error::{Doing, OsError, chain};
use channel::HelperChannel;
use executable::{ExecutableError, FileId};
use plan::{Failure, FailureKind, Kind, Order, Plan, Report};

/// Why the helper gave up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error(transparent)]
    Executable(#[from] ExecutableError),
    #[error("startContainer hook {path}: {reason}")]
    Hook { path: String, reason: String },
    #[error("{field} is invalid: {reason}")]
    Invalid { field: &'static str, reason: String },
    #[error("cannot mount {target} ({fstype}): {log}")]
    Filesystem {
        target: String,
        fstype: String,
        /// What the file system said about it.
        log: String,
        #[source]
        source: io::Error,
    },
    #[error("seccomp filter")]
    Seccomp(#[source] libseccomp::error::SeccompError),
    #[error(transparent)]
    Os(#[from] OsError),
}

impl From<InitError> for Failure {
    fn from(error: InitError) -> Self {
        let kind = match &error {
            InitError::Executable(error) if error.is_missing() => FailureKind::NotFound,
            InitError::Executable(_) => FailureKind::Denied,
            InitError::Invalid { .. } => FailureKind::Invalid,
            _ => FailureKind::Other,
        };
        Self {
            kind,
            message: chain(&error),
        }
    }
}

/// Becomes what the plan says, or says why not and ends.
pub fn main(fd: RawFd) -> ! {
    // Standard error is the container's by now: no word of ours may go there.
    std::panic::set_hook(Box::new(|_| {}));
    HelperChannel::serve(fd, run)
}

fn run(channel: &mut HelperChannel) -> Result<Infallible, InitError> {
    let plan: Plan = channel.receive().doing("read", "the plan")?;
    let own = FileId::own().doing("find", "this program")?;
    // Its building goes through a file, and takes memory: before limits and
    // settings of the container's hold.
    let filter = plan.kind.seccomp().map(seccomp::build).transpose()?;
    let filter = filter.flatten();
    namespaces::hide_from_container()?;
    namespaces::join_cgroup(&plan.cgroups)?;
    match plan.kind {
        Kind::Container(container) => {
            let process = container.spec.process.as_ref();
            let process = process.ok_or_else(|| InitError::Invalid {
                field: "process",
                reason: "missing".to_owned(),
            })?;
            program::set_oom_score(process)?;
            namespaces::enter_new(channel, &container)?;
            become_child(channel)?;
            let terminal = rootfs::enter(&container, plan.terminal)?;
            program::set_personality(container.spec.linux.personality)?;
            let hooks = hook::Hooks::prepare(&container.spec, &container.id)?;
            let program = program::prepare(process, filter, terminal.as_ref(), own)?;
            let master = terminal.as_ref().map(|terminal| &terminal.master);
            channel
                .send(&Report::Ready, master)
                .doing("tell", "the agent")?;
            let Order::Continue = channel.receive().doing("wait for", "the agent")?;
            program.execute(hooks, own)
        }
        Kind::Exec(exec) => {
            program::set_oom_score(&exec.process)?;
            namespaces::join(&exec)?;
            become_child(channel)?;
            let terminal = match plan.terminal {
                true => Some(terminal::Terminal::open_in_own_root()?),
                false => None,
            };
            program::set_personality(exec.personality)?;
            let program = program::prepare(&exec.process, filter, terminal.as_ref(), own)?;
            let master = terminal.as_ref().map(|terminal| &terminal.master);
            channel
                .send(&Report::Ready, master)
                .doing("tell", "the agent")?;
            program.execute(hook::Hooks::default(), own)
        }
    }
}

/// Goes on in a child, since only a child enters a new PID or time namespace.
/// The child becomes the agent's own when its parent ends, which is not before
/// the agent watches over it. A parent that is killed before takes it along.
pub fn become_child(channel: &mut HelperChannel) -> Result<(), OsError> {
    let (parent_gone, parent_alive) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).doing("make", "a pipe")?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.doing("make", "the container's process")? {
        ForkResult::Parent { child } => {
            let told = channel.send(&Report::Child(child.as_raw()), None);
            let answered = told.and_then(|()| channel.receive::<Order>());
            if answered.is_ok() {
                let _ = rustix::io::write(&parent_alive, &[0]);
            }
            std::process::exit(i32::from(answered.is_err()))
        }
        ForkResult::Child => {
            drop(parent_alive);
            match may_go_on(&parent_gone) {
                true => Ok(()),
                // Nobody watches over us.
                false => std::process::exit(1),
            }
        }
    }
}

/// Whether the parent said so before it ended. Not before that: two writers on
/// the channel would mix their messages.
fn may_go_on(parent_gone: &OwnedFd) -> bool {
    let mut byte = [0];
    let mut read = || retry_on_intr(|| rustix::io::read(parent_gone, &mut byte));
    read() == Ok(1) && read() == Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_parent_is_no_word_of_it() {
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (parent_gone, parent_alive) = pipe();
        drop(parent_alive);
        assert!(!may_go_on(&parent_gone));
        let (parent_gone, parent_alive) = pipe();
        rustix::io::write(&parent_alive, &[0]).unwrap();
        drop(parent_alive);
        assert!(may_go_on(&parent_gone));
    }
}
