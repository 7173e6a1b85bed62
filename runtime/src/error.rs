//! What a request can fail with, and the one mapping to ttrpc's status codes.

use std::error::Error as StdError;
use std::io;

use ttrpc::{Code, Status};

use crate::agent_client::AgentError;
use crate::bundle::BundleError;
use crate::cgroup::CgroupError;
use crate::config::ConfigError;
use crate::device::DeviceError;
use crate::hook::HookError;
use crate::id::IdError;
use crate::network::NetworkError;
use crate::pod_config::PodConfigError;
use crate::rootfs::RootfsError;
use crate::shared_tree::SharedTreeError;
use crate::state_dir::StateDirError;
use crate::stdio::StdioError;
use crate::vfio::VfioError;
use crate::vm_plan::PlanError;
use crate::vm_process::VmError;
use crate::volume::VolumeError;

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container, or process in it.
    #[error("{what} {id} is not here")]
    NotFound {
        /// Container or process.
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// Container or process of that name is there.
    #[error("{what} {id} exists already")]
    Exists {
        /// Container or process.
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// A pod of that name was ended, and not all of it has.
    #[error(
        "there was a pod {id} before, whose process {pid} was killed and has not ended yet: it \
         waits in the kernel, for a disk or a device of the node"
    )]
    NameTaken {
        /// Its name.
        id: String,
        /// What is left of it.
        pid: u32,
    },
    /// The machine cannot be given up yet.
    #[error(
        "the pod's VMM, process {pid}, was killed and has not ended yet: it waits in the kernel, \
         and may still write to the disks and PCI devices of the node that it has"
    )]
    Held {
        /// The VMM.
        pid: u32,
    },
    /// The state does not allow it.
    #[error("cannot {action} {id}: it is {state}")]
    State {
        /// What was asked.
        action: &'static str,
        /// Of which container or process.
        id: String,
        /// What it is instead.
        state: &'static str,
    },
    /// A signal for a process that has ended.
    #[error("process already finished")]
    Finished,
    /// There is no machine any more.
    #[error("the pod's machine has ended: {0}")]
    MachineGone(String),
    /// Not done by this runtime.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// A message without a part that must be there.
    #[error("{0}")]
    Argument(&'static str),
    /// The task that had to answer is gone: the shim is ending.
    #[error("the shim is shutting down")]
    ShuttingDown,
    /// More than one pod may have.
    #[error("the pod has {0} already, the most there can be")]
    TooMany(&'static str),
    /// A bad name.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The node's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The pod's configuration.
    #[error(transparent)]
    PodConfig(#[from] PodConfigError),
    /// The machine's plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The root file system.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// A device of the node.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A PCI device of the node.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// A hook of the spec.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// What may wait for a disk has a thread of its own.
    #[error("thread of the shim")]
    Thread(#[source] io::Error),
    /// A disk of the machine.
    #[error("disk of the machine")]
    Disk(#[source] io::Error),
    /// A volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The tree shared with the guest.
    #[error(transparent)]
    SharedTree(#[from] SharedTreeError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Standard streams.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The pod's cgroup on the host.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The pod's directory.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
}

impl Error {
    /// What containerd tells errors apart by.
    fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } | Self::Finished => Code::NOT_FOUND,
            Self::Exists { .. } => Code::ALREADY_EXISTS,
            Self::NameTaken { .. }
            | Self::Held { .. }
            | Self::State { .. }
            | Self::MachineGone(_) => Code::FAILED_PRECONDITION,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::ShuttingDown => Code::UNAVAILABLE,
            Self::TooMany(_) => Code::RESOURCE_EXHAUSTED,
            Self::Argument(_) | Self::Id(_) | Self::Bundle(_) | Self::PodConfig(_) => {
                Code::INVALID_ARGUMENT
            }
            Self::Agent(error) => error.code(),
            Self::Rootfs(error) => error.code(),
            Self::Volume(error) => error.code(),
            Self::Device(error) => error.code(),
            Self::Vfio(error) => error.code(),
            Self::Stdio(error) => error.code(),
            Self::Plan(error) => error.code(),
            Self::Config(_)
            | Self::Vm(_)
            | Self::Hook(_)
            | Self::Thread(_)
            | Self::Disk(_)
            | Self::SharedTree(_)
            | Self::Network(_)
            | Self::Cgroup(_)
            | Self::StateDir(_) => Code::UNKNOWN,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let mut status = Status::new();
        status.set_code(error.code());
        status.set_message(chain(&error));
        Self::RpcStatus(status)
    }
}

/// The error and everything that caused it, in one line.
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(error.to_string().trim_end());
        source = error.source();
    }
    text
}
