//! Husk's virtio devices and their transport over PCI. Knows guest memory, not
//! KVM: interrupts and notifications are event descriptors.

pub mod balloon;
pub mod block;
mod config;
pub mod console;
mod device;
mod discard;
pub mod event_loop;
mod fd;
pub mod fs;
#[cfg(test)]
mod hostile;
pub mod mem;
pub mod net;
pub mod pci;
mod pins;
pub mod queue;
pub mod rate;
pub mod rng;
#[cfg(test)]
mod test_driver;
#[cfg(test)]
mod testing;
pub mod vsock;

pub use device::{
    ActivateError, Activation, ActiveQueue, DeviceError, DeviceType, Event, GuestMemory, Interrupt,
    Source, VirtioDevice, Worker,
};
pub use pins::Pins;
