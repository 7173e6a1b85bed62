//! Requests to a running VMM, its replies and its events.

use serde::{Deserialize, Serialize};

use crate::{DeviceId, DeviceSpec, HostPort, SavedSpec, VfioSpec};

/// What the shim asks of a running VMM. Requests are answered in order, one
/// [`Reply`] each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Lets the guest dial these ports, one time each.
    AddHostPorts(Vec<HostPort>),
    /// Takes these back, where the guest has not dialled them yet.
    RemoveHostPorts(Vec<u32>),
    /// Plugs a device; the agent then rescans the bus.
    AddDevice(DeviceSpec),
    /// Plugs PCI devices of the node, likewise.
    AddVfio(VfioSpec),
    /// Unplugs a device that the agent has let go of.
    RemoveDevice(DeviceId),
    /// Tells the guest to have this much of its pluggable memory, MiB; more than
    /// there is means all of it. The guest plugs and unplugs in its own time.
    PlugMemory(u32),
    /// Stops every vCPU.
    Pause,
    /// Lets every vCPU run again.
    Resume,
    /// Writes the state of a paused machine into two files, from which others like
    /// it can be started. The machine must have no device that was named, and no
    /// pluggable memory; connections of its vsock device are not saved. It can be
    /// resumed, or killed, afterwards.
    Save(SavedSpec),
    /// Reads the counters.
    Stats,
    /// Ends the machine at once; answered by [`Message::Exited`] alone.
    Kill,
}

/// A packet from the VMM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Message {
    /// The machine runs; sent once, in answer to the [`crate::VmSpec`].
    Started(Timeline),
    /// The answer to the oldest unanswered [`Request`].
    Reply(Result<Reply, Failure>),
    /// The last packet: why the machine ended.
    Exited(ExitReason),
}

/// The answer to a request that succeeded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// Nothing more to say.
    Done,
    /// The counters.
    Stats(VmStats),
}

/// The answer to a request that failed: nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// One sentence for the operator.
    pub message: String,
}

/// Moments of a start, `CLOCK_MONOTONIC` of the host in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeline {
    /// The process entered `main`.
    pub exec_ns: u64,
    /// The spec was read.
    pub spec_ns: u64,
    /// The first vCPU was about to enter the guest.
    pub entered_ns: u64,
}

/// Counters of a machine since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStats {
    /// Exits from `KVM_RUN` to the VMM, all vCPUs.
    pub exits: u64,
    /// Bytes of console output dropped because nobody read fast enough.
    pub console_dropped_bytes: u64,
}

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ExitReason {
    /// The guest powered itself off.
    Shutdown,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// The shim asked for it.
    Killed,
    /// The machine could not be started, or not be carried on.
    Failed(Failure),
}
