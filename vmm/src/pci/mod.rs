//! One PCI bus, and the functions on it that are not virtio.

mod bus;
mod host_bridge;
mod pvpanic;

pub use bus::{BusError, BusState, PciBus, SharedFunction, SlotError};
pub use host_bridge::HostBridge;
pub use pvpanic::PvPanic;
