//! What the kernel reads at its 64-bit entry: `struct boot_params`, the command
//! line, the initramfs (Documentation/arch/x86/boot.rst of Linux).

use std::fs::File;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::elf::Kernel;
use super::layout;
use crate::kvm::memory;

const PAGE: u64 = 4096;

// Offsets in `struct boot_params`.
const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const TYPE_OF_LOADER: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const E820_TABLE: usize = 0x2d0;

const BOOT_FLAG_VALUE: u16 = 0xaa55;
const HEADER_VALUE: [u8; 4] = *b"HdrS";
/// A boot loader of no assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

/// `KASLR_FLAG`: the kernel chooses the addresses of its other maps at random too.
const MOVED_AT_RANDOM: u8 = 1 << 1;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// An initramfs that cannot be loaded, or tables that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
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
    InitramfsRead(#[source] std::io::Error),
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

/// Where the initramfs lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// Physical address.
    pub start: u64,
    /// Its size.
    pub bytes: u64,
}

/// Copies the initramfs to the end of low memory.
///
/// # Errors
/// It cannot be read, or there is no room between it and the kernel.
pub fn load_initramfs(
    memory: &GuestMemoryMmap,
    kernel: Kernel,
    file: &File,
) -> Result<Initramfs, LoadError> {
    let bytes = file.metadata().map_err(LoadError::InitramfsSize)?.len();
    let no_room = || LoadError::InitramfsRoom { bytes };
    let memory_end = low_memory_end(memory).min(layout::INITRAMFS_END);
    let start = memory_end.checked_sub(bytes).ok_or_else(no_room)? & !(PAGE - 1);
    if start < kernel.end {
        return Err(no_room());
    }
    memory::populate(memory, memory::large_page_of(start)..memory_end);
    memory::copy_in(memory, start, file, 0, bytes).map_err(LoadError::InitramfsRead)?;
    Ok(Initramfs { start, bytes })
}

/// Writes the command line and `boot_params`, which tell of `ram_bytes` of
/// memory, and whether the kernel was `moved` to random addresses.
///
/// # Errors
/// Guest memory is too small for them.
pub fn write(
    memory: &GuestMemoryMmap,
    ram_bytes: u64,
    command_line: &str,
    initramfs: Option<Initramfs>,
    moved: bool,
) -> Result<(), LoadError> {
    let failed = |what| move |source| LoadError::Write { what, source };
    let mut line = command_line.as_bytes().to_vec();
    line.push(0);
    memory
        .write_slice(&line, GuestAddress(layout::COMMAND_LINE))
        .map_err(failed("the command line"))?;

    let mut params = [0; PAGE as usize];
    let mut put = |at: usize, value: &[u8]| {
        for (to, from) in params.iter_mut().skip(at).zip(value) {
            *to = *from;
        }
    };
    put(BOOT_FLAG, &BOOT_FLAG_VALUE.to_le_bytes());
    put(HEADER, &HEADER_VALUE);
    put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    if moved {
        put(LOAD_FLAGS, &[MOVED_AT_RANDOM]);
    }
    put(CMD_LINE_PTR, &(layout::COMMAND_LINE as u32).to_le_bytes());
    if let Some(initramfs) = initramfs {
        put(RAMDISK_IMAGE, &(initramfs.start as u32).to_le_bytes());
        put(RAMDISK_SIZE, &(initramfs.bytes as u32).to_le_bytes());
    }
    let map = address_map(ram_bytes);
    put(E820_ENTRIES, &[map.len() as u8]);
    let table: Vec<u8> = map.iter().flat_map(Area::bytes).collect();
    put(E820_TABLE, &table);
    memory
        .write_slice(&params, GuestAddress(layout::BOOT_PARAMS))
        .map_err(failed("boot_params"))
}

/// `struct boot_e820_entry`.
struct Area {
    start: u64,
    end: u64,
    kind: u32,
}

impl Area {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.start.to_le_bytes().to_vec();
        bytes.extend((self.end - self.start).to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes
    }
}

fn address_map(ram_bytes: u64) -> Vec<Area> {
    let entry = |start, end, kind| Area { start, end, kind };
    let mut map = vec![
        entry(0, layout::CONVENTIONAL_END, E820_RAM),
        entry(layout::MP_TABLE, layout::MP_TABLE_END, E820_RESERVED),
    ];
    for range in layout::memory_ranges(ram_bytes) {
        map.push(entry(
            range.start.max(layout::HIGH_MEMORY),
            range.end,
            E820_RAM,
        ));
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
    use std::io::Write;

    fn map_of(mib: u32) -> Vec<(u64, u64, u32)> {
        address_map(u64::from(mib) << 20)
            .iter()
            .map(|area| (area.start, area.end, area.kind))
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
        let memory = memory::create(64, 0).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let kernel = Kernel {
            entry: 1 << 20,
            start: 1 << 20,
            end: 2 << 20,
        };
        let loaded = load_initramfs(&memory, kernel, &file).unwrap();
        assert_eq!(loaded.start, (64 << 20) - 8192);
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(loaded.start)).unwrap(),
            7
        );
        let kernel = Kernel {
            entry: 1 << 20,
            start: 1 << 20,
            end: loaded.start + 1,
        };
        assert!(matches!(
            load_initramfs(&memory, kernel, &file),
            Err(LoadError::InitramfsRoom { bytes: 5000 })
        ));
    }
}
