//! Every ioctl on KVM.

mod gate;
pub mod irq;
pub mod memory;
pub mod saved_memory;
pub mod vcpu;
pub mod vcpu_state;
pub mod vm;
