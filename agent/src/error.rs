//! What can go wrong, and how the shim hears of it.

use std::fmt::{Display, Write};
use std::io;

use ttrpc::{Code, get_status};

use crate::container::LaunchError;
use crate::container::cgroup::CgroupError;
use crate::init::plan::{Failure, FailureKind};
use crate::netlink::NetworkError;
use crate::storage::StorageError;

/// A system call that failed: on what, and for which reason.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {target}")]
pub struct OsError {
    /// A verb, as in "cannot open".
    pub doing: &'static str,
    /// The object: a path, a name, a number.
    pub target: String,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

impl OsError {
    /// Whether the kernel answered with this `errno`.
    pub fn is(&self, errno: i32) -> bool {
        self.source.raw_os_error() == Some(errno)
    }
}

/// Says what was being done when a system call failed.
pub trait Doing<T> {
    /// Wraps the error; `doing` is a verb.
    fn doing(self, doing: &'static str, target: impl Display) -> Result<T, OsError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, doing: &'static str, target: impl Display) -> Result<T, OsError> {
        self.map_err(|source| OsError {
            doing,
            target: target.to_string(),
            source: source.into(),
        })
    }
}

/// An error of a request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the sandbox has not been created")]
    NoSandbox,
    #[error("the sandbox exists already")]
    SandboxExists,
    #[error("container {id:?} not found")]
    NoContainer { id: String },
    #[error("process {exec_id:?} of container {id:?} not found")]
    NoProcess { id: String, exec_id: String },
    #[error("container {id:?} exists already")]
    ContainerExists { id: String },
    #[error("process {exec_id:?} of container {id:?} exists already")]
    ProcessExists { id: String, exec_id: String },
    #[error("{id:?} is not an id: {reason}")]
    BadId { id: String, reason: &'static str },
    #[error("{field} is invalid: {reason}")]
    Invalid { field: &'static str, reason: String },
    #[error("{field} is not valid JSON for its type")]
    Json {
        field: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("container {id:?} is {state}, not {wanted}")]
    State {
        id: String,
        state: &'static str,
        wanted: &'static str,
    },
    #[error("process already finished")]
    Finished,
    #[error("process {exec_id:?} of container {id:?} is still being made")]
    NotMade { id: String, exec_id: String },
    #[error("process {exec_id:?} of container {id:?} has not ended")]
    StillRunning { id: String, exec_id: String },
    #[error("the process has no terminal")]
    NoTerminal,
    #[error("there is no shell {id:?}")]
    NoShell { id: String },
    #[error("there is a shell {id:?} already")]
    ShellExists { id: String },
    #[error("more than {limit} {what}")]
    TooMany { what: &'static str, limit: usize },
    #[error("{what} did not happen within {seconds} s")]
    Deadline { what: String, seconds: u64 },
    #[error("device {device} not found")]
    NoDevice { device: String },
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Os(#[from] OsError),
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::NoContainer { .. }
            | Self::NoProcess { .. }
            | Self::NoShell { .. }
            | Self::Finished
            | Self::NoDevice { .. } => Code::NOT_FOUND,
            Self::SandboxExists
            | Self::ContainerExists { .. }
            | Self::ProcessExists { .. }
            | Self::ShellExists { .. } => Code::ALREADY_EXISTS,
            Self::BadId { .. } | Self::Invalid { .. } | Self::Json { .. } => Code::INVALID_ARGUMENT,
            Self::NoSandbox
            | Self::State { .. }
            | Self::NoTerminal
            | Self::NotMade { .. }
            | Self::StillRunning { .. } => Code::FAILED_PRECONDITION,
            Self::TooMany { .. } => Code::RESOURCE_EXHAUSTED,
            Self::Deadline { .. } => Code::DEADLINE_EXCEEDED,
            Self::Storage(StorageError::Deadline { .. } | StorageError::Unanswered { .. }) => {
                Code::DEADLINE_EXCEEDED
            }
            Self::Network(NetworkError::Invalid { .. }) => Code::INVALID_ARGUMENT,
            Self::Launch(LaunchError::Reported(Failure { kind, .. })) => match kind {
                FailureKind::NotFound => Code::NOT_FOUND,
                FailureKind::Denied => Code::PERMISSION_DENIED,
                FailureKind::Invalid => Code::INVALID_ARGUMENT,
                FailureKind::Other => Code::INTERNAL,
            },
            Self::Launch(_)
            | Self::Cgroup(_)
            | Self::Storage(_)
            | Self::Network(_)
            | Self::Os(_) => Code::INTERNAL,
        }
    }
}

/// The error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(get_status(error.code(), chain(&error)))
    }
}
