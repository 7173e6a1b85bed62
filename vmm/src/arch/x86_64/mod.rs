//! The x86_64 machine: address map, processor identity, tables and registers at
//! the kernel's entry.

pub mod boot_params;
pub mod cpuid;
pub mod elf;
pub mod kaslr;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod regs;
