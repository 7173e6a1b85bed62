//! What the front end has configured.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::TURN;
use super::vring::Vring;
use crate::server::Server;

/// Most queues: one for FORGET and its like, the others for requests.
const QUEUES: usize = 9;

/// Most regions of guest memory.
const MEMORY_REGIONS: usize = 509;

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// The device as the front end has configured it.
#[derive(Debug, Default)]
pub struct Device {
    features: u64,
    memory: GuestMemoryMmap,
    mappings: Vec<Mapping>,
    /// Grows to the queues that the front end speaks of.
    vrings: Vec<Vring>,
}

/// Where the front end has mapped a region of guest memory: it names the rings
/// by its own addresses.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    front_end: u64,
    guest: u64,
    bytes: u64,
}

impl Device {
    /// Queues that run, with what the driver kicks them by.
    pub fn kicks(&self) -> impl Iterator<Item = (usize, &OwnedFd)> {
        (self.vrings.iter().enumerate())
            .filter(|(_, vring)| vring.runs())
            .filter_map(|(index, vring)| Some((index, vring.kick.as_ref()?)))
    }

    /// A queue was kicked.
    pub fn kicked(&mut self, queue: usize) {
        if let Some(vring) = self.vrings.get_mut(queue) {
            vring.kicked();
        }
    }

    /// Whether a queue has requests left.
    pub fn has_work(&self) -> bool {
        self.vrings.iter().any(Vring::has_work)
    }

    /// Serves each queue for a turn.
    pub fn serve_queues(&mut self, server: &mut Server) {
        for vring in self.vrings.iter_mut().filter(|vring| vring.has_work()) {
            vring.serve(&self.memory, server, TURN);
        }
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let index = index as usize;
        if index >= QUEUES {
            return Err(Error::InvalidParam);
        }
        while self.vrings.len() <= index {
            let mut vring = Vring::new().map_err(|_| Error::BackendInternalError)?;
            configure(&mut vring, self.features);
            self.vrings.push(vring);
        }
        self.vrings.get_mut(index).ok_or(Error::InvalidParam)
    }

    fn guest_address(&self, front_end: u64) -> Result<GuestAddress> {
        (self.mappings.iter())
            .find_map(|mapping| {
                let offset = front_end.checked_sub(mapping.front_end)?;
                (offset < mapping.bytes).then(|| mapping.guest.checked_add(offset))?
            })
            .map(GuestAddress)
            .ok_or(Error::InvalidParam)
    }

    /// Maps a region into this process.
    fn map(region: &VhostUserMemoryRegion, file: File) -> Result<(Mapping, GuestRegionMmap)> {
        let mapping = Mapping {
            front_end: region.user_addr,
            guest: region.guest_phys_addr,
            bytes: region.memory_size,
        };
        let mapped = GuestRegionMmap::new(
            region.mmap_region(file)?,
            GuestAddress(region.guest_phys_addr),
        );
        Ok((mapping, mapped.ok_or(Error::InvalidParam)?))
    }
}

/// Gives a queue what was negotiated. Without protocol features there is no
/// message that enables queues: they are born enabled.
fn configure(vring: &mut Vring, features: u64) {
    let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
    vring.queue.set_event_idx(event_idx);
    if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 && features != 0 {
        vring.enable(true);
    }
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.features = 0;
        self.vrings.clear();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        for vring in &mut self.vrings {
            configure(vring, features);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !PROTOCOL_FEATURES.bits() != 0 {
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(QUEUES as u64)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mapped = (regions.iter().zip(files))
            .map(|(region, file)| Self::map(region, file))
            .collect::<Result<Vec<_>>>()?;
        let (mappings, regions): (Vec<_>, Vec<_>) = mapped.into_iter().unzip();
        self.memory = GuestMemoryMmap::from_regions(regions).map_err(|_| Error::InvalidParam)?;
        self.mappings = mappings;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.mappings.len() >= MEMORY_REGIONS {
            return Err(Error::InvalidParam);
        }
        let (mapping, mapped) = Self::map(region, file)?;
        self.memory =
            (self.memory.insert_region(Arc::new(mapped))).map_err(|_| Error::InvalidParam)?;
        self.mappings.push(mapping);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let guest = region.guest_phys_addr;
        let (memory, _) = (self.memory)
            .remove_region(GuestAddress(guest), region.memory_size)
            .map_err(|_| Error::InvalidParam)?;
        self.memory = memory;
        self.mappings.retain(|mapping| mapping.guest != guest);
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let size = u16::try_from(size).map_err(|_| Error::InvalidParam)?;
        (self.vring(index)?.queue)
            .try_set_size(size)
            .map_err(|_| Error::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let descriptors = self.guest_address(descriptors)?;
        let used = self.guest_address(used)?;
        let available = self.guest_address(available)?;
        self.vring(index)?;
        let Self { vrings, memory, .. } = self;
        let vring = (vrings.get_mut(index as usize)).ok_or(Error::InvalidParam)?;
        let queue = &mut vring.queue;
        (queue.try_set_desc_table_address(descriptors)).map_err(|_| Error::InvalidParam)?;
        (queue.try_set_used_ring_address(used)).map_err(|_| Error::InvalidParam)?;
        (queue.try_set_avail_ring_address(available)).map_err(|_| Error::InvalidParam)?;
        // A queue that goes on after a pause has answered that much.
        let answered = queue
            .used_idx(memory, std::sync::atomic::Ordering::Relaxed)
            .map_err(|_| Error::InvalidParam)?;
        queue.set_next_used(answered.0);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.vring(index)?.queue.set_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        vring.stop();
        // Every request taken has been answered.
        let base = vring.queue.next_avail();
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let vring = self.vring(index.into())?;
        // A queue without a kick would have to be polled.
        let kick = file.ok_or(Error::InvalidParam)?;
        vring.kick = Some(kick.into());
        vring.start();
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.vring(index.into())?.call = file.map(OwnedFd::from);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> Result<()> {
        self.vring(index.into()).map(|_| ())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enable(enable);
        Ok(())
    }

    // Not offered; the protocol library asks only for what was negotiated, but
    // its trait wants an answer.

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(NOT_OFFERED)
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(NOT_OFFERED)
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(NOT_OFFERED)
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(NOT_OFFERED)
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(NOT_OFFERED)
    }
}

const NOT_OFFERED: Error = Error::InvalidOperation("this feature was not offered");
