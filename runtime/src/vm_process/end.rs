//! How machines end, and what a VMM can fail with.

use std::fmt;
use std::io;
use std::path::PathBuf;

use husk_node::state::EndKind;
use husk_node::sums::SumsError;
use husk_vmm_spec::{ExitReason, Failure};

use super::console;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmEnd {
    /// As the VMM said, or the kernel of it; none: it said nothing.
    pub reason: Option<ExitReason>,
    /// The last of what the guest's console showed.
    pub console: String,
}

/// For one that said nothing, where the pod's cgroup had no memory left.
pub(super) fn starved() -> ExitReason {
    ExitReason::Failed(Failure {
        message: "the VMM ended without a word, and the kernel has ended a process of the \
                  pod's cgroup for want of memory"
            .to_owned(),
    })
}

/// For one that is still there when it was killed.
pub(super) fn stuck() -> ExitReason {
    ExitReason::Failed(Failure {
        message: "the VMM was killed and has not ended yet: it waits in the kernel, for a disk \
                  or a device of the node"
            .to_owned(),
    })
}

/// A VMM that does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The program did not start.
    #[error("VMM {path}")]
    Spawn {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that a machine is made of.
    #[error("{what} {path}")]
    Open {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it could not be opened.
        #[source]
        source: io::Error,
    },
    /// What was opened is not known to be what it should be.
    #[error(transparent)]
    Sums(#[from] SumsError),
    /// Something between us and the VMM.
    #[error("{what}")]
    Io {
        /// What was done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// No answer in time.
    #[error("the VMM did not {what} within {seconds} s")]
    Deadline {
        /// What was asked.
        what: &'static str,
        /// How long it had.
        seconds: u64,
    },
    /// The guest did not boot in time.
    #[error(
        "the guest was not ready after {seconds} s (boot_timeout_seconds); its console's last \
         lines: {}",
        console::last_lines(console)
    )]
    NotReady {
        /// How long it had.
        seconds: u64,
        /// The last of what its console showed.
        console: String,
    },
    /// It answered that it could not.
    #[error("the VMM could not {what}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Why not.
        #[source]
        source: Failure,
    },
    /// The machine has ended.
    #[error("the machine has ended: {0}")]
    Ended(VmEnd),
}

impl VmEnd {
    /// In a few words.
    pub fn reason(&self) -> String {
        match &self.reason {
            Some(ExitReason::Shutdown) => "the guest powered itself off".to_owned(),
            Some(ExitReason::Reset) => "the guest reset itself".to_owned(),
            Some(ExitReason::Panic) => "the guest's kernel panicked".to_owned(),
            Some(ExitReason::Killed) => "the shim ended it".to_owned(),
            Some(ExitReason::Failed(failure)) => failure.to_string(),
            None => "the VMM ended without a word".to_owned(),
        }
    }

    /// In a word.
    pub fn kind(&self) -> EndKind {
        match &self.reason {
            Some(ExitReason::Shutdown) => EndKind::PoweredOff,
            Some(ExitReason::Reset) => EndKind::Reset,
            Some(ExitReason::Panic) => EndKind::Panicked,
            Some(ExitReason::Killed) => EndKind::Killed,
            Some(ExitReason::Failed(_)) => EndKind::VmmFailed,
            None => EndKind::VmmGone,
        }
    }

    /// The console's last lines in one, where they may say why.
    pub fn last_lines(&self) -> String {
        match self.reason {
            Some(ExitReason::Shutdown | ExitReason::Killed) => String::new(),
            _ => console::last_lines(&self.console),
        }
    }
}

impl fmt::Display for VmEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason())?;
        match self.last_lines() {
            tail if tail.is_empty() => Ok(()),
            tail => write!(f, "; its console's last lines: {tail}"),
        }
    }
}
