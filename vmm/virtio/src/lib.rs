//! Husk's virtio devices and their transport over PCI. Knows guest memory, not
//! KVM: interrupts and notifications are event descriptors.

mod device;
pub mod event_loop;
pub mod pci;
pub mod queue;

pub use device::{
    ActivateError, Activation, ActiveQueue, DeviceError, DeviceType, Event, GuestMemory, Interrupt,
    Source, VirtioDevice, Worker,
};
