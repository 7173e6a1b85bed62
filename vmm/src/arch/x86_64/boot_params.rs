//! What the kernel reads at its 64-bit entry: `struct boot_params`, the command
//! line, the initramfs (Documentation/arch/x86/boot.rst of Linux).

use std::fs::File;
use std::io::Seek;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{self, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Boot loader of no assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const PAGE: u64 = 4096;

/// A kernel or initramfs that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel is not what it should be.
    #[error("the kernel is no uncompressed x86_64 ELF image that fits into guest memory")]
    Kernel(#[source] loader::Error),
    /// The initramfs could not be measured.
    #[error("size of the initramfs")]
    InitramfsSize(#[source] std::io::Error),
    /// The initramfs finds no place.
    #[error("an initramfs of {bytes} bytes does not fit into guest memory behind the kernel")]
    InitramfsRoom {
        /// Its size.
        bytes: u64,
    },
    /// The initramfs could not be copied.
    #[error("read the initramfs")]
    InitramfsRead(#[source] vm_memory::GuestMemoryError),
    /// The tables could not be written.
    #[error("write {what} into guest memory")]
    Write {
        /// Which table.
        what: &'static str,
        /// Why not.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Where a loaded kernel starts and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Physical address of its 64-bit entry.
    pub entry: u64,
    /// First byte behind it, its zeroed data included.
    pub end: u64,
}

/// Where the initramfs lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// Physical address.
    pub start: u64,
    /// Its size.
    pub bytes: u64,
}

/// Copies an ELF kernel to the addresses that it names.
///
/// # Errors
/// It is no ELF kernel, or names addresses that are not memory.
pub fn load_kernel(memory: &GuestMemoryMmap, file: &mut File) -> Result<Kernel, LoadError> {
    let lowest = GuestAddress(layout::HIGH_MEMORY);
    let loaded = Elf::load(memory, None, file, Some(lowest)).map_err(LoadError::Kernel)?;
    Ok(Kernel {
        entry: loaded.kernel_load.0,
        end: loaded.kernel_end,
    })
}

/// Copies the initramfs to the end of low memory.
///
/// # Errors
/// It cannot be read, or there is no room between it and the kernel.
pub fn load_initramfs(
    memory: &GuestMemoryMmap,
    kernel: Kernel,
    file: &mut File,
) -> Result<Initramfs, LoadError> {
    let bytes = file.metadata().map_err(LoadError::InitramfsSize)?.len();
    file.rewind().map_err(LoadError::InitramfsSize)?;
    let no_room = || LoadError::InitramfsRoom { bytes };
    let memory_end = low_memory_end(memory).min(layout::INITRAMFS_END);
    let start = memory_end.checked_sub(bytes).ok_or_else(no_room)? & !(PAGE - 1);
    if start < kernel.end {
        return Err(no_room());
    }
    let length = usize::try_from(bytes).map_err(|_| no_room())?;
    memory
        .read_exact_volatile_from(GuestAddress(start), file, length)
        .map_err(LoadError::InitramfsRead)?;
    Ok(Initramfs { start, bytes })
}

/// Writes the command line and `boot_params`.
///
/// # Errors
/// Guest memory is too small for them.
pub fn write(
    memory: &GuestMemoryMmap,
    command_line: &str,
    initramfs: Option<Initramfs>,
) -> Result<(), LoadError> {
    let failed = |what| move |source| LoadError::Write { what, source };
    let mut line = command_line.as_bytes().to_vec();
    line.push(0);
    memory
        .write_slice(&line, GuestAddress(layout::COMMAND_LINE))
        .map_err(failed("the command line"))?;

    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.kernel_alignment = 1 << 21;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size = command_line.len() as u32;
    if let Some(initramfs) = initramfs {
        params.hdr.ramdisk_image = initramfs.start as u32;
        params.hdr.ramdisk_size = initramfs.bytes as u32;
    }
    let map = address_map(memory);
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = *entry;
    }
    params.e820_entries = map.len() as u8;
    memory
        .write_obj(params, GuestAddress(layout::BOOT_PARAMS))
        .map_err(failed("boot_params"))
}

fn address_map(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind| boot_e820_entry {
        addr: start,
        size: end - start,
        r#type: kind,
    };
    let mut map = vec![
        entry(0, layout::CONVENTIONAL_END, E820_RAM),
        entry(layout::MP_TABLE, layout::MP_TABLE_END, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY);
        map.push(entry(start, region.start_addr().0 + region.len(), E820_RAM));
    }
    map
}

fn low_memory_end(memory: &GuestMemoryMmap) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, GuestMemoryRegion::len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::memory;
    use std::io::Write;

    fn map_of(mib: u32) -> Vec<(u64, u64, u32)> {
        address_map(&memory::create(mib).unwrap())
            .iter()
            .map(|e| ({ e.addr }, { e.addr } + { e.size }, { e.r#type }))
            .collect()
    }

    #[test]
    fn the_map_lists_all_memory_but_the_bios_area() {
        assert_eq!(
            map_of(4096),
            vec![
                (0, 0x9_fc00, E820_RAM),
                (0xf_0000, 0x10_0000, E820_RESERVED),
                (0x10_0000, 0xc000_0000, E820_RAM),
                (0x1_0000_0000, 0x1_4000_0000, E820_RAM),
            ]
        );
    }

    #[test]
    fn the_initramfs_ends_low_memory_and_never_meets_the_kernel() {
        let memory = memory::create(64).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let kernel = Kernel {
            entry: 1 << 20,
            end: 2 << 20,
        };
        let loaded = load_initramfs(&memory, kernel, &mut file).unwrap();
        assert_eq!(loaded.start, (64 << 20) - 8192);
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(loaded.start)).unwrap(),
            7
        );
        let kernel = Kernel {
            entry: 1 << 20,
            end: loaded.start + 1,
        };
        assert!(matches!(
            load_initramfs(&memory, kernel, &mut file),
            Err(LoadError::InitramfsRoom { bytes: 5000 })
        ));
    }

    #[test]
    fn a_text_file_is_no_kernel() {
        let memory = memory::create(64).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[b'x'; 4096]).unwrap();
        assert!(matches!(
            load_kernel(&memory, &mut file),
            Err(LoadError::Kernel(_))
        ));
    }
}
