//! What a function with MSI-X needs from the machine.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// The write that raises an interrupt (PCI 3.0, 6.8.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// The interrupt vectors of one function, towards KVM.
///
/// Each vector has one event descriptor for its whole life; devices (or vhost
/// back ends) write it without knowing more. A connected vector turns the write
/// into its message (irqfd and a GSI route). A disconnected one leaves the count
/// in the descriptor, which thereby is the vector's pending bit; KVM sends what
/// has been counted when the descriptor is connected again.
///
/// Vectors begin disconnected. Dropping this gives GSIs and routes back.
pub trait MsiVectors: Send {
    /// The descriptors, in order of vectors; non-blocking.
    fn events(&self) -> &[Arc<EventFd>];

    /// From now on `vector` sends `message`. It may be connected already, then
    /// only the message changes. `vector` is below the number of events.
    ///
    /// # Errors
    /// KVM refused.
    fn connect(&mut self, vector: u16, message: MsiMessage) -> io::Result<()>;

    /// From now on `vector` only counts. Nothing happens when it is
    /// disconnected already. `vector` is below the number of events.
    ///
    /// # Errors
    /// KVM refused.
    fn disconnect(&mut self, vector: u16) -> io::Result<()>;
}
