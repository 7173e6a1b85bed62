//! A file server that serves no files: it returns each request backwards. Its
//! end of the protocol is that of the `vhost` crate.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

pub(crate) const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 30;

/// What it has been told.
#[derive(Default)]
pub(crate) struct Server {
    pub features: u64,
    pub offered: u64,
    pub protocol: u64,
    /// Requests served so far.
    pub served: usize,
    pub memory: GuestMemoryMmap,
    pub rings: Vec<Ring>,
    /// Most chains that it takes from a ring when woken.
    pub turn: Option<usize>,
    /// What it says in the used ring instead of the truth.
    pub mischief: Option<Mischief>,
}

/// Of a ring's index, a chain's head and what was written: the entries that take
/// the place of the right one, and how far the index leaps beyond them.
pub(crate) type Mischief = Box<dyn FnMut(usize, u32, u32) -> (Vec<(u32, u32)>, u16) + Send>;

pub(crate) struct Ring {
    pub queue: Queue,
    pub running: bool,
    pub enabled: bool,
    kick: Option<File>,
    call: Option<File>,
}

/// Runs until the front end closes the connection.
pub(crate) fn start(socket: UnixStream, offered: u64) -> (Arc<Mutex<Server>>, JoinHandle<()>) {
    let server = Arc::new(Mutex::new(Server {
        offered,
        protocol: 1 << 0 | 1 << 3,
        ..Server::default()
    }));
    for _ in 0..3 {
        server.lock().unwrap().rings.push(Ring {
            queue: Queue::new(256).unwrap(),
            running: false,
            enabled: false,
            kick: None,
            call: None,
        });
    }
    let shared = Arc::clone(&server);
    let thread = thread::spawn(move || {
        let watched = socket.try_clone().unwrap();
        let mut handler = BackendReqHandler::from_stream(socket, Arc::clone(&shared));
        loop {
            let kicks: Vec<File> = {
                let server = shared.lock().unwrap();
                let running = server.rings.iter().filter(|r| r.running && r.enabled);
                running
                    .map(|r| r.kick.as_ref().unwrap().try_clone().unwrap())
                    .collect()
            };
            let mut polled = vec![PollFd::new(&watched, PollFlags::IN)];
            polled.extend(kicks.iter().map(|kick| PollFd::new(kick, PollFlags::IN)));
            poll(&mut polled, None).unwrap();
            if !polled[0].revents().is_empty() {
                match handler.handle_request() {
                    Ok(()) | Err(Error::ReqHandlerError(_) | Error::InvalidParam) => {}
                    Err(_) => return,
                }
            }
            shared.lock().unwrap().serve();
        }
    });
    (server, thread)
}

impl Ring {
    /// Puts anything into the used ring.
    fn say(&mut self, memory: &GuestMemoryMmap, entries: &[(u32, u32)], leap: u16) {
        let used = self.queue.used_ring();
        let mut next = self.queue.next_used();
        for (head, written) in entries {
            let slot = used + 4 + 8 * u64::from(next % self.queue.size());
            let element = [*head, *written];
            memory.write_obj(element, GuestAddress(slot)).unwrap();
            next = next.wrapping_add(1);
        }
        next = next.wrapping_add(leap);
        self.queue.set_next_used(next);
        memory.write_obj(next, GuestAddress(used + 2)).unwrap();
        self.call();
    }

    /// Wakes the driver, needed or not.
    pub fn call(&self) {
        if let Some(mut call) = self.call.as_ref() {
            let _ = call.write(&1u64.to_ne_bytes());
        }
    }
}

impl Server {
    fn serve(&mut self) {
        let running = |(_, ring): &(usize, &mut Ring)| ring.running && ring.enabled;
        for (index, ring) in self.rings.iter_mut().enumerate().filter(running) {
            let _ = ring.kick.as_ref().unwrap().read(&mut [0; 8]);
            let mut turn = self.turn.unwrap_or(usize::MAX);
            loop {
                if turn == 0 {
                    break;
                }
                while let Some(chain) = ring.queue.iter(&self.memory).unwrap().next() {
                    let head = chain.head_index();
                    let mut request = Vec::new();
                    let mut written = 0;
                    for descriptor in chain {
                        let mut bytes = vec![0; descriptor.len() as usize];
                        if descriptor.is_write_only() {
                            request.reverse();
                            written = request.len().min(bytes.len());
                            self.memory
                                .write_slice(&request[..written], descriptor.addr())
                                .unwrap();
                        } else {
                            self.memory
                                .read_slice(&mut bytes, descriptor.addr())
                                .unwrap();
                            request.extend(bytes);
                        }
                    }
                    self.served += 1;
                    let memory = &self.memory;
                    match &mut self.mischief {
                        None => ring.queue.add_used(memory, head, written as u32).unwrap(),
                        Some(mischief) => {
                            let (entries, leap) = mischief(index, head.into(), written as u32);
                            ring.say(memory, &entries, leap);
                        }
                    }
                    if ring.queue.needs_notification(memory).unwrap() {
                        let one = 1u64.to_ne_bytes();
                        ring.call.as_ref().unwrap().write_all(&one).unwrap();
                    }
                    turn -= 1;
                    if turn == 0 {
                        break;
                    }
                }
                if !ring.queue.enable_notification(&self.memory).unwrap() {
                    break;
                }
            }
        }
    }
}

impl VhostUserBackendReqHandlerMut for Server {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.features = features;
        for ring in &mut self.rings {
            ring.queue.set_event_idx(features & 1 << 29 != 0);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::from_bits_truncate(self.protocol))
    }

    fn set_protocol_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = regions.iter().zip(files).map(|(region, file)| {
            // The front end's addresses are the guest's.
            assert_eq!({ region.user_addr }, { region.guest_phys_addr });
            let mapping = region.mmap_region(file).unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr)).unwrap()
        });
        self.memory = GuestMemoryMmap::from_regions(regions.collect()).unwrap();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let queue = &mut self.rings[index as usize].queue;
        queue
            .try_set_size(size as u16)
            .map_err(|_| Error::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        let queue = &mut self.rings[index as usize].queue;
        queue
            .try_set_desc_table_address(GuestAddress(descriptors))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(available))
            .unwrap();
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let queue = &mut self.rings[index as usize].queue;
        queue.set_next_avail(base as u16);
        queue.set_next_used(base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = &mut self.rings[index as usize];
        ring.running = false;
        let base = ring.queue.next_avail();
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let ring = &mut self.rings[usize::from(index)];
        ring.kick = file;
        ring.queue.set_ready(true);
        ring.running = true;
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.rings[usize::from(index)].call = file;
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.rings[index as usize].enabled = enable;
        Ok(())
    }

    // Never asked for.

    fn reset_owner(&mut self) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn reset_device(&mut self) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Error::InvalidParam)
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidParam)
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidParam)
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(Error::InvalidParam)
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        Err(Error::InvalidParam)
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidParam)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidParam)
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Error::InvalidParam)
    }
}
