//! The calls of linux/vfio.h that a holder of a device makes, with its structures.
//! The kernel is trusted; what it says is bounded all the same.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref,
};

use crate::seccomp::vfio as number;

/// `VFIO_PCI_CONFIG_REGION_INDEX`; the BARs are those from 0 on.
pub(super) const CONFIG_REGION: u32 = 7;

const MSIX_IRQ: u32 = 2;

const DEVICE_CAN_RESET: u32 = 1 << 0;
const DEVICE_IS_PCI: u32 = 1 << 1;

const REGION_MAPPABLE: u32 = 1 << 2;
const REGION_HAS_CAPS: u32 = 1 << 3;

const CAP_SPARSE: u16 = 1;

const IRQ_NONE: u32 = 1 << 0;
const IRQ_EVENTFD: u32 = 1 << 2;
const IRQ_TRIGGER: u32 = 1 << 5;

const DMA_READ_WRITE: u32 = 0b11;

/// More than any device describes a region with.
const REGION_INFO_BYTES: usize = 4096;

/// More than a region has.
const CAPS_MAX: usize = 16;

/// `struct vfio_device_info`.
#[repr(C)]
#[derive(Default)]
struct DeviceInfo {
    argsz: u32,
    flags: u32,
    regions: u32,
    irqs: u32,
}

/// `struct vfio_region_info`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

/// `struct vfio_irq_info`.
#[repr(C)]
#[derive(Default)]
struct IrqInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    count: u32,
}

/// `struct vfio_iommu_type1_dma_map`.
#[repr(C)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// `struct vfio_iommu_type1_dma_unmap`.
#[repr(C)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// What a device is.
pub(super) struct Device {
    pub(super) is_pci: bool,
    pub(super) can_reset: bool,
}

/// A part of the device's descriptor: a BAR, or configuration space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    /// Bytes; 0: there is none.
    pub(super) size: u64,
    /// In the descriptor.
    pub(super) offset: u64,
    /// What of it can be mapped, from its start on.
    pub(super) mappable: Vec<Range<u64>>,
}

fn checked(answer: i32) -> io::Result<i32> {
    match answer {
        0.. => Ok(answer),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(super) fn device(fd: BorrowedFd<'_>) -> io::Result<Device> {
    let mut info = DeviceInfo {
        argsz: size_of::<DeviceInfo>() as u32,
        ..DeviceInfo::default()
    };
    // SAFETY: the kernel writes as many bytes as `argsz` says.
    checked(unsafe { ioctl_with_mut_ref(&fd, number::DEVICE_GET_INFO, &mut info) })?;
    let enough = info.regions > CONFIG_REGION && info.irqs > MSIX_IRQ;
    Ok(Device {
        is_pci: info.flags & DEVICE_IS_PCI != 0 && enough,
        can_reset: info.flags & DEVICE_CAN_RESET != 0,
    })
}

pub(super) fn region(fd: BorrowedFd<'_>, index: u32) -> io::Result<Region> {
    const HEAD: usize = size_of::<RegionInfo>();
    let mut buffer = [0_u64; REGION_INFO_BYTES / 8];
    let mut info = RegionInfo::default();
    for argsz in [HEAD, REGION_INFO_BYTES] {
        info = RegionInfo {
            argsz: argsz as u32,
            index,
            ..RegionInfo::default()
        };
        let at = buffer.as_mut_ptr().cast::<RegionInfo>();
        // SAFETY: the buffer is larger than the structure, and aligned for it.
        unsafe { at.write(info) };
        // SAFETY: the kernel writes as many bytes as `argsz` says.
        checked(unsafe { ioctl_with_mut_ptr(&fd, number::DEVICE_GET_REGION_INFO, at) })?;
        // SAFETY: the kernel has just filled it in; any bytes are one.
        info = unsafe { at.read() };
        // Says how much it would have needed.
        if info.argsz as usize <= argsz {
            break;
        }
    }
    let bytes: Vec<u8> = buffer.iter().flat_map(|word| word.to_le_bytes()).collect();
    let told = (info.argsz as usize).min(REGION_INFO_BYTES);
    let capabilities = match info.flags & REGION_HAS_CAPS != 0 && told > HEAD {
        true => bytes.get(..told).unwrap_or_default(),
        false => &[],
    };
    let whole = 0..info.size;
    let mappable = match info.flags & REGION_MAPPABLE != 0 {
        true => sparse(capabilities, info.cap_offset)
            .unwrap_or_else(|| Vec::from_iter([whole]))
            .into_iter()
            .filter(|area| area.start < area.end && area.end <= info.size)
            .collect(),
        false => Vec::new(),
    };
    Ok(Region {
        size: info.size,
        offset: info.offset,
        mappable,
    })
}

/// The areas of `struct vfio_region_info_cap_sparse_mmap`, if there is one in the
/// chain that begins at `first`.
fn sparse(bytes: &[u8], first: u32) -> Option<Vec<Range<u64>>> {
    let u32_at = |at: usize| {
        let value = bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(value.try_into().ok()?))
    };
    let u64_at = |at: usize| Some(u64::from(u32_at(at)?) | u64::from(u32_at(at + 4)?) << 32);
    let mut at = first as usize;
    for _ in 0..CAPS_MAX {
        if at == 0 {
            return None;
        }
        if u32_at(at)? as u16 != CAP_SPARSE {
            at = u32_at(at + 4)? as usize;
            continue;
        }
        let areas = (0..u32_at(at + 8)? as usize).map_while(|number| {
            let at = at + 16 + 16 * number;
            let start = u64_at(at)?;
            Some(start..start.checked_add(u64_at(at + 8)?)?)
        });
        return Some(areas.collect());
    }
    None
}

/// How many MSI-X vectors the device has.
pub(super) fn vectors(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = IrqInfo {
        argsz: size_of::<IrqInfo>() as u32,
        index: MSIX_IRQ,
        ..IrqInfo::default()
    };
    // SAFETY: the kernel writes as many bytes as `argsz` says.
    checked(unsafe { ioctl_with_mut_ref(&fd, number::DEVICE_GET_IRQ_INFO, &mut info) })?;
    Ok(info.count)
}

/// Has each MSI-X vector write its event; with none, the device has no MSI-X any
/// more.
pub(super) fn set_vectors(fd: BorrowedFd<'_>, events: &[Arc<EventFd>]) -> io::Result<()> {
    let mut events = events;
    loop {
        let kind = match events {
            [] => IRQ_NONE,
            _ => IRQ_EVENTFD,
        };
        // `struct vfio_irq_set` and its data.
        let size = 20 + 4 * events.len() as u32;
        let mut words = vec![size, kind | IRQ_TRIGGER, MSIX_IRQ, 0, events.len() as u32];
        words.extend(events.iter().map(|event| event.as_raw_fd().cast_unsigned()));
        // SAFETY: the kernel reads as many bytes as the first word says.
        let answer = unsafe { ioctl_with_ptr(&fd, number::DEVICE_SET_IRQS, words.as_ptr()) };
        match usize::try_from(checked(answer)?) {
            // So many are left on the node: those behind them never come.
            Ok(left @ 1..) if left < events.len() => events = &events[..left],
            _ => return Ok(()),
        }
    }
}

pub(super) fn reset(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the call has no argument.
    checked(unsafe { ioctl(&fd, number::DEVICE_RESET) }).map(drop)
}

/// Has devices of the group in `container` reach this memory at `iova`.
///
/// # Safety
/// The memory is guest memory: what devices write there surprises nobody, and it
/// stays mapped for as long as the process lives.
pub(super) unsafe fn map(
    container: BorrowedFd<'_>,
    iova: u64,
    memory: *const u8,
    size: u64,
) -> io::Result<()> {
    let map = DmaMap {
        argsz: size_of::<DmaMap>() as u32,
        flags: DMA_READ_WRITE,
        vaddr: memory as u64,
        iova,
        size,
    };
    // SAFETY: the kernel reads the structure; the rest is the caller's promise.
    checked(unsafe { ioctl_with_ref(&container, number::IOMMU_MAP_DMA, &map) }).map(drop)
}

pub(super) fn unmap(container: BorrowedFd<'_>, iova: u64, size: u64) -> io::Result<()> {
    let mut unmap = DmaUnmap {
        argsz: size_of::<DmaUnmap>() as u32,
        flags: 0,
        iova,
        size,
    };
    // SAFETY: the kernel writes as many bytes as `argsz` says.
    checked(unsafe { ioctl_with_mut_ref(&container, number::IOMMU_UNMAP_DMA, &mut unmap) })
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put(bytes: &mut [u8], at: usize, words: &[u32]) {
        for (index, word) in words.iter().enumerate() {
            bytes[at + 4 * index..at + 4 * index + 4].copy_from_slice(&word.to_le_bytes());
        }
    }

    #[test]
    fn finds_what_can_be_mapped() {
        let mut bytes = vec![0; 128];
        // VFIO_REGION_INFO_CAP_MSIX_MAPPABLE leads to a sparse one.
        put(&mut bytes, 32, &[3 | 1 << 16, 40]);
        put(&mut bytes, 40, &[1 | 1 << 16, 0, 2, 0]);
        put(&mut bytes, 56, &[0, 0, 0x1000, 0, 0x3000, 1, 0x2000, 0]);
        let areas = sparse(&bytes, 32).unwrap();
        assert_eq!(areas, [0..0x1000, 0x1_0000_3000..0x1_0000_5000]);
        assert_eq!(sparse(&bytes[..40], 32), None);
        assert_eq!(sparse(&bytes, 0), None);
        // A chain that bites its tail.
        put(&mut bytes, 32, &[3, 32]);
        assert_eq!(sparse(&bytes, 32), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..256), first: u32) {
            for first in [first, first % 256] {
                if let Some(areas) = sparse(&bytes, first) {
                    prop_assert!(areas.len() <= bytes.len() / 16);
                }
            }
        }
    }

    #[test]
    fn what_is_no_device_is_an_error() {
        use std::os::fd::AsFd;
        let file = tempfile::tempfile().unwrap();
        let error = |result: io::Result<()>| result.unwrap_err().raw_os_error();
        let no = Some(libc::ENOTTY);
        assert_eq!(error(device(file.as_fd()).map(drop)), no);
        assert_eq!(error(region(file.as_fd(), 0).map(drop)), no);
        assert_eq!(error(vectors(file.as_fd()).map(drop)), no);
        assert_eq!(error(set_vectors(file.as_fd(), &[])), no);
        assert_eq!(error(reset(file.as_fd())), no);
        assert_eq!(error(unmap(file.as_fd(), 0, 4096)), no);
    }
}
