//! Puts an uncompressed ELF kernel where its program headers say.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout;
use crate::kvm::memory;

const HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;

/// Magic, 64 bits, little endian, current version.
const IDENTITY: [u8; 7] = [0x7f, b'E', b'L', b'F', 2, 1, 1];
const TYPE_EXECUTABLE: u16 = 2;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;

/// More than any kernel has.
const SEGMENTS_MAX: u16 = 64;

/// A file that is no kernel for this machine.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// Not an executable of this kind.
    #[error("it is no uncompressed x86_64 ELF executable")]
    Kind,
    /// A segment, or the entry, lies elsewhere.
    #[error("{what} at {address:#x} is not in guest memory above 1 MiB")]
    Address {
        /// What was to be there.
        what: &'static str,
        /// Where it was to be.
        address: u64,
    },
    /// The file could not be read, or ends early.
    #[error("read it")]
    Read(#[source] io::Error),
}

/// Where a loaded kernel starts and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Physical address of its 64-bit entry.
    pub entry: u64,
    /// Physical address of its first byte.
    pub start: u64,
    /// First byte behind it, its zeroed data included.
    pub end: u64,
}

struct Segment {
    file_offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

/// Copies the kernel in `file` to the physical addresses that it names. Memory
/// is zero before, so what has no bytes in the file needs no more.
///
/// # Errors
/// It is no kernel, or names addresses that are not memory.
pub fn load(memory: &GuestMemoryMmap, file: &File) -> Result<Kernel, ElfError> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0).map_err(short_is_kind)?;
    let fields = Fields(&header);
    let sound = header.starts_with(&IDENTITY)
        && fields.u16(16) == TYPE_EXECUTABLE
        && fields.u16(18) == MACHINE_X86_64
        && usize::from(fields.u16(54)) == SEGMENT_BYTES
        && fields.u16(56) <= SEGMENTS_MAX;
    if !sound {
        return Err(ElfError::Kind);
    }
    let entry = fields.u64(24);
    let segments = segments(file, fields.u64(32), fields.u16(56))?;
    let (mut start, mut end) = (u64::MAX, 0);
    for segment in &segments {
        start = start.min(segment.address);
        end = end.max(end_of(memory, segment)?);
    }
    for range in layout::used_early(start..end) {
        memory::populate(memory, range);
    }
    for segment in &segments {
        let (offset, bytes) = (segment.file_offset, segment.file_bytes);
        memory::copy_in(memory, segment.address, file, offset, bytes).map_err(ElfError::Read)?;
    }
    let starts = |s: &Segment| (s.address..s.address + s.file_bytes).contains(&entry);
    if !segments.iter().any(starts) {
        return Err(ElfError::Address {
            what: "the entry",
            address: entry,
        });
    }
    Ok(Kernel { entry, start, end })
}

fn segments(file: &File, offset: u64, count: u16) -> Result<Vec<Segment>, ElfError> {
    let mut table = vec![0; usize::from(count) * SEGMENT_BYTES];
    file.read_exact_at(&mut table, offset)
        .map_err(ElfError::Read)?;
    let (headers, _) = table.as_chunks::<SEGMENT_BYTES>();
    Ok(headers
        .iter()
        .map(|header| Fields(header))
        .filter(|fields| fields.u32(0) == SEGMENT_LOAD)
        .map(|fields| Segment {
            file_offset: fields.u64(8),
            address: fields.u64(24),
            file_bytes: fields.u64(32),
            memory_bytes: fields.u64(40),
        })
        .collect())
}

/// Where the segment ends, if all of it is memory.
fn end_of(memory: &GuestMemoryMmap, segment: &Segment) -> Result<u64, ElfError> {
    let nowhere = ElfError::Address {
        what: "a segment",
        address: segment.address,
    };
    let longest = segment.memory_bytes.max(segment.file_bytes);
    let end = segment.address.checked_add(longest);
    let region = memory.find_region(GuestAddress(segment.address));
    let (Some(end), Some(region)) = (end, region) else {
        return Err(nowhere);
    };
    if segment.address < layout::HIGH_MEMORY || end > region.start_addr().0 + region.len() {
        return Err(nowhere);
    }
    Ok(end)
}

fn short_is_kind(error: io::Error) -> ElfError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ElfError::Kind,
        _ => ElfError::Read(error),
    }
}

/// Little-endian fields of a header; zero past its end.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .copied()
            .unwrap_or([0; N])
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    pub(super) fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    /// One segment of four bytes, at `address`, with `memory_bytes` of room.
    fn file(address: u64, entry: u64, memory_bytes: u64) -> File {
        let mut bytes = IDENTITY.to_vec();
        bytes.resize(16, 0);
        bytes.extend(TYPE_EXECUTABLE.to_le_bytes());
        bytes.extend(MACHINE_X86_64.to_le_bytes());
        bytes.extend([1, 0, 0, 0]);
        bytes.extend(entry.to_le_bytes());
        bytes.extend(64_u64.to_le_bytes());
        bytes.resize(54, 0);
        bytes.extend([SEGMENT_BYTES as u8, 0, 1, 0]);
        bytes.resize(64, 0);
        bytes.extend([1, 0, 0, 0, 7, 0, 0, 0]);
        for field in [120, 0, address, 4, memory_bytes, 4096] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(*b"code");
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn segments_land_where_they_say() {
        let memory = memory::create(3 * 1024 + 64, 0).unwrap();
        for address in [1 << 20, (1 << 20) + 5, 1 << 32] {
            let kernel = load(&memory, &file(address, address + 1, 100)).unwrap();
            assert_eq!((kernel.entry, kernel.end), (address + 1, address + 100));
            let mut copied = [1; 6];
            memory
                .read_slice(&mut copied, GuestAddress(address))
                .unwrap();
            assert_eq!(&copied, b"code\0\0");
        }
    }

    #[test]
    fn addresses_elsewhere_are_refused() {
        let memory = memory::create(64, 0).unwrap();
        for (address, entry, memory_bytes) in [
            (0x9_0000, 0x9_0000, 4),
            (63 << 20, 63 << 20, 2 << 20),
            (64 << 20, 64 << 20, 4),
            (u64::MAX, u64::MAX, 4),
            (1 << 20, 1 << 20, u64::MAX),
            (1 << 20, (1 << 20) + 4, 100),
        ] {
            let result = load(&memory, &file(address, entry, memory_bytes));
            assert!(
                matches!(result, Err(ElfError::Address { .. })),
                "{address:#x}"
            );
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let memory = memory::create(64, 0).unwrap();
        let sound = file(1 << 20, 1 << 20, 4);
        for (at, wrong) in [(0, b'x'), (4, 1), (16, 3), (18, 3), (54, 1), (57, 1)] {
            let file = sound.try_clone().unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[wrong], at).unwrap();
            assert!(matches!(load(&memory, &file), Err(ElfError::Kind)), "{at}");
            file.write_all_at(&byte, at).unwrap();
        }
        sound.set_len(122).unwrap();
        assert!(matches!(load(&memory, &sound), Err(ElfError::Read(_))));
        sound.set_len(60).unwrap();
        assert!(matches!(load(&memory, &sound), Err(ElfError::Kind)));
    }
}
