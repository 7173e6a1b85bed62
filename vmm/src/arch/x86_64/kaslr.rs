//! Gives a kernel virtual addresses that cannot be known beforehand: all those in its
//! text and data change by one random distance. Linux's decompressor does so where it
//! runs; here it does not, so the list of what it would change is a section of the ELF
//! file (`arch/x86/tools/relocs` makes it, guest-image/kernel/build adds it). Where the
//! kernel lies in physical memory stays as it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::volatile_memory::PtrGuardMut;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::elf::{Fields, Kernel};

/// `__START_KERNEL_map`: where Linux maps physical memory for its text and data.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// `KERNEL_IMAGE_SIZE` of a kernel with CONFIG_RANDOMIZE_BASE: how much of that map is
/// the kernel's.
const KERNEL_MAP_BYTES: u64 = 1 << 30;

/// `CONFIG_PHYSICAL_ALIGN`: it is mapped by large pages.
const STEP: u64 = 2 << 20;

/// On the kernel's command line: where it is linked to be.
const OFF: &str = "nokaslr";

/// The section with the list.
const SECTION: &[u8] = b".relocations\0";
const SECTION_BYTES: usize = 64;
const SECTIONS_MAX: u16 = 1024;
const NAMES_MAX: u64 = 64 << 10;
/// Linux's own kernels have some 2 MiB of it.
const LIST_MAX: u64 = 16 << 20;

/// A kernel that cannot be moved.
#[derive(Debug, thiserror::Error)]
pub enum KaslrError {
    /// What should say where addresses are says something else.
    #[error("the kernel's list of relocations {0}")]
    List(&'static str),
    /// An address that is none of the kernel's.
    #[error("the kernel's list of relocations has {address:#x}, where the kernel is not")]
    Address {
        /// What the list has.
        address: u64,
    },
    /// The file could not be read.
    #[error("read the kernel's list of relocations")]
    Read(#[source] io::Error),
    /// The host has no random numbers.
    #[error("a random number for the kernel's addresses")]
    Random(#[source] io::Error),
}

/// Moves the `kernel` that was loaded from `file`; returns whether it was. One without
/// a list stays where it is linked to be, as one whose command line says `nokaslr`.
///
/// # Errors
/// There is a list, and it is not this kernel's.
pub fn move_at_random(
    memory: &GuestMemoryMmap,
    kernel: Kernel,
    file: &File,
    command_line: &str,
) -> Result<bool, KaslrError> {
    if command_line
        .split_ascii_whitespace()
        .any(|word| word == OFF)
    {
        return Ok(false);
    }
    let Some(list) = read_list(file)? else {
        return Ok(false);
    };
    let mut random = [0; 8];
    getrandom(&mut random, GetRandomFlags::empty())
        .map_err(|error| KaslrError::Random(error.into()))?;
    // As many places as there are, the last of which ends with the map.
    let room = KERNEL_MAP_BYTES.saturating_sub(kernel.end);
    let distance = u64::from_le_bytes(random) % (room / STEP + 1) * STEP;
    apply(memory, kernel, &list, distance)?;
    Ok(true)
}

/// Adds `distance` wherever `list` says: numbers of 32 bits, the ends of virtual
/// addresses. Three runs, each behind a zero: what grows by 64 bits, what shrinks by
/// 32, what grows by 32 (`handle_relocations` of arch/x86/boot/compressed/misc.c).
fn apply(
    memory: &GuestMemoryMmap,
    kernel: Kernel,
    list: &[u8],
    distance: u64,
) -> Result<(), KaslrError> {
    let (numbers, rest) = list.as_chunks::<4>();
    let numbers = numbers.iter().map(|bytes| u32::from_le_bytes(*bytes));
    if !rest.is_empty() {
        return Err(KaslrError::List("ends in the middle of a number"));
    }
    let image = Image::new(memory, kernel)?;
    let mut run = Run::Before;
    for number in numbers {
        if number == 0 {
            run = run.next().ok_or(KaslrError::List("has too many runs"))?;
            continue;
        }
        let address = number as i32 as i64 as u64;
        let wrong = || KaslrError::Address { address };
        let at = address
            .checked_sub(KERNEL_MAP)
            .and_then(|physical| physical.checked_sub(kernel.start))
            .and_then(|at| usize::try_from(at).ok())
            .ok_or_else(wrong)?;
        let changed = match run {
            Run::Before => return Err(KaslrError::List("does not begin with a zero")),
            Run::Grow64 => image.change(at, |bytes| {
                u64::from_le_bytes(bytes)
                    .wrapping_add(distance)
                    .to_le_bytes()
            }),
            Run::Shrink32 => image.change(at, |bytes| {
                u32::from_le_bytes(bytes)
                    .wrapping_sub(distance as u32)
                    .to_le_bytes()
            }),
            Run::Grow32 => image.change(at, |bytes| {
                u32::from_le_bytes(bytes)
                    .wrapping_add(distance as u32)
                    .to_le_bytes()
            }),
        };
        changed.then_some(()).ok_or_else(wrong)?;
    }
    match run {
        Run::Grow32 => Ok(()),
        _ => Err(KaslrError::List("has too few runs")),
    }
}

/// A kernel in guest memory.
struct Image<'a> {
    start: PtrGuardMut,
    length: usize,
    /// What `start` points into.
    _memory: &'a GuestMemoryMmap,
}

impl<'a> Image<'a> {
    fn new(memory: &'a GuestMemoryMmap, kernel: Kernel) -> Result<Self, KaslrError> {
        let length = usize::try_from(kernel.end.saturating_sub(kernel.start));
        let slice = length
            .ok()
            .and_then(|length| memory.get_slice(GuestAddress(kernel.start), length).ok())
            .ok_or(KaslrError::List("is of a kernel that is not in memory"))?;
        Ok(Self {
            start: slice.ptr_guard_mut(),
            length: slice.len(),
            _memory: memory,
        })
    }

    /// Changes the bytes at `at`; false where the kernel is not. By its address: what
    /// [`VolatileMemory`] does for each of some 10^5 places takes as long as a tenth
    /// of the boot.
    fn change<const N: usize>(&self, at: usize, to: impl Fn([u8; N]) -> [u8; N]) -> bool {
        if at.checked_add(N).is_none_or(|end| end > self.length) {
            return false;
        }
        // SAFETY: these bytes lie in the kernel, in guest memory that is borrowed and
        // so stays mapped; no processor of the guest runs yet.
        unsafe {
            let place = self.start.as_ptr().add(at).cast::<[u8; N]>();
            place.write(to(place.read()));
        }
        true
    }
}

/// What the numbers of a list mean that follow.
#[derive(Clone, Copy)]
enum Run {
    Before,
    Grow64,
    Shrink32,
    Grow32,
}

impl Run {
    fn next(self) -> Option<Self> {
        match self {
            Self::Before => Some(Self::Grow64),
            Self::Grow64 => Some(Self::Shrink32),
            Self::Shrink32 => Some(Self::Grow32),
            Self::Grow32 => None,
        }
    }
}

/// The list in `file`, if it has one.
fn read_list(file: &File) -> Result<Option<Vec<u8>>, KaslrError> {
    let header: [u8; 64] = read(file, 0, 64)?
        .try_into()
        .map_err(|_| KaslrError::List("has no header"))?;
    let header = Fields(&header);
    let (offset, count, names) = (header.u64(40), header.u16(60), header.u16(62));
    if offset == 0 || count == 0 {
        return Ok(None);
    }
    if usize::from(header.u16(58)) != SECTION_BYTES || count > SECTIONS_MAX || names >= count {
        return Err(KaslrError::List(
            "is behind section headers of another kind",
        ));
    }
    let table = read(file, offset, u64::from(count) * SECTION_BYTES as u64)?;
    let (sections, _) = table.as_chunks::<SECTION_BYTES>();
    let place = |section: &[u8; SECTION_BYTES]| {
        let fields = Fields(section);
        (fields.u64(24), fields.u64(32))
    };
    let Some((names_at, names_bytes)) = sections.get(usize::from(names)).map(place) else {
        return Ok(None);
    };
    if names_bytes > NAMES_MAX {
        return Err(KaslrError::List("is behind names that are too long"));
    }
    let names = read(file, names_at, names_bytes)?;
    let is_list = |section: &&[u8; SECTION_BYTES]| {
        let name = names.get(Fields(*section).u32(0) as usize..);
        name.is_some_and(|name| name.starts_with(SECTION))
    };
    let Some((offset, bytes)) = sections.iter().find(is_list).map(place) else {
        return Ok(None);
    };
    if bytes > LIST_MAX {
        return Err(KaslrError::List("is too long"));
    }
    read(file, offset, bytes).map(Some)
}

fn read(file: &File, offset: u64, bytes: u64) -> Result<Vec<u8>, KaslrError> {
    let mut buffer = vec![0; bytes as usize];
    file.read_exact_at(&mut buffer, offset)
        .map_err(KaslrError::Read)?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;
    use crate::kvm::memory;

    const START: u64 = 1 << 20;
    const KERNEL: Kernel = Kernel {
        entry: START,
        start: START,
        end: START + 64,
    };

    fn linked_at(offset: u64) -> u32 {
        (KERNEL_MAP + START + offset) as u32
    }

    fn list(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
    }

    /// A file with section headers only: none, names, the list.
    fn file(list: &[u8]) -> File {
        let names = b"\0.names\0.relocations\0";
        let mut bytes = vec![0; 64];
        let mut section = |name: u32, content: &[u8]| {
            let offset = bytes.len() as u64;
            bytes.extend(content);
            let mut header = [0; SECTION_BYTES];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&offset.to_le_bytes());
            header[32..40].copy_from_slice(&(content.len() as u64).to_le_bytes());
            header
        };
        let headers = [section(0, b""), section(1, names), section(8, list)];
        let offset = bytes.len() as u64;
        bytes.extend(headers.as_flattened());
        bytes[40..48].copy_from_slice(&offset.to_le_bytes());
        bytes[58..64].copy_from_slice(&[64, 0, 3, 0, 1, 0]);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn each_run_changes_what_it_names() {
        let memory = memory::create(16, 0).unwrap();
        let (long, less, more) = (0xffff_ffff_8100_0000_u64, 0x100_0000_u32, 0x8100_0000_u32);
        memory.write_obj(long, GuestAddress(START + 3)).unwrap();
        memory.write_obj(less, GuestAddress(START + 16)).unwrap();
        memory.write_obj(more, GuestAddress(START + 60)).unwrap();
        let list = list(&[0, linked_at(3), 0, linked_at(16), 0, linked_at(60)]);
        apply(&memory, KERNEL, &list, 6 << 20).unwrap();
        let read = |at| memory.read_obj::<u32>(GuestAddress(START + at)).unwrap();
        let read_long: u64 = memory.read_obj(GuestAddress(START + 3)).unwrap();
        assert_eq!(read_long, long + (6 << 20));
        assert_eq!(read(16), less - (6 << 20));
        assert_eq!(read(60), more + (6 << 20));
    }

    #[test]
    fn what_lies_outside_the_kernel_is_refused() {
        let memory = memory::create(16, 0).unwrap();
        for runs in [
            [0, linked_at(57), 0, 0],
            [0, 0, linked_at(61), 0],
            [0, 0, 0, linked_at(64)],
            [0, 0, 0, (KERNEL_MAP + START - 1) as u32],
            [0, 0, 0, 1],
        ] {
            let result = apply(&memory, KERNEL, &list(&runs), STEP);
            assert!(
                matches!(result, Err(KaslrError::Address { .. })),
                "{runs:x?}"
            );
        }
        let mut after = [1; 72];
        memory
            .read_slice(&mut after, GuestAddress(START - 4))
            .unwrap();
        assert_eq!(after, [0; 72]);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        let memory = memory::create(16, 0).unwrap();
        let lists = [
            vec![],
            list(&[0, 0]),
            list(&[linked_at(0)]),
            list(&[0, 0, 0, 0]),
            vec![0; 13],
        ];
        for list in lists {
            let result = apply(&memory, KERNEL, &list, STEP);
            assert!(matches!(result, Err(KaslrError::List(_))), "{list:?}");
        }
    }

    #[test]
    fn each_boot_has_a_place_of_its_own() {
        let memory = memory::create(16, 0).unwrap();
        let list = list(&[0, 0, 0, linked_at(0)]);
        let file = file(&list);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..64 {
            memory.write_obj(0_u32, GuestAddress(START)).unwrap();
            assert!(move_at_random(&memory, KERNEL, &file, "console=ttyS0").unwrap());
            let distance = memory.read_obj::<u32>(GuestAddress(START)).unwrap();
            assert_eq!(u64::from(distance) % STEP, 0);
            assert!(u64::from(distance) + KERNEL.end <= KERNEL_MAP_BYTES);
            seen.insert(distance);
        }
        // Of 512 places; 64 draws that give fewer than 32 do not happen.
        assert!(seen.len() > 32, "{seen:x?}");
    }

    #[test]
    fn a_kernel_may_stay_where_it_is() {
        let memory = memory::create(16, 0).unwrap();
        let with = file(&list(&[0, 0, 0, linked_at(0)]));
        assert!(!move_at_random(&memory, KERNEL, &with, "panic=1 nokaslr").unwrap());
        let without = tempfile::tempfile().unwrap();
        without.set_len(64).unwrap();
        assert!(!move_at_random(&memory, KERNEL, &without, "").unwrap());
        assert_eq!(memory.read_obj::<u32>(GuestAddress(START)).unwrap(), 0);
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let memory = memory::create(16, 0).unwrap();
        let sound = list(&[0, 0, 0, linked_at(0)]);
        for (at, wrong) in [
            (40, &u64::MAX.to_le_bytes()[..]),
            (40, &(1_u64 << 40).to_le_bytes()),
            (58, &[63, 0]),
            (60, &[0xff, 0xff]),
            (62, &[3, 0]),
        ] {
            let file = file(&sound);
            file.write_all_at(wrong, at).unwrap();
            let result = move_at_random(&memory, KERNEL, &file, "");
            assert!(result.is_err(), "{at}: {wrong:?}");
        }
    }
}
