//! Every ioctl on KVM.

pub mod irq;
pub mod memory;
pub mod vcpu;
pub mod vm;
