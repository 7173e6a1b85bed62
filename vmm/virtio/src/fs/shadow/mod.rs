//! A file system for a guest whose memory is private to this process: requests
//! and answers are copied through memory of the device's own, which alone the
//! file server sees.
//!
//! ```text
//!   guest's queue ──> Relay ──> ring in the shadow ──> file server
//!   used ring   <── copied, checked <── used ring <──────────┘
//! ```
//!
//! The server is trusted no more than the guest: whatever it writes into the
//! shadow costs the device at most.

mod arena;
mod relay;
mod ring;
mod worker;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::pipe::PipeFlags;
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use self::arena::PAGE_BYTES;
use self::relay::Place;
use super::QUEUE_SIZES;
use super::back_end::ServedQueue;
pub(super) use worker::ShadowWorker;

/// Where the shadow is for the server: not at 0, so that no address is right by
/// chance.
const BASE: u64 = 1 << 32;

/// A FORGET has some 50 bytes.
const HIGH_PRIORITY_BYTES: u64 = 256 << 10;
/// A READ or WRITE moves at most 1 MiB, and one of a guest whose queue has 128
/// entries 496 KiB.
const REQUESTS_BYTES: u64 = 4 << 20;

const RINGS: u64 = BASE;
const HIGH_PRIORITY: u64 = RINGS + QUEUE_SIZES.len() as u64 * PAGE_BYTES;
const REQUESTS: u64 = HIGH_PRIORITY + HIGH_PRIORITY_BYTES;
const END: u64 = REQUESTS + REQUESTS_BYTES;

/// Each queue has memory of its own, so that none waits for another.
const PLACES: [Place; QUEUE_SIZES.len()] = [
    Place {
        ring: RINGS,
        arena: HIGH_PRIORITY,
        arena_end: REQUESTS,
        most: 64 << 10,
    },
    Place {
        ring: RINGS + PAGE_BYTES,
        arena: REQUESTS,
        arena_end: END,
        most: (1 << 20) + (128 << 10),
    },
];

/// Memory that a file server works on instead of the guest's, and how the two
/// sides wake each other. It is made before the process locks itself up, and
/// serves one server for ever: another one could still see the first one's.
#[derive(Debug)]
pub struct Shadow {
    memory: GuestMemoryMmap,
    /// What the server gets.
    served: Vec<ServedQueue>,
    /// What stays here.
    ends: Vec<Ends>,
}

/// Our ends of a queue's pipes. The server could have an event descriptor block
/// whoever writes or reads it, since its flags are everybody's; it cannot have a
/// pipe's other end do so.
#[derive(Debug)]
struct Ends {
    kick: OwnedFd,
    call: OwnedFd,
}

impl Ends {
    fn kick(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    fn call(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// What is left makes another event.
    fn take_calls(&self) {
        let _ = rustix::io::read(&self.call, &mut [0; 1024]);
    }
}

impl Shadow {
    /// Memory of about 4 MiB, of which exists what is used.
    ///
    /// # Errors
    /// The host refuses it.
    pub fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("shadow", flags)?);
        file.set_len(END - BASE)?;
        // The server can neither cut it off under our feet nor have it grow.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        let range = (
            GuestAddress(BASE),
            (END - BASE) as usize,
            Some(FileOffset::new(file, 0)),
        );
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).map_err(io::Error::other)?;
        let mut shadow = Self {
            memory,
            served: Vec::new(),
            ends: Vec::new(),
        };
        for (index, place) in (0..).zip(PLACES) {
            let mut queue = Queue::new(ring::SIZE).map_err(io::Error::other)?;
            self::place(&mut queue, place.ring);
            let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
            let (kick, our_kick) = rustix::pipe::pipe_with(flags)?;
            let (our_call, call) = rustix::pipe::pipe_with(flags)?;
            shadow.served.push(ServedQueue {
                index,
                queue,
                kick,
                call,
            });
            shadow.ends.push(Ends {
                kick: our_kick,
                call: our_call,
            });
        }
        Ok(shadow)
    }

    /// Lets go of the pages that requests have used. None is under way.
    fn release(&self) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for file in self.memory.iter().filter_map(|region| region.file_offset()) {
            // What cannot be let go of stays.
            let _ = rustix::fs::fallocate(
                file.file(),
                flags,
                HIGH_PRIORITY - BASE,
                END - HIGH_PRIORITY,
            );
        }
    }
}

/// Has `queue` describe the ring in the page at `at`.
fn place(queue: &mut Queue, at: u64) {
    let half = |offset: u64| Some((at + offset) as u32);
    let high = Some((at >> 32) as u32);
    queue.set_desc_table_address(half(0), high);
    queue.set_avail_ring_address(half(ring::AVAILABLE), high);
    queue.set_used_ring_address(half(ring::USED), high);
    queue.set_ready(true);
}
