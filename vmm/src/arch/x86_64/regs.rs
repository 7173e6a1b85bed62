//! The boot processor's registers at Linux's 64-bit entry: long mode, the first
//! 4 GiB mapped one to one, flat segments, interrupts off. The others wait for
//! the start-up message of the first.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;

const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
const PAGE_DIRECTORIES: u64 = 4;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;

/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 2;

/// `__BOOT_CS` and `__BOOT_DS` of the boot protocol: entries 2 and 3.
const CODE_INDEX: u16 = 2;
const DATA_INDEX: u16 = 3;
const TASK_INDEX: u16 = 4;

// Segment types (Intel SDM volume 3, 3.5).
const EXECUTE_READ: u8 = 0xb;
const READ_WRITE: u8 = 0x3;
const TASK_BUSY: u8 = 0xb;

/// x87 control word and MXCSR after FNINIT and reset.
const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

const _: () = {
    assert!(layout::PAGE_TABLES + (2 + PAGE_DIRECTORIES) * PAGE <= layout::COMMAND_LINE);
    assert!(layout::BOOT_PARAMS + PAGE <= layout::PAGE_TABLES);
};

/// General registers: at `entry`, with the address of `boot_params`.
pub fn general(entry: u64) -> kvm_regs {
    kvm_regs {
        rflags: RFLAGS_RESERVED,
        rip: entry,
        rsi: layout::BOOT_PARAMS,
        ..Default::default()
    }
}

/// Floating point registers as after reset.
pub fn fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: FPU_CONTROL,
        mxcsr: MXCSR,
        ..Default::default()
    }
}

/// Puts the special registers `at_reset` into long mode.
pub fn special(at_reset: kvm_sregs) -> kvm_sregs {
    let mut sregs = at_reset;
    let data = data_segment();
    sregs.cs = code_segment();
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = task_segment();
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&descriptors()) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 |= CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 |= CR4_PHYSICAL_EXTENSION;
    sregs.efer |= EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
    sregs
}

/// Writes the page tables and the descriptor table that [`special`] names.
///
/// # Errors
/// Guest memory is too small for them.
pub fn write_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let pml4 = layout::PAGE_TABLES;
    let pdpt = pml4 + PAGE;
    let first_directory = pdpt + PAGE;
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    let mut directories = Vec::with_capacity((PAGE_DIRECTORIES * PAGE) as usize);
    for index in 0..PAGE_DIRECTORIES {
        let directory = first_directory + index * PAGE;
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt + index * 8))?;
        for entry in 0..PAGE / 8 {
            let mapped = (index * PAGE / 8 + entry) * LARGE_PAGE;
            directories.extend((mapped | LARGE | PRESENT_WRITABLE).to_le_bytes());
        }
    }
    memory.write_slice(&directories, GuestAddress(first_directory))?;
    for (index, descriptor) in descriptors().into_iter().enumerate() {
        memory.write_obj(descriptor, GuestAddress(layout::GDT + 8 * index as u64))?;
    }
    Ok(())
}

fn code_segment() -> kvm_segment {
    kvm_segment {
        selector: CODE_INDEX * 8,
        type_: EXECUTE_READ,
        l: 1,
        ..flat()
    }
}

fn data_segment() -> kvm_segment {
    kvm_segment {
        selector: DATA_INDEX * 8,
        type_: READ_WRITE,
        db: 1,
        ..flat()
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment {
        selector: TASK_INDEX * 8,
        type_: TASK_BUSY,
        s: 0,
        ..flat()
    }
}

fn flat() -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn descriptors() -> [u64; 5] {
    [
        0,
        0,
        descriptor(&code_segment()),
        descriptor(&data_segment()),
        descriptor(&task_segment()),
    ]
}

/// Segment descriptor (Intel SDM volume 3, 3.4.5) of a segment with base 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(segment.limit >> 12);
    (limit & 0xffff)
        | u64::from(segment.type_) << 40
        | u64::from(segment.s) << 44
        | u64::from(segment.present) << 47
        | (limit >> 16) << 48
        | u64::from(segment.l) << 53
        | u64::from(segment.db) << 54
        | u64::from(segment.g) << 55
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_flat_ones() {
        assert_eq!(descriptor(&code_segment()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
    }
}
