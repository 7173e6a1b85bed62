//! What the agent and its helper say to each other while a process is made.
//!
//! The helper reads one `Plan`, answers with `Report`s, and is answered with
//! `Order`s: `IdMapsNeeded` and `Child` by `Continue`, and the `Ready` of a
//! container by `Continue` when it shall start. The channel closes without a `Failure` when the program runs.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::oci::{Personality, Process, Seccomp, Spec};

/// A process to make.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// `cgroup.procs` files to join: the first that takes the process.
    pub cgroups: Vec<PathBuf>,
    /// Whether a terminal is allocated.
    pub terminal: bool,
    /// What is run and where.
    pub kind: Kind,
}

/// A container's first process, or another one in it.
#[derive(Debug, Serialize, Deserialize)]
pub enum Kind {
    /// Makes the container around its first process.
    Container(Box<ContainerPlan>),
    /// Joins a container.
    Exec(Box<ExecPlan>),
}

impl Kind {
    /// What the process may call.
    pub fn seccomp(&self) -> Option<&Seccomp> {
        match self {
            Self::Container(plan) => plan.spec.linux.seccomp.as_ref(),
            Self::Exec(plan) => plan.seccomp.as_ref(),
        }
    }
}

/// A container's first process.
#[derive(Debug, Serialize, Deserialize)]
pub struct ContainerPlan {
    /// The container's id.
    pub id: String,
    /// The container's OCI spec.
    pub spec: Spec,
    /// An empty directory on a private mount; the root is attached there.
    pub stage: PathBuf,
    /// Where its PID namespace comes from.
    pub pid_namespace: PidNamespace,
    /// The pod's user namespace, which it is in: an inherited descriptor. None:
    /// it has one of its own if the spec says so.
    pub users: Option<RawFd>,
    /// Whether it has a node of every device of the guest.
    pub all_devices: bool,
}

/// Where a container's PID namespace comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidNamespace {
    /// Its own.
    Own,
    /// The guest's, where the agent is PID 1.
    Guest,
    /// Another's: an inherited descriptor of the namespace.
    Join(RawFd),
}

/// Another process in a container.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecPlan {
    /// The OCI process.
    pub process: Process,
    /// The container's filter.
    pub seccomp: Option<Seccomp>,
    /// The container's execution domain.
    pub personality: Option<Personality>,
    /// An inherited pidfd of the container's first process.
    pub pidfd: RawFd,
    /// `CLONE_NEW*` flags of the namespaces to join.
    pub namespaces: u32,
}

/// From the helper to the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The helper is in a new user namespace: write its maps.
    IdMapsNeeded,
    /// The process itself, as the agent's PID namespace numbers it. Until the
    /// answer it is another's to collect, so that its number stays its own.
    Child(i32),
    /// All is prepared; a terminal's descriptor comes along.
    Ready,
    /// It can't be done.
    Failure(Failure),
}

/// From the agent to the helper.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Go on with what you wait for.
    Continue,
}

/// Why a process could not be made. Crosses the channel, hence text: the
/// helper is gone when it is read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// For the code of the answer.
    pub kind: FailureKind,
    /// One line.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// What the caller can do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The executable isn't there.
    NotFound,
    /// The executable can't be run.
    Denied,
    /// The spec asks for what can't be.
    Invalid,
    /// Anything else.
    Other,
}
