//! A virtqueue in guest memory and its two event descriptors.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions};

use crate::buffers::Buffers;
use crate::server::Server;

/// Largest size of a queue.
pub const QUEUE_SIZE: u16 = 1024;

/// How long a queue may keep the others, the front end and what is unmounted
/// waiting, the request apart that exceeds it.
const TURN_TIME: Duration = Duration::from_millis(10);

/// A virtqueue. It runs while it is ready (started) and enabled.
#[derive(Debug)]
pub struct Vring {
    /// The rings in guest memory.
    pub queue: Queue,
    /// Whether the front end lets it run.
    pub enabled: bool,
    /// The driver tells of new requests.
    pub kick: Option<OwnedFd>,
    /// The driver is told of answers.
    pub call: Option<OwnedFd>,
    /// There may be requests.
    has_work: bool,
    /// The driver has made the rings unusable; nothing is served until the
    /// queue is started again.
    broken: bool,
}

impl Vring {
    /// A stopped queue.
    pub fn new() -> Result<Self, QueueError> {
        Ok(Self {
            queue: Queue::new(QUEUE_SIZE)?,
            enabled: false,
            kick: None,
            call: None,
            has_work: false,
            broken: false,
        })
    }

    /// Starts the queue once it has been told how it is kicked. The driver may
    /// have kicked before.
    pub fn start(&mut self) {
        self.queue.set_ready(true);
        self.broken = false;
        self.has_work = true;
    }

    /// Stops the queue.
    pub fn stop(&mut self) {
        self.queue.set_ready(false);
        self.kick = None;
        self.call = None;
        self.has_work = false;
    }

    /// Lets the queue run or not.
    pub fn enable(&mut self, enabled: bool) {
        self.enabled = enabled;
        self.has_work |= enabled;
    }

    /// Whether requests may be taken.
    pub fn runs(&self) -> bool {
        self.enabled && self.queue.ready() && !self.broken
    }

    /// Whether there may be requests to take.
    pub fn has_work(&self) -> bool {
        self.has_work && self.runs()
    }

    /// The driver has kicked.
    pub fn kicked(&mut self) {
        if let Some(kick) = &self.kick {
            // Whatever it says: the rings are looked at.
            let _ = rustix::io::read(kick, &mut [0; 8]);
        }
        self.has_work = true;
    }

    /// Serves up to `turn` requests, or fewer that take long.
    pub fn serve(&mut self, memory: &GuestMemoryMmap, server: &mut Server, turn: usize) {
        match self.serve_some(memory, server, turn) {
            Ok(more) => self.has_work = more,
            Err(error) => {
                self.broken = true;
                // Not eprintln!, which panics where the pipe is full: the guest
                // writes to it as well.
                let _ = writeln!(
                    std::io::stderr(),
                    "husk-fs: a queue is unusable until the driver starts it again: {error}"
                );
            }
        }
    }

    /// Whether there are requests left.
    fn serve_some(
        &mut self,
        memory: &GuestMemoryMmap,
        server: &mut Server,
        turn: usize,
    ) -> Result<bool, QueueError> {
        let began = Instant::now();
        for _ in 0..turn {
            let chain = self.queue.iter(memory)?.next();
            let Some(chain) = chain else {
                if self.queue.enable_notification(memory)? {
                    continue;
                }
                return Ok(false);
            };
            self.queue.disable_notification(memory)?;
            let head = chain.head_index();
            let used = match buffers(chain, memory) {
                Ok((request, reply)) => server.handle(request, reply),
                Err(_) => 0,
            };
            // Never more than the driver's descriptors can hold.
            let used = u32::try_from(used).unwrap_or(u32::MAX);
            self.queue.add_used(memory, head, used)?;
            if self.queue.needs_notification(memory)? {
                self.notify();
            }
            if began.elapsed() >= TURN_TIME {
                break;
            }
        }
        Ok(true)
    }

    fn notify(&self) {
        if let Some(call) = &self.call {
            // A full counter means that the driver has been told already.
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }
}

/// The memory of a chain: what the device reads, then what it writes.
fn buffers<'m>(
    chain: DescriptorChain<&GuestMemoryMmap>,
    memory: &'m GuestMemoryMmap,
) -> Result<(Buffers<'m>, Buffers<'m>), Errno> {
    let mut readable = Buffers::default();
    let mut writable = Buffers::default();
    for descriptor in chain {
        let (side, access) = if descriptor.is_write_only() {
            (&mut writable, Permissions::Write)
        } else if writable.is_empty() {
            (&mut readable, Permissions::Read)
        } else {
            // virtio 1.2, 2.7.4.2: what the device reads comes first.
            return Err(Errno::INVAL);
        };
        let slices =
            GuestMemory::get_slices(memory, descriptor.addr(), descriptor.len() as usize, access);
        for slice in slices.map_err(|_| Errno::FAULT)? {
            side.push(slice.map_err(|_| Errno::FAULT)?)?;
        }
    }
    Ok((readable, writable))
}
