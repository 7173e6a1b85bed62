use std::any::Any;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::blocks::{Refusal, State};
use super::{BLOCK_BYTES, Change, Resize, Shared, Watcher};
use crate::discard::discard;
use crate::queue::DeviceQueue;
use crate::{DeviceError, Event, GuestMemory, Interrupt, Source, Worker};

// Requests, responses and states of linux/virtio_mem.h.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;
const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

/// `struct virtio_mem_req` and `struct virtio_mem_resp` of linux/virtio_mem.h.
const REQUEST_BYTES: usize = 24;
const RESPONSE_BYTES: usize = 10;

pub(super) struct MemWorker {
    pub(super) requests: DeviceQueue,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) memory: GuestMemory,
    pub(super) blocks: Shared,
    pub(super) watcher: Option<Watcher>,
}

impl Worker for MemWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        Vec::new()
    }

    fn process(&mut self, _event: Event) -> Result<(), DeviceError> {
        // Giving memory back may take long.
        self.requests.begin_with(1);
        while let Some(chain) = self.requests.pop()? {
            let mut request = [0; REQUEST_BYTES];
            if !chain.read(0, &mut request) {
                return Err(self.requests.chain_error("the request is cut off"));
            }
            let (response, state) = self.answer(request);
            let mut bytes = [0; RESPONSE_BYTES];
            bytes[..2].copy_from_slice(&response.to_le_bytes());
            bytes[8..].copy_from_slice(&state.to_le_bytes());
            if !chain.write(0, &bytes) {
                return Err(self.requests.chain_error("no room for the response"));
            }
            self.requests
                .add_used(chain.head(), RESPONSE_BYTES as u32)?;
        }
        self.requests.signal()
    }

    fn control(&mut self, message: Box<dyn Any + Send>) {
        if let Ok(resize) = message.downcast::<Resize>() {
            self.blocks.lock().request(resize.0);
            // The counter is full: the driver has not looked yet.
            let _ = self.interrupt.signal_config();
        }
    }
}

impl MemWorker {
    /// Does what is asked; the type of the response, and a state for those who
    /// asked for one.
    fn answer(&self, request: [u8; REQUEST_BYTES]) -> (u16, u16) {
        let kind = u16::from_le_bytes([request[0], request[1]]);
        let [
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            address @ ..,
            c0,
            c1,
            _,
            _,
            _,
            _,
            _,
            _,
        ] = request;
        let (address, count) = (u64::from_le_bytes(address), u16::from_le_bytes([c0, c1]));
        let done = match kind {
            PLUG => self.plug(address, count),
            STATE => match self.blocks.lock().state(address, count) {
                Ok(state) => return (ACK, number(state)),
                Err(refusal) => Err(refusal),
            },
            UNPLUG | UNPLUG_ALL => {
                let range = match kind {
                    UNPLUG => self.blocks.lock().to_unplug(address, count),
                    _ => Ok(self.blocks.lock().all()),
                };
                match range {
                    // Without the lock, which a vCPU takes to read the configuration:
                    // only this worker changes what is plugged.
                    Ok(range) => match self.take_back(&range) {
                        Ok(()) => {
                            self.blocks.lock().unplugged(&range);
                            Ok(())
                        }
                        // The driver asks again later.
                        Err(_) => return (BUSY, 0),
                    },
                    Err(refusal) => Err(refusal),
                }
            }
            _ => Err(Refusal::Wrong),
        };
        let response = match done {
            Ok(()) => ACK,
            Err(Refusal::TooMuch) => NACK,
            Err(Refusal::Wrong) => ERROR,
        };
        (response, 0)
    }

    fn plug(&self, address: u64, count: u16) -> Result<(), Refusal> {
        self.blocks.lock().plug(address, count)?;
        // They are in the region.
        let range = address..address + u64::from(count) * BLOCK_BYTES;
        self.tell(Change::Plug(range.clone())).map_err(|_| {
            self.blocks.lock().unplugged(&range);
            Refusal::TooMuch
        })
    }

    fn take_back(&self, range: &Range<u64>) -> io::Result<()> {
        // First: who gives devices memory to reach meanwhile would put new memory where
        // the old has just gone.
        self.tell(Change::Unplug(range.clone()))?;
        self.give_back(range).inspect_err(|_| {
            let kept = self.blocks.lock().plugged_within(range);
            for range in kept {
                // Refused: devices reach no more what the driver wanted to give up.
                let _ = self.tell(Change::Plug(range));
            }
        })
    }

    fn tell(&self, change: Change) -> io::Result<()> {
        match &self.watcher {
            Some(watcher) => watcher(change),
            None => Ok(()),
        }
    }

    /// Takes the host's memory from a part of the region. What is plugged there
    /// again is zero.
    fn give_back(&self, range: &Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let memory = self.memory.memory();
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let region = memory
            .find_region(GuestAddress(range.start))
            .ok_or_else(missing)?;
        let from = range.start - region.start_addr().0;
        discard(region, from, range.end - range.start)
    }
}

fn number(state: State) -> u16 {
    match state {
        State::Plugged => STATE_PLUGGED,
        State::Unplugged => STATE_UNPLUGGED,
        State::Mixed => STATE_MIXED,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use rustix::fs::{MemfdFlags, SealFlags, memfd_create};
    use vm_memory::{
        Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap,
        GuestRegionMmap,
    };

    use super::*;
    use crate::mem::{BLOCK_BYTES, Mem};
    use crate::testing::{Buffer, Driver, DriverQueue, MEMORY_BYTES};

    const START: u64 = 64 << 20;
    const BLOCKS: u64 = 8;

    struct Machine {
        driver: Driver,
        queue: DriverQueue,
        file: Arc<File>,
        at: u64,
    }

    impl Machine {
        fn new() -> Self {
            Self::of(|mem| mem)
        }

        fn of(change: impl FnOnce(Mem) -> Mem) -> Self {
            let bytes = MEMORY_BYTES + BLOCKS * BLOCK_BYTES;
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file = File::from(memfd_create("test", flags).unwrap());
            file.set_len(bytes).unwrap();
            let file = Arc::new(file);
            let region = |start, bytes: u64, offset| {
                let offset = FileOffset::from_arc(Arc::clone(&file), offset);
                GuestRegionMmap::from_range(GuestAddress(start), bytes as usize, Some(offset))
                    .unwrap()
            };
            let regions = vec![
                region(0, MEMORY_BYTES, 0),
                region(START, BLOCKS * BLOCK_BYTES, MEMORY_BYTES),
            ];
            let memory = GuestMemoryMmap::from_regions(regions).unwrap();
            let device = change(Mem::new(START..START + BLOCKS * BLOCK_BYTES));
            let mut driver = Driver::with_memory(device, GuestMemoryAtomic::new(memory));
            let queue = driver.start(u64::MAX).remove(0);
            let at = driver.allocate(64);
            Self {
                driver,
                queue,
                file,
                at,
            }
        }

        fn resize(&mut self, blocks: u64) {
            self.driver
                .function
                .control(Box::new(Resize(blocks * BLOCK_BYTES)))
                .unwrap();
            self.driver.wait_config();
        }

        fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
            let mut request = [0; REQUEST_BYTES];
            request[..2].copy_from_slice(&kind.to_le_bytes());
            request[8..16].copy_from_slice(&address.to_le_bytes());
            request[16..18].copy_from_slice(&count.to_le_bytes());
            self.driver.write(self.at, &request);
            let response = self.at + 32;
            self.queue.add(&[
                Buffer::readable(self.at, REQUEST_BYTES as u32),
                Buffer::writable(response, RESPONSE_BYTES as u32),
            ]);
            self.driver.notify(0);
            self.driver.wait_queue(0);
            assert_eq!(self.queue.pop_used().map(|used| used.1), Some(10));
            let bytes = self.driver.read(response, RESPONSE_BYTES);
            let number = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            (number(0), number(8))
        }

        /// Bytes of the host's memory.
        fn held(&self) -> u64 {
            rustix::fs::fstat(&*self.file).unwrap().st_blocks as u64 * 512
        }

        fn plugged(&mut self) -> u64 {
            u64::from_le_bytes(self.driver.device_config(40)) / BLOCK_BYTES
        }
    }

    #[test]
    fn what_a_watcher_refuses_is_not_plugged() {
        let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
        let told = Arc::clone(&seen);
        let watcher: Watcher = Arc::new(move |change| {
            let refused = change == Change::Plug(START..START + BLOCK_BYTES);
            told.lock().unwrap().push(change);
            match refused {
                true => Err(io::ErrorKind::OutOfMemory.into()),
                false => Ok(()),
            }
        });
        let mut machine = Machine::of(|mem| mem.watched_by(watcher));
        machine.resize(3);
        assert_eq!(machine.ask(PLUG, START, 1), (NACK, 0));
        assert_eq!(machine.ask(STATE, START, 1), (ACK, STATE_UNPLUGGED));
        let second = START + BLOCK_BYTES;
        assert_eq!(machine.ask(PLUG, second, 2), (ACK, 0));
        assert_eq!(machine.ask(UNPLUG, second, 1), (ACK, 0));
        assert_eq!(machine.plugged(), 1);
        let end = second + 2 * BLOCK_BYTES;
        assert_eq!(
            *seen.lock().unwrap(),
            [
                Change::Plug(START..second),
                Change::Plug(second..end),
                Change::Unplug(second..second + BLOCK_BYTES),
            ]
        );
    }

    /// Whoever pinned it again after it was given back would have new memory there.
    #[test]
    fn a_watcher_is_told_before_memory_goes_and_when_it_stays() {
        let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
        let file = Arc::new(std::sync::OnceLock::<Arc<File>>::new());
        let (told, watched) = (Arc::clone(&seen), Arc::clone(&file));
        let watcher: Watcher = Arc::new(move |change| {
            let held = rustix::fs::fstat(&**watched.get().unwrap()).unwrap();
            told.lock().unwrap().push((change, held.st_blocks * 512));
            Ok(())
        });
        let mut machine = Machine::of(|mem| mem.watched_by(watcher));
        file.set(Arc::clone(&machine.file)).unwrap();
        machine.resize(4);
        let block = |index| START + index * BLOCK_BYTES;
        assert_eq!(machine.ask(PLUG, block(0), 1), (ACK, 0));
        assert_eq!(machine.ask(PLUG, block(2), 2), (ACK, 0));
        let memory = machine.driver.memory.memory();
        let filled = vec![7; BLOCK_BYTES as usize];
        memory.write_slice(&filled, GuestAddress(START)).unwrap();
        let held = machine.held() as i64;
        seen.lock().unwrap().clear();
        assert_eq!(machine.ask(UNPLUG, START, 1), (ACK, 0));
        assert_eq!(machine.held() as i64, held - BLOCK_BYTES as i64);
        let was_there = (Change::Unplug(block(0)..block(1)), held);
        assert_eq!(seen.lock().unwrap()[..], [was_there]);

        // No hole can be made in it any more.
        rustix::fs::fcntl_add_seals(&*machine.file, SealFlags::FUTURE_WRITE).unwrap();
        seen.lock().unwrap().clear();
        assert_eq!(machine.ask(UNPLUG_ALL, 0, 0), (BUSY, 0));
        assert_eq!(machine.plugged(), 2);
        let changes: Vec<_> = seen
            .lock()
            .unwrap()
            .iter()
            .map(|one| one.0.clone())
            .collect();
        let all = Change::Unplug(block(0)..block(BLOCKS));
        assert_eq!(changes, [all, Change::Plug(block(2)..block(4))]);
    }

    #[test]
    fn gives_and_takes_memory() {
        let mut machine = Machine::new();
        assert_eq!(machine.ask(PLUG, START, 1), (NACK, 0));
        machine.resize(3);
        let wanted = u64::from_le_bytes(machine.driver.device_config(48));
        assert_eq!(wanted, 3 * BLOCK_BYTES);
        assert_eq!(machine.ask(PLUG, START, 3), (ACK, 0));
        assert_eq!(machine.ask(STATE, START, 3), (ACK, STATE_PLUGGED));
        assert_eq!(machine.ask(STATE, START, 4), (ACK, STATE_MIXED));
        assert_eq!(machine.plugged(), 3);

        let before = machine.held();
        let memory = machine.driver.memory.memory();
        let filled = vec![7; BLOCK_BYTES as usize];
        for block in 0..3 {
            let address = GuestAddress(START + block * BLOCK_BYTES);
            memory.write_slice(&filled, address).unwrap();
        }
        assert_eq!(machine.held() - before, 3 * BLOCK_BYTES);
        machine.resize(1);
        let second = START + BLOCK_BYTES;
        assert_eq!(machine.ask(UNPLUG, second, 2), (ACK, 0));
        assert_eq!(machine.held() - before, BLOCK_BYTES);
        assert_eq!(machine.ask(STATE, second, 2), (ACK, STATE_UNPLUGGED));
        machine.resize(2);
        assert_eq!(machine.ask(PLUG, second, 1), (ACK, 0));
        let byte: u8 = memory.read_obj(GuestAddress(second)).unwrap();
        assert_eq!(byte, 0);
        assert_eq!(machine.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
        assert_eq!(machine.held(), before);
        assert_eq!(machine.plugged(), 0);
    }

    #[test]
    fn answers_nonsense() {
        let mut machine = Machine::new();
        machine.resize(BLOCKS);
        assert_eq!(machine.ask(4, START, 1), (ERROR, 0));
        assert_eq!(machine.ask(UNPLUG, START, 1), (ERROR, 0));
        assert_eq!(machine.ask(PLUG, START + 4096, 1), (ERROR, 0));
        assert_eq!(machine.ask(PLUG, u64::MAX - BLOCK_BYTES, 2), (ERROR, 0));
        assert_eq!(machine.plugged(), 0);
    }

    #[test]
    fn a_request_that_is_cut_off_costs_a_reset() {
        let mut machine = Machine::new();
        machine.queue.add(&[Buffer::readable(machine.at, 8)]);
        machine.driver.notify(0);
        machine.driver.wait_needs_reset();
    }
}
