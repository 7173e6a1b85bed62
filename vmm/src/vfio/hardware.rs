//! A function of the node as the kernel gives it to us.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::{MapFlags, ProtFlags};
use vmm_sys_util::eventfd::EventFd;

use super::abi::{self, CONFIG_REGION, Region};
use super::description::{CONFIG_BYTES, Description, Place};
use super::{VfioError, failed};

const BARS: usize = 6;
const PAGE: u64 = 4096;

/// Memory slots of KVM that a function may take.
pub(super) const SLOTS_OF_FUNCTION: u32 = 32;

/// The first slot that functions take; guest memory has those from 0 on.
pub(super) const FIRST_SLOT: u32 = 256;

/// What stands behind a function: the node's, or a test's.
pub(super) trait Hardware: Send {
    /// Reads from a BAR, or from configuration space.
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes there.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Lets the guest reach a BAR at this address without us, as far as it can be
    /// mapped, or no more.
    fn place(&mut self, bar: u8, address: Option<u64>) -> io::Result<()>;

    /// Has the vectors write these events; none: there are no interrupts.
    fn interrupt(&self, events: &[Arc<EventFd>]) -> io::Result<()>;

    /// As it was switched on, where it can be.
    fn reset(&self);
}

/// A function of the node.
pub(super) struct NodeFunction {
    device: OwnedFd,
    vm: Arc<VmFd>,
    regions: [Region; BARS],
    config: Region,
    can_reset: bool,
    mappings: Vec<Mapping>,
}

/// A part of a BAR that is mapped here, and may be in the guest.
struct Mapping {
    bar: u8,
    range: Range<u64>,
    memory: *mut libc::c_void,
    slot: u32,
    /// Where the guest has it.
    address: Option<u64>,
}

// SAFETY: the memory is touched by nobody here, and unmapped once.
unsafe impl Send for Mapping {}

impl NodeFunction {
    /// Takes what `VFIO_GROUP_GET_DEVICE_FD` gave. `slot` is that of the machine's
    /// bus.
    pub(super) fn new(
        device: OwnedFd,
        vm: Arc<VmFd>,
        slot: u8,
    ) -> Result<(Self, Description), VfioError> {
        let fd = device.as_fd();
        let info = abi::device(fd).map_err(failed("VFIO_DEVICE_GET_INFO"))?;
        if !info.is_pci {
            return Err(VfioError::NoEndpoint);
        }
        let region = |index| abi::region(fd, index).map_err(failed("VFIO_DEVICE_GET_REGION_INFO"));
        let mut regions: [Region; BARS] = Default::default();
        for (index, slot) in (0..).zip(&mut regions) {
            *slot = region(index)?;
        }
        let config = region(CONFIG_REGION)?;
        let vectors = abi::vectors(fd).map_err(failed("VFIO_DEVICE_GET_IRQ_INFO"))?;
        let mut function = Self {
            device,
            vm,
            regions,
            config,
            can_reset: info.can_reset,
            mappings: Vec::new(),
        };
        let mut bytes = [0; CONFIG_BYTES];
        let read = function.read(CONFIG_REGION, 0, &mut bytes);
        read.map_err(failed("read of configuration space"))?;
        let sizes = function.regions.each_ref().map(|region| region.size);
        let description = Description::new(&bytes, &sizes, vectors)?;
        let hidden = [&description.table, &description.pending];
        let bars = description.space.bars().map(|bar| bar.index);
        function
            .map(bars, hidden, slot)
            .map_err(failed("map a BAR"))?;
        Ok((function, description))
    }

    /// Maps what can be, but for pages with something of `hidden`.
    fn map(
        &mut self,
        bars: impl Iterator<Item = u8>,
        hidden: [&Place; 2],
        slot: u8,
    ) -> io::Result<()> {
        let first = FIRST_SLOT + u32::from(slot) * SLOTS_OF_FUNCTION;
        let mut slots = first..first + SLOTS_OF_FUNCTION;
        for bar in bars {
            let Some(region) = self.regions.get(usize::from(bar)) else {
                continue;
            };
            let hidden = hidden.iter().filter(|place| place.bar == bar);
            let hidden: Vec<_> = hidden.map(|place| place.range.clone()).collect();
            for range in visible(&region.mappable, &hidden) {
                // The rest is reached through us, more slowly.
                let Some(slot) = slots.next() else { break };
                let length = usize::try_from(range.end - range.start);
                let length = length.map_err(|_| io::ErrorKind::InvalidInput)?;
                // SAFETY: fresh addresses; nobody here touches what is there.
                let memory = unsafe {
                    rustix::mm::mmap(
                        ptr::null_mut(),
                        length,
                        ProtFlags::READ | ProtFlags::WRITE,
                        MapFlags::SHARED,
                        &self.device,
                        region.offset + range.start,
                    )
                }?;
                self.mappings.push(Mapping {
                    bar,
                    range,
                    memory,
                    slot,
                    address: None,
                });
            }
        }
        Ok(())
    }

    fn region(&self, index: u32) -> io::Result<&Region> {
        let bar = self.regions.get(index as usize);
        let region = if index == CONFIG_REGION {
            Some(&self.config)
        } else {
            bar
        };
        region.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Where `length` bytes of a region are in the descriptor.
    fn offset(&self, region: u32, offset: u64, length: usize) -> io::Result<u64> {
        let region = self.region(region)?;
        let end = offset.checked_add(length as u64);
        match end.is_some_and(|end| end <= region.size) {
            true => Ok(region.offset + offset),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Hardware for NodeFunction {
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let offset = self.offset(region, offset, data.len())?;
        let wanted = data.len();
        match rustix::io::pread(&self.device, data, offset)? {
            read if read == wanted => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = self.offset(region, offset, data.len())?;
        match rustix::io::pwrite(&self.device, data, offset)? {
            written if written == data.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    fn place(&mut self, bar: u8, address: Option<u64>) -> io::Result<()> {
        let of_bar = self.mappings.iter_mut().filter(|one| one.bar == bar);
        for mapping in of_bar {
            let wanted = address.map(|address| address + mapping.range.start);
            if wanted == mapping.address {
                continue;
            }
            if mapping.address.is_some() {
                // Until KVM has let go of it, it counts as there: it must not be
                // unmapped under KVM's slot.
                mapping.tell(&self.vm, 0, 0)?;
                mapping.address = None;
            }
            if let Some(wanted) = wanted {
                mapping.tell(&self.vm, wanted, mapping.range.end - mapping.range.start)?;
                mapping.address = Some(wanted);
            }
        }
        Ok(())
    }

    fn interrupt(&self, events: &[Arc<EventFd>]) -> io::Result<()> {
        abi::set_vectors(self.device.as_fd(), events)
    }

    fn reset(&self) {
        if self.can_reset {
            // The kernel tries once more when the device is closed.
            let _ = abi::reset(self.device.as_fd());
        }
    }
}

impl Mapping {
    /// Has KVM show it at `address`; without bytes, nowhere.
    fn tell(&self, vm: &VmFd, address: u64, bytes: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: self.slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: bytes,
            userspace_addr: self.memory as u64,
        };
        // SAFETY: the mapping is as long as the slot, which goes before it does.
        unsafe { vm.set_user_memory_region(region) }?;
        Ok(())
    }
}

impl Drop for NodeFunction {
    fn drop(&mut self) {
        for mapping in &mut self.mappings {
            if mapping.address.is_some() && mapping.tell(&self.vm, 0, 0).is_err() {
                // The guest may still reach it: it stays.
                continue;
            }
            let length = (mapping.range.end - mapping.range.start) as usize;
            // SAFETY: mapped so long by `map`, and no slot has it any more.
            let _ = unsafe { rustix::mm::munmap(mapping.memory, length) };
        }
    }
}

/// The pages of `mappable` with nothing of `hidden` in them.
fn visible(mappable: &[Range<u64>], hidden: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut visible: Vec<_> = mappable
        .iter()
        .filter_map(|area| Some(area.start.checked_next_multiple_of(PAGE)?..area.end / PAGE * PAGE))
        .collect();
    for hidden in hidden {
        let start = hidden.start / PAGE * PAGE;
        let end = hidden.end.checked_next_multiple_of(PAGE);
        let end = end.unwrap_or(u64::MAX);
        let around = |area: Range<u64>| {
            [
                area.start..area.end.min(start),
                area.start.max(end)..area.end,
            ]
        };
        visible = visible.into_iter().flat_map(around).collect();
    }
    visible.retain(|area| area.start < area.end);
    visible
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pages_of_the_table_are_not_mapped() {
        let of = |area: Range<u64>, hidden: &[Range<u64>]| visible(&[area], hidden);
        let whole = 0..0x8000;
        assert!(of(whole.clone(), &[]).contains(&whole));
        assert_eq!(
            of(whole, &[0x2010..0x2020, 0x4000..0x5001]),
            [0..0x2000, 0x3000..0x4000, 0x6000..0x8000]
        );
        // QEMU's virtio devices: the page has both.
        assert!(of(0..0x1000, &[0..0x20, 0x800..0x808]).is_empty());
        // Less than a page, and not from a page on.
        let page = 0x1000..0x2000;
        assert_eq!(of(0x10..0x2fff, &[]), [page]);
        assert!(of(0..0x800, &[]).is_empty());
    }

    proptest! {
        #[test]
        fn nothing_hidden_is_visible(
            mappable in prop::collection::vec((any::<u64>(), any::<u64>()), 0..6),
            hidden in prop::collection::vec((any::<u64>(), 1..u64::MAX), 0..3),
        ) {
            let range = |(start, length): &(u64, u64)| *start..start.saturating_add(*length);
            let mappable: Vec<_> = mappable.iter().map(range).collect();
            let hidden: Vec<_> = hidden.iter().map(range).collect();
            for area in visible(&mappable, &hidden) {
                prop_assert!(area.start < area.end);
                prop_assert!(area.start % PAGE == 0 && area.end % PAGE == 0);
                prop_assert!(hidden.iter().all(|h| h.end <= area.start || area.end <= h.start));
                prop_assert!(mappable.iter().any(|m| m.start <= area.start && area.end <= m.end));
            }
        }
    }
}
