//! What of a function is saved, and restored into one that was made alike.

use std::io;

use serde::{Deserialize, Serialize};

use super::TransportError;
use crate::event_loop::LoopGone;

/// A function's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    /// Configuration space.
    pub config: Vec<u8>,
    /// What a virtio device has besides.
    pub virtio: Option<VirtioState>,
}

/// The transport's registers. Where a queue's device has got to is not among
/// them: a device that was quiesced has returned every chain that it took, so it
/// goes on where the used ring in guest memory ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    pub(super) registers: RegistersState,
    pub(super) signals: SignalsState,
    /// The MSI-X table; its control is in configuration space.
    pub(super) table: Vec<[u8; 16]>,
    /// Vectors that have counted an interrupt while masked.
    pub(super) pending: Vec<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RegistersState {
    pub(super) offered: u64,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) status: u8,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueState {
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SignalsState {
    pub(super) config_vector: u16,
    pub(super) queue_vectors: Vec<u16>,
    pub(super) isr: u8,
    pub(super) generation: u8,
    pub(super) needs_reset: bool,
}

/// A function that cannot be saved, or be what was saved.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It is a device of the node.
    #[error("a device of the node cannot be saved")]
    OfNode,
    /// It was saved by something else.
    #[error("the saved {0} is not that of such a function")]
    Unlike(&'static str),
    /// It does not start to work again.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// An interrupt vector could not be set up.
    #[error("interrupt vector")]
    Vector(#[source] io::Error),
    /// Its working half is gone.
    #[error(transparent)]
    Loop(#[from] LoopGone),
}
