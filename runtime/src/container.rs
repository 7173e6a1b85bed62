//! A container of the pod and its processes, as containerd knows them.
//!
//!     Creating ──> Created ──start──> Starting ──> Running ──exit──> Stopped
//!                     └──────────────exit──────────────────────────────^
//!
//! A container that is paused is Running with `paused` set. Only the pod's task
//! changes any of this.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::types::task::Status;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::agent_client::{End, Exit};
use crate::container_files::ContainerFiles;
use crate::error::Error;
use crate::growth::AgreedLimits;
use crate::hook::ContainerHooks;
use crate::stand_in::StandIn;
use crate::stdio::{Stdio, StdioPaths};

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its bundle, for containerd.
    pub bundle: PathBuf,
    /// What it runs in.
    pub kind: Kind,
    /// What its pid on the node is that of; none: the VMM.
    pub stand_in: Option<StandIn>,
    /// What is run at the turns of its life, once it is made.
    pub hooks: Option<Arc<ContainerHooks>>,
    /// Its first process.
    pub init: Process,
    /// Processes that were added, running or not.
    pub execs: BTreeMap<String, Exec>,
    /// What it may use.
    pub limits: AgreedLimits,
    /// Frozen.
    pub paused: bool,
    /// When containerd was last told that its memory ran out.
    pub oom_told: Option<Instant>,
    /// When containerd asked for it, wall clock.
    pub created_ns: u64,
    /// containerd did not wait for its creation: it goes as soon as it is there.
    pub unwanted: bool,
}

/// What a container is to the guest.
#[derive(Debug)]
pub enum Kind {
    /// The pod's own: it stands for the machine and is never run.
    Sandbox,
    /// One with processes. It has files from its creation to its deletion.
    Guest(Option<Box<ContainerFiles>>),
}

/// A process that was added to a container.
#[derive(Debug)]
pub struct Exec {
    /// It.
    pub process: Process,
    /// OCI `process` object.
    pub spec: Vec<u8>,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Where its streams go.
    pub paths: StdioPaths,
    /// Its streams, once they are open.
    pub stdio: Option<Stdio>,
    state: State,
    /// It has ended; its output is still being taken.
    ending: bool,
    /// Its input was closed, perhaps before it was open.
    input_closed: bool,
    /// It ended before its start was answered.
    early: Option<End>,
    exit: watch::Sender<Option<Exit>>,
}

/// Where in its life a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The guest prepares it.
    Creating,
    /// Ready to be started.
    Created,
    /// The guest executes it.
    Starting,
    /// It runs.
    Running,
    /// It has ended.
    Stopped(Exit),
}

impl State {
    /// For errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopped(_) => "stopped",
        }
    }
}

impl Process {
    /// One that is not there yet.
    pub fn new(paths: StdioPaths, state: State) -> Self {
        Self {
            paths,
            stdio: None,
            state,
            ending: false,
            input_closed: false,
            early: None,
            exit: watch::Sender::new(None),
        }
    }

    /// Where in its life it is.
    pub fn state(&self) -> State {
        self.state
    }

    /// It is prepared.
    pub fn created(&mut self, stdio: Option<Stdio>) {
        self.state = State::Created;
        if let Some(stdio) = stdio {
            self.opened(stdio);
        }
    }

    /// Its streams are open.
    pub fn opened(&mut self, mut stdio: Stdio) {
        // A client may be done before the guest has answered.
        if self.input_closed {
            stdio.close_input();
        }
        self.stdio = Some(stdio);
    }

    /// It shall see the end of its input, as soon as it has one.
    pub fn close_input(&mut self) {
        self.input_closed = true;
        if let Some(stdio) = &mut self.stdio {
            stdio.close_input();
        }
    }

    /// It is about to be executed.
    ///
    /// # Errors
    /// It is not `Created`.
    pub fn begin_start(&mut self, id: &str) -> Result<(), Error> {
        if self.state != State::Created || self.ending {
            return Err(self.refuse("start", id));
        }
        self.state = State::Starting;
        Ok(())
    }

    /// Its start was answered; how it ended, if it has already.
    pub fn finish_start(&mut self, started: bool) -> Option<End> {
        if self.state == State::Starting {
            self.state = if started {
                State::Running
            } else {
                State::Created
            };
        }
        self.early.take()
    }

    /// It has ended. True when its output is to be taken now, and then
    /// [`Process::finish_exit`] called.
    pub fn begin_exit(&mut self, end: End) -> bool {
        match self.state {
            State::Starting => {
                self.early.get_or_insert(end);
                false
            }
            State::Created | State::Running if !self.ending => {
                self.ending = true;
                true
            }
            _ => false,
        }
    }

    /// Its output was taken: now everybody may know.
    pub fn finish_exit(&mut self, exit: Exit) {
        self.state = State::Stopped(exit);
        self.ending = false;
        self.exit.send_replace(Some(exit));
    }

    /// Follows its end.
    pub fn watch(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }

    /// It may get signals and the like.
    ///
    /// # Errors
    /// It has ended, or is not there yet.
    pub fn check_alive(&self, action: &'static str, id: &str) -> Result<(), Error> {
        match self.state {
            State::Stopped(_) => Err(Error::Finished),
            State::Creating => Err(self.refuse(action, id)),
            State::Created | State::Starting | State::Running => Ok(()),
        }
    }

    /// The error for an action that its state does not allow.
    pub fn refuse(&self, action: &'static str, id: &str) -> Error {
        Error::State {
            action,
            id: id.to_owned(),
            state: self.state.name(),
        }
    }
}

impl Container {
    /// As containerd calls its state.
    pub fn status(&self, exec: &str) -> Option<Status> {
        let process = self.process(exec)?;
        Some(match process.state {
            State::Creating | State::Created => Status::CREATED,
            State::Starting | State::Running if self.paused => Status::PAUSED,
            State::Starting | State::Running => Status::RUNNING,
            State::Stopped(_) => Status::STOPPED,
        })
    }

    /// A process; empty: the first.
    pub fn process(&self, exec: &str) -> Option<&Process> {
        if exec.is_empty() {
            Some(&self.init)
        } else {
            self.execs.get(exec).map(|exec| &exec.process)
        }
    }

    /// A process; empty: the first.
    pub fn process_mut(&mut self, exec: &str) -> Option<&mut Process> {
        if exec.is_empty() {
            Some(&mut self.init)
        } else {
            self.execs.get_mut(exec).map(|exec| &mut exec.process)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit { code: 3, at_ns: 7 };

    fn process(state: State) -> Process {
        Process::new(StdioPaths::default(), state)
    }

    #[test]
    fn goes_through_its_life_once() {
        let mut process = process(State::Creating);
        assert!(process.begin_start("c").is_err());
        process.created(None);
        process.begin_start("c").unwrap();
        assert!(process.begin_start("c").is_err());
        assert_eq!(process.finish_start(true), None);
        assert_eq!(process.state(), State::Running);
        assert!(process.begin_exit(EXIT.into()));
        assert!(!process.begin_exit(EXIT.into()));
        process.finish_exit(EXIT);
        assert_eq!(process.state(), State::Stopped(EXIT));
        assert!(matches!(
            process.check_alive("signal", "c"),
            Err(Error::Finished)
        ));
        assert_eq!(*process.watch().borrow(), Some(EXIT));
    }

    #[test]
    fn keeps_an_end_until_its_start_was_told() {
        let mut process = process(State::Created);
        process.begin_start("c").unwrap();
        assert!(!process.begin_exit(EXIT.into()));
        assert_eq!(process.state(), State::Starting);
        assert_eq!(process.finish_start(true), Some(EXIT.into()));
        assert!(process.begin_exit(EXIT.into()));
    }

    #[test]
    fn may_be_started_again_after_a_failure() {
        let mut process = process(State::Created);
        process.begin_start("c").unwrap();
        process.finish_start(false);
        assert_eq!(process.state(), State::Created);
    }
}
