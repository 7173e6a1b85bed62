//! The working half of a disk.

use std::io;

use super::QUEUE_SIZE;
use super::disk::Disk;
use super::engine::{Call, Engine};
use super::request::{HEADER_BYTES, Request, STATUS_BYTES, Status};
use crate::queue::{Chain, DeviceQueue};
use crate::rate::Limiter;
use crate::{DeviceError, Event, Source, Worker};

/// Requests for each event if the loop has to wait for each.
const WAITING_BUDGET: u16 = 8;

/// The sources.
const ENGINE: u32 = 0;
const LIMITER: u32 = 1;

pub(super) struct BlockWorker {
    queue: DeviceQueue,
    disk: Disk,
    /// Only gone when the worker is taken apart.
    engine: Option<Engine>,
    limiter: Limiter,
    /// The driver does not ask for flushes: writes are durable by themselves.
    durable: bool,
    leaves: Leaves,
    /// Calls of this event that the loop has waited for though the engine does not.
    waited: u16,
    /// Requests that the engine works on, by token.
    slots: Vec<Option<Pending>>,
    free: Vec<u16>,
}

/// Whether the disk goes.
enum Leaves {
    No,
    /// No more requests are taken; those in flight are ended.
    Finishing,
    /// Those in flight cannot be.
    GivenUp,
}

/// A request that the engine works on. It owns what the kernel reads and writes
/// in the meantime.
struct Pending {
    chain: Chain,
    /// Boxed since the kernel may look at it while the slot moves.
    call: Box<Call>,
    /// Bytes still to be moved.
    left: usize,
}

impl BlockWorker {
    pub(super) fn new(
        queue: DeviceQueue,
        disk: Disk,
        engine: Engine,
        limiter: Limiter,
        write_back: bool,
    ) -> Self {
        Self {
            queue,
            disk,
            engine: Some(engine),
            limiter,
            durable: !write_back,
            leaves: Leaves::No,
            waited: 0,
            slots: (0..QUEUE_SIZE).map(|_| None).collect(),
            free: (0..QUEUE_SIZE).collect(),
        }
    }

    /// Takes the limiter back, and the engine unless the kernel refused to finish
    /// what is in flight. The loop has waited for that: who takes the worker apart
    /// may not.
    pub(super) fn into_parts(mut self) -> (Option<Engine>, Limiter) {
        let engine = match self.in_flight() {
            true => None,
            false => self.engine.take(),
        };
        (engine, std::mem::take(&mut self.limiter))
    }

    /// Takes requests, and ends those that are done, until neither is left.
    fn work(&mut self) -> Result<(), DeviceError> {
        loop {
            let begun = self.take_requests()?;
            self.engine(Engine::submit)?;
            let ended = self.end_finished()?;
            if !begun && !ended {
                break;
            }
        }
        self.queue.signal()
    }

    /// True if there was any.
    fn take_requests(&mut self) -> Result<bool, DeviceError> {
        let mut any = false;
        while matches!(self.leaves, Leaves::No) && !self.free.is_empty() && self.limiter.allows()? {
            let Some(chain) = self.queue.pop()? else {
                break;
            };
            any = true;
            if chain.readable_len() < HEADER_BYTES || chain.writable_len() < STATUS_BYTES {
                return Err(self.queue.chain_error("a request without header or status"));
            }
            let request = Request::parse(&chain, &self.disk);
            let bytes = request.as_ref().map_or(0, Request::moved_bytes);
            self.limiter.moved(bytes);
            if matches!(request, Ok(Request::Discard { .. })) && self.disk.is_block_device {
                self.waited += 1;
                if self.waited >= WAITING_BUDGET {
                    self.queue.begin_with(0);
                }
            }
            match request {
                Ok(request) => self.begin(chain, request)?,
                Err(status) => self.end(&chain, status)?,
            }
        }
        Ok(any)
    }

    fn begin(&mut self, chain: Chain, request: Request) -> Result<(), DeviceError> {
        let (call, left) = match request {
            Request::Read { len: 0, .. }
            | Request::Write { len: 0, .. }
            | Request::Discard { len: 0, .. }
            | Request::WriteZeroes { len: 0, .. } => return self.end(&chain, Status::Ok),
            Request::GetId => {
                let room = chain.writable_len() - STATUS_BYTES;
                let len = room.min(self.disk.serial.len());
                let _ = chain.write(0, &self.disk.serial[..len]);
                return self.end(&chain, Status::Ok);
            }
            Request::Flush if self.disk.read_only => return self.end(&chain, Status::Ok),
            Request::Flush => (Call::Flush, 0),
            Request::Read { position, len } => {
                let pieces = chain.writable_iovecs(0, len);
                (Call::Read { pieces, position }, len)
            }
            Request::Write { position, len } => {
                let pieces = chain.readable_iovecs(HEADER_BYTES, len);
                let durable = self.durable;
                let call = Call::Write {
                    pieces,
                    position,
                    durable,
                };
                (call, len)
            }
            Request::Discard { position, len } if self.disk.is_block_device => {
                (Call::DiscardDevice { position, len }, 0)
            }
            Request::Discard { position, len }
            | Request::WriteZeroes {
                position,
                len,
                unmap: true,
            } if !self.disk.is_block_device => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let call = Call::Allocate {
                    mode,
                    position,
                    len,
                };
                (call, 0)
            }
            Request::Discard { position, len } | Request::WriteZeroes { position, len, .. } => {
                let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
                let call = Call::Allocate {
                    mode,
                    position,
                    len,
                };
                (call, 0)
            }
        };
        self.start(Pending {
            chain,
            call: Box::new(call),
            left,
        })
    }

    /// Gives a call to the engine.
    fn start(&mut self, pending: Pending) -> Result<(), DeviceError> {
        // Callers make sure that there is one.
        let Some(token) = self.free.pop() else {
            return self.end(&pending.chain, Status::Error);
        };
        let slot = self.slots[usize::from(token)].insert(pending);
        let Some(engine) = &mut self.engine else {
            return Ok(());
        };
        // SAFETY: the slot keeps call and chain until the result is there, for
        // ever if need be (Drop).
        let result = unsafe { engine.begin(&self.disk.file, &slot.call, token.into()) };
        match result {
            Ok(None) => Ok(()),
            Ok(Some(result)) => self.finish(token, result),
            Err(source) => {
                self.slots[usize::from(token)] = None;
                self.free.push(token);
                Err(host_error(source))
            }
        }
    }

    /// True if there was any.
    fn end_finished(&mut self) -> Result<bool, DeviceError> {
        let mut any = false;
        while let Some((token, result)) = self.engine.as_mut().and_then(Engine::finished) {
            any = true;
            if let Ok(token) = u16::try_from(token) {
                self.finish(token, result)?;
            }
        }
        Ok(any)
    }

    /// The kernel is done with a call: ends its request or goes on with the rest.
    fn finish(&mut self, token: u16, result: i32) -> Result<(), DeviceError> {
        let Some(mut pending) = self
            .slots
            .get_mut(usize::from(token))
            .and_then(Option::take)
        else {
            return Ok(());
        };
        self.free.push(token);
        let status = match usize::try_from(result) {
            Err(_) if matches!(-result, libc::EOPNOTSUPP | libc::ENOSYS) => Status::Unsupported,
            Err(_) => Status::Error,
            Ok(moved) if moved >= pending.left => Status::Ok,
            // The file is shorter than it was.
            Ok(0) => Status::Error,
            Ok(moved) => {
                pending.left -= moved;
                pending.call.advance(moved);
                return self.start(pending);
            }
        };
        self.end(&pending.chain, status)
    }

    fn end(&mut self, chain: &Chain, status: Status) -> Result<(), DeviceError> {
        let at = chain.writable_len() - STATUS_BYTES;
        let _ = chain.write(at, &[status as u8]);
        // Chains are shorter than 4 GiB.
        self.queue
            .add_used(chain.head(), chain.writable_len() as u32)
    }

    fn in_flight(&self) -> bool {
        self.free.len() < self.slots.len()
    }

    fn engine(&mut self, act: fn(&mut Engine) -> io::Result<()>) -> Result<(), DeviceError> {
        match &mut self.engine {
            Some(engine) => act(engine).map_err(host_error),
            None => Ok(()),
        }
    }
}

impl Worker for BlockWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        let fd = self.engine.as_ref().and_then(Engine::source);
        fd.map(|fd| Source {
            fd,
            token: ENGINE,
            readable: true,
            writable: false,
        })
        .into_iter()
        .chain(self.limiter.source(LIMITER))
        .collect()
    }

    fn process(&mut self, event: Event) -> Result<(), DeviceError> {
        if matches!(event, Event::Ready { token: LIMITER, .. }) {
            self.limiter.woken();
        }
        self.waited = 0;
        match self.engine {
            Some(Engine::Waiting) => self.queue.begin_with(WAITING_BUDGET),
            _ => self.queue.begin(),
        }
        self.work()
    }

    fn quiesce(&mut self) {
        if !self.in_flight() {
            return;
        }
        while self.in_flight() && self.engine(Engine::wait).is_ok() {
            // A ring that cannot be told the result fails at the next event.
            let _ = self.end_finished();
        }
        let _ = self.queue.signal();
    }

    fn leave(&mut self) {
        // A driver that broke the rules in the middle leaves some to be handed over.
        self.leaves = match self.engine(Engine::submit) {
            Ok(()) => Leaves::Finishing,
            // Nothing will be heard of what is in flight.
            Err(_) => Leaves::GivenUp,
        };
    }

    fn is_at_rest(&self) -> bool {
        matches!(self.leaves, Leaves::GivenUp) || !self.in_flight()
    }
}

impl Drop for BlockWorker {
    fn drop(&mut self) {
        if self.in_flight() {
            // What the kernel may still write to must stay for ever.
            std::mem::forget(std::mem::take(&mut self.slots));
        } else if let Some(engine) = self.engine.take() {
            engine.give_back();
        }
    }
}

impl Call {
    /// Leaves out the first `moved` bytes.
    fn advance(&mut self, moved: usize) {
        let (Self::Read {
            pieces, position, ..
        }
        | Self::Write {
            pieces, position, ..
        }) = self
        else {
            return;
        };
        *position += moved as u64;
        let mut skip = moved;
        pieces.retain_mut(|piece| {
            let cut = skip.min(piece.iov_len);
            skip -= cut;
            piece.iov_base = piece.iov_base.wrapping_byte_add(cut);
            piece.iov_len -= cut;
            piece.iov_len > 0
        });
    }
}

fn host_error(source: io::Error) -> DeviceError {
    DeviceError::Host {
        what: "handing a request to the kernel",
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_on_after_a_part() {
        let memory = [0_u8; 30];
        let piece = |from: usize, len| libc::iovec {
            iov_base: memory[from..].as_ptr().cast_mut().cast(),
            iov_len: len,
        };
        let mut call = Call::Read {
            pieces: vec![piece(0, 10), piece(10, 5), piece(15, 15)],
            position: 1000,
        };
        let mut expect = |moved, first: usize, lens: &[usize]| {
            call.advance(moved);
            let Call::Read { pieces, position } = &call else {
                unreachable!("it stays what it is");
            };
            assert_eq!(*position, 1000 + first as u64);
            assert_eq!(
                pieces[0].iov_base,
                memory[first..].as_ptr().cast_mut().cast()
            );
            assert_eq!(pieces.iter().map(|p| p.iov_len).collect::<Vec<_>>(), lens);
        };
        expect(4, 4, &[6, 5, 15]);
        expect(6, 10, &[5, 15]);
        expect(6, 16, &[14]);
    }
}
