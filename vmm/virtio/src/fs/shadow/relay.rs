//! One queue's requests, on their way from the guest's ring to the server's and
//! back.

use std::os::fd::BorrowedFd;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

use super::arena::Arena;
use super::ring::{CHAINS, Ring};
use crate::fs::BackEndError;
use crate::queue::{Chain, DeviceQueue};
use crate::{ActivateError, DeviceError};

/// Requests taken from the guest at an event: each is copied.
const TURN: u16 = 32;

/// What is written begins at such an address, so that neither side of a request
/// shares a cache line with the other.
const ALIGNMENT: u64 = 64;

/// Where a queue's requests lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// The ring's page.
    pub ring: u64,
    pub arena: u64,
    pub arena_end: u64,
    /// Largest request, what is read and what is written together.
    pub most: u64,
}

/// A request that the server has.
struct Pending {
    chain: Chain,
    /// Where it lies in the arena.
    at: u64,
    writable_at: u64,
    writable_len: u32,
}

pub(super) struct Relay {
    guest: DeviceQueue,
    ring: Ring,
    memory: GuestMemoryMmap,
    arena: Arena,
    most: u64,
    /// By number in the ring.
    pending: Vec<Option<Pending>>,
    free: Vec<u16>,
}

impl Relay {
    /// With an empty ring; the server must not run.
    pub(super) fn new(
        guest: DeviceQueue,
        memory: &GuestMemoryMmap,
        place: Place,
        event_idx: bool,
    ) -> Result<Self, ActivateError> {
        let ring = Ring::new(memory, place.ring, event_idx)
            .map_err(|_| ActivateError::BackEnd(BackEndError::Memory))?;
        Ok(Self {
            guest,
            ring,
            memory: memory.clone(),
            arena: Arena::new(place.arena, place.arena_end),
            most: place.most,
            pending: (0..CHAINS).map(|_| None).collect(),
            free: (0..CHAINS).rev().collect(),
        })
    }

    /// Takes requests, and returns those that are done, until neither is left.
    pub(super) fn work(&mut self, kick: BorrowedFd<'_>) -> Result<(), DeviceError> {
        self.guest.begin_with(TURN);
        loop {
            let ended = self.collect()?;
            let begun = self.forward()?;
            if begun && self.ring.wants_kick().map_err(unreachable)? {
                tell(kick);
            }
            if !ended && !begun {
                break;
            }
        }
        self.guest.signal()
    }

    /// Returns what is done. The server has stopped, and has done so many in all.
    pub(super) fn finish(&mut self, done: u16) -> Result<(), DeviceError> {
        self.collect()?;
        self.guest.signal()?;
        // What it took and did not return it would never return.
        match self.ring.position() == done {
            true => Ok(()),
            false => Err(wrong("another number of requests than it took")),
        }
    }

    pub(super) fn in_flight(&self) -> bool {
        self.free.len() < self.pending.len()
    }

    /// True if there was any.
    fn collect(&mut self) -> Result<bool, DeviceError> {
        let mut any = false;
        let mut returned = self.ring.returned().map_err(unreachable)?;
        loop {
            if usize::from(returned) > self.pending.len() - self.free.len() {
                return Err(wrong("more requests than it has"));
            }
            for _ in 0..returned {
                let (head, written) = self.ring.take().map_err(unreachable)?;
                self.end(head, written)?;
                any = true;
            }
            // Looked at once a round: each round that is not the last ends a request.
            returned = self.ring.ask_for_call().map_err(unreachable)?;
            if returned == 0 {
                return Ok(any);
            }
        }
    }

    fn end(&mut self, head: u32, written: u32) -> Result<(), DeviceError> {
        let number = u16::try_from(head / 2)
            .ok()
            .filter(|_| head.is_multiple_of(2));
        let request = number.and_then(|number| {
            let slot = self.pending.get_mut(usize::from(number))?;
            Some((number, slot.take()?))
        });
        let Some((number, request)) = request else {
            return Err(wrong("a request that it does not have"));
        };
        self.free.push(number);
        self.arena.give_back(request.at);
        if written > request.writable_len {
            return Err(wrong("more bytes than there was room for"));
        }
        if written > 0 {
            let from = self
                .memory
                .get_slice(GuestAddress(request.writable_at), written as usize)
                .map_err(unreachable)?;
            request.chain.copy_in(&from);
        }
        self.guest.add_used(request.chain.head(), written)
    }

    /// True if there was any. What does not fit stays in the guest's ring until
    /// the server has returned something; alone, every request fits.
    fn forward(&mut self) -> Result<bool, DeviceError> {
        let mut any = false;
        while let Some(number) = self.free.last().copied() {
            let Some(chain) = self.guest.pop()? else {
                break;
            };
            if chain.readable_len() == 0 {
                return Err(self.guest.chain_error("a request that says nothing"));
            }
            // Both below 4 GiB.
            let readable_bytes = (chain.readable_len() as u64).next_multiple_of(ALIGNMENT);
            let bytes = readable_bytes + chain.writable_len() as u64;
            if bytes > self.most {
                return Err(self.guest.chain_error("a request that is too large"));
            }
            let Some(at) = self.arena.take(bytes) else {
                self.guest.unpop(chain);
                break;
            };
            self.free.pop();
            let request = Pending {
                at,
                writable_at: at + readable_bytes,
                writable_len: chain.writable_len() as u32,
                chain,
            };
            self.offer(number, &request).map_err(unreachable)?;
            if let Some(slot) = self.pending.get_mut(usize::from(number)) {
                *slot = Some(request);
            }
            any = true;
        }
        Ok(any)
    }

    fn offer(&mut self, number: u16, request: &Pending) -> Result<(), GuestMemoryError> {
        let len = request.chain.readable_len();
        let to = self.memory.get_slice(GuestAddress(request.at), len)?;
        request.chain.copy_out(&to);
        let writable = (request.writable_at, request.writable_len);
        let writable = (request.writable_len > 0).then_some(writable);
        self.ring.offer(number, (request.at, len as u32), writable)
    }
}

/// Tells the server that there is something in its ring. A pipe that is full
/// tells as well.
pub(super) fn tell(kick: BorrowedFd<'_>) {
    let _ = rustix::io::write(kick, &1_u64.to_ne_bytes());
}

fn wrong(what: &'static str) -> DeviceError {
    DeviceError::BackEnd(BackEndError::Returned(what))
}

/// Ring and arena lie in the shadow.
fn unreachable(_: GuestMemoryError) -> DeviceError {
    DeviceError::BackEnd(BackEndError::Memory)
}
