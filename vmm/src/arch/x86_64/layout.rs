//! The guest's physical address map.
//!
//! ```text
//! 0000_0500  GDT of the boot processor
//! 0000_7000  boot_params (Linux's "zero page")
//! 0000_9000  page tables: the first 4 GiB, one to one
//! 0002_0000  kernel command line
//! 0009_fc00  end of conventional memory
//! 000f_0000  MP table (where kernels look for a BIOS's)
//! 0010_0000  memory; the kernel lands where its ELF says
//! c000_0000  no memory from here: PCI functions
//! fec0_0000  interrupt controllers (only the local APICs, at fee0_0000)
//! 1_0000_0000  memory again, what did not fit below c000_0000
//! above that, at a multiple of 8000_0000: memory that is plugged later
//! ```

use std::ops::Range;

/// Descriptor table of the boot processor.
pub const GDT: u64 = 0x500;

/// Linux's `struct boot_params`.
pub const BOOT_PARAMS: u64 = 0x7000;

/// PML4, PDPT and four page directories.
pub const PAGE_TABLES: u64 = 0x9000;

/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;

/// Memory below this is the kernel's to use, once it has read our tables.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;

/// MP floating pointer structure; the table follows it.
pub const MP_TABLE: u64 = 0xf_0000;

/// End of the area where a kernel looks for the MP table.
pub const MP_TABLE_END: u64 = 0x10_0000;

/// First byte above the BIOS area.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Below 4 GiB, addresses from here on are not memory.
pub const HOLE_START: u64 = 0xc000_0000;

/// End of the hole.
pub const HOLE_END: u64 = 1 << 32;

/// Where PCI functions get their addresses at boot.
pub const PCI_WINDOW: Range<u64> = HOLE_START..0xfec0_0000;

/// Registers of the local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Page that KVM on Intel needs for the identity map of real mode.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Three pages that KVM on Intel needs for a task state segment.
pub const KVM_TSS: usize = 0xfffb_d000;

/// Where an initramfs has to end at the latest: behind the highest address that
/// kernels take (`initrd_addr_max`).
pub const INITRAMFS_END: u64 = 0x8000_0000;

/// Where memory lies when there are `size` bytes of it.
pub fn memory_ranges(size: u64) -> impl Iterator<Item = Range<u64>> {
    let low = size.min(HOLE_START);
    [0..low, HOLE_END..HOLE_END + (size - low)]
        .into_iter()
        .filter(|range| !range.is_empty())
}

/// What Linux uses first, where it was loaded at `kernel`: itself, and the blocks
/// of 4 MiB that its page allocator opens before others. Seen with Linux 6.12; a
/// wrong guess costs some memory or some time, and nothing else.
pub fn used_early(kernel: Range<u64>) -> [Range<u64>; 3] {
    const BLOCK: u64 = 4 << 20;
    let first = kernel.start.min(3 * BLOCK);
    let block = |start: u64| start.min(first)..(start + BLOCK).min(first);
    let behind = kernel.end.checked_next_multiple_of(BLOCK);
    let behind = behind.and_then(|end| end.checked_add(BLOCK));
    let end = behind.unwrap_or(kernel.end);
    let start = kernel.start / BLOCK * BLOCK;
    [block(0), block(2 * BLOCK), start.max(first)..end]
}

/// What Linux fills while it boots: from the end of memory down, or from what it
/// finds there (`end`), 64 bytes for each page (`struct page`), and some 2 MiB of
/// tables beside.
pub fn filled_at_boot(size: u64, end: Option<u64>) -> Range<u64> {
    let last = memory_ranges(size).last().unwrap_or(0..0);
    // The initramfs is at the end of memory, or as high as it may be.
    let end = end.filter(|end| last.contains(end) && last.end <= INITRAMFS_END);
    let end = end.unwrap_or(last.end);
    let filled = size / 64 + (2 << 20);
    end.saturating_sub(filled).max(last.start)..end
}

/// What memory that is plugged later begins at a multiple of: the largest blocks
/// in which Linux takes it (`MAX_BLOCK_SIZE` of arch/x86/mm/init_64.c).
const PLUGGABLE_ALIGNMENT: u64 = 2 << 30;

/// Where `pluggable` bytes lie that may be plugged beside `size` at boot.
pub fn pluggable_range(size: u64, pluggable: u64) -> Range<u64> {
    let end = memory_ranges(size).map(|range| range.end).max();
    let start = end.unwrap_or(0).max(HOLE_END);
    let start = start.next_multiple_of(PLUGGABLE_ALIGNMENT);
    start..start + pluggable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pluggable_memory_meets_nothing() {
        assert_eq!(pluggable_range(64 << 20, 1 << 30), 4 << 30..5 << 30);
        assert_eq!(
            pluggable_range(4 << 30, 128 << 20),
            6 << 30..(6 << 30) + (128 << 20)
        );
    }

    #[test]
    fn what_is_used_early_lies_around_the_kernel() {
        const MIB: u64 = 1 << 20;
        assert_eq!(
            used_early(16 * MIB..34 * MIB + 5),
            [0..4 * MIB, 8 * MIB..12 * MIB, 16 * MIB..40 * MIB]
        );
        // Nothing twice where it was loaded lower.
        assert_eq!(used_early(MIB..2 * MIB), [0..MIB, MIB..MIB, MIB..8 * MIB]);
        assert_eq!(used_early(MIB..u64::MAX)[2], MIB..u64::MAX);
    }

    #[test]
    fn what_is_filled_ends_at_the_initramfs_or_with_memory() {
        const MIB: u64 = 1 << 20;
        assert_eq!(
            filled_at_boot(512 * MIB, Some(508 * MIB)),
            498 * MIB..508 * MIB
        );
        assert_eq!(filled_at_boot(512 * MIB, None), 502 * MIB..512 * MIB);
        // The initramfs is below the hole, the end of memory above it.
        assert_eq!(
            filled_at_boot(4096 * MIB, Some(2040 * MIB)),
            5054 * MIB..5120 * MIB
        );
        assert_eq!(
            filled_at_boot(2048 * MIB, Some(2044 * MIB)),
            2010 * MIB..2044 * MIB
        );
        // More memory than an initramfs may be in.
        assert_eq!(
            filled_at_boot(3072 * MIB, Some(2044 * MIB)),
            3022 * MIB..3072 * MIB
        );
        assert_eq!(filled_at_boot(MIB, None), 0..MIB);
    }

    #[test]
    fn memory_leaves_the_hole_free() {
        let ends = |size| -> Vec<_> { memory_ranges(size).map(|r| (r.start, r.end)).collect() };
        assert_eq!(ends(64 << 20), [(0, 64 << 20)]);
        assert_eq!(ends(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ends(5 << 30), [(0, 3 << 30), (4 << 30, 6 << 30)]);
    }
}
