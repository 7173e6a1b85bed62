//! Husk's virtual machine monitor as a library, so that tests build machines in
//! their own process; the binary adds the jail.

pub mod address_space;
pub mod arch;
pub mod arguments;
pub mod boot;
mod bounded;
pub mod clock;
pub mod console;
pub mod control;
pub mod descriptors;
pub mod devices;
pub mod exit;
pub mod jail;
pub mod kvm;
pub mod legacy;
pub mod machine;
pub mod packet;
pub mod pci;
pub mod saved;
pub mod seccomp;
pub mod vfio;
