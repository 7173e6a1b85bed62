//! What a virtio device is to its transport.
//!
//! ```text
//!             activate()                     the loop runs the worker
//!   idle ───────────────────> worker made ──────────────────────────> active
//!    ^                                                                   │
//!    │        reset(worker)                  the loop gives it back      │
//!    └──────────────────────< worker back <──────────────────────────────┘
//! ```
//!
//! The idle half answers configuration accesses from vCPU threads. The working
//! half owns the queues while the driver is running (DRIVER_OK, virtio 1.2, 3.1)
//! and lives on an event loop's thread. What both need goes over at activation
//! and comes back at reset, so nothing is shared and nothing is locked.

use std::any::Any;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::fs::BackEndError;

/// The guest's memory.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Device types (virtio 1.2, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceType {
    /// 5.1
    Net = 1,
    /// 5.2
    Block = 2,
    /// 5.3
    Console = 3,
    /// 5.4
    Rng = 4,
    /// 5.5
    Balloon = 5,
    /// 5.10
    Vsock = 19,
    /// 5.15
    Mem = 24,
    /// 5.11
    Fs = 26,
}

/// A virtio device at rest: what it offers, and how it starts to work.
pub trait VirtioDevice: Send {
    /// Which device it is.
    fn device_type(&self) -> DeviceType;

    /// Feature bits it offers. The transport adds `VIRTIO_F_VERSION_1`. What its
    /// rings can do is the device's affair: one that works on them itself offers
    /// [`crate::queue::FEATURES`].
    fn offered_features(&self) -> u64;

    /// Largest size of each of its queues; powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from its configuration space at `offset`; zeroes past the
    /// end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes what the driver writes to its configuration space.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Takes something from the control side while the device is idle; once it
    /// is active this goes to [`Worker::control`]. The default ignores it.
    fn control(&mut self, _message: Box<dyn Any + Send>) {}

    /// The driver was saved when it was ready, and goes on with this device, which
    /// [`VirtioDevice::activate`] follows.
    fn restored(&mut self) {}

    /// The driver is ready: hands out the working half.
    ///
    /// # Errors
    /// What the driver set up is no use; the transport sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, ActivateError>;

    /// The driver reset the device: takes the working half back. After this the
    /// device can be activated again.
    fn reset(&mut self, worker: Box<dyn Worker>);
}

/// The working half of an active device. All its methods run on one event
/// loop's thread and must not block; taking queues back from another process
/// (vhost) may wait a few seconds for it.
pub trait Worker: Any + Send {
    /// Descriptors to wait for, besides the queues' notifications. Asked once,
    /// when the loop takes the worker, and again after each event or control
    /// message for which [`Worker::sources_changed`] says so.
    fn sources(&self) -> Vec<Source<'_>>;

    /// Whether the loop waits for this queue's notifications. Not when somebody
    /// else works on the queue (vhost).
    fn handles_queue(&self, _queue: u16) -> bool {
        true
    }

    /// True once after the sources have changed.
    fn sources_changed(&mut self) -> bool {
        false
    }

    /// Handles one event. Does a bounded amount of work, so that the workers of
    /// one loop get their turns; sources are level-triggered, and a queue that
    /// still has something written to its `notify` gets another event.
    ///
    /// # Errors
    /// The driver broke the rules or the device cannot go on; the transport
    /// sets DEVICE_NEEDS_RESET and the worker gets no more events.
    fn process(&mut self, event: Event) -> Result<(), DeviceError>;

    /// Takes something from the control side while it works; each device
    /// defines what. The default ignores it.
    fn control(&mut self, _message: Box<dyn Any + Send>) {}

    /// The machine is being paused: finishes what is in flight with the host, so
    /// that afterwards guest memory is not touched until the next event. May come
    /// several times in a row.
    fn quiesce(&mut self) {}

    /// The device is reset or taken away: takes nothing new from the driver, gets no
    /// more notifications of queues, and goes on with its sources until it is
    /// [at rest](Worker::is_at_rest). One whose host may take long does not wait for it
    /// here: the loop's other workers go on meanwhile.
    fn leave(&mut self) {
        self.quiesce();
    }

    /// Whether nothing is in flight, after [`Worker::leave`].
    fn is_at_rest(&self) -> bool {
        true
    }

    /// The machine runs again after a pause.
    ///
    /// # Errors
    /// As for [`Worker::process`].
    fn resume(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// A descriptor that a worker waits for.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The descriptor.
    pub fd: BorrowedFd<'a>,
    /// Comes back in [`Event::Ready`]; the worker's own choice. A descriptor
    /// that takes the place of a closed one gets another token, since its
    /// number may be the same.
    pub token: u32,
    /// Wait for it to become readable.
    pub readable: bool,
    /// Wait for it to become writable.
    pub writable: bool,
}

/// What a worker is woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The driver notified this queue. The loop has drained the eventfd.
    Queue(u16),
    /// One of its own sources is ready.
    Ready {
        /// As in [`Source::token`].
        token: u32,
        /// Readable, or at its end.
        readable: bool,
        /// Writable.
        writable: bool,
        /// Hung up or in error.
        hangup: bool,
    },
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Where the queues and buffers are.
    pub memory: GuestMemory,
    /// One for each of the device's queues, in order; `None` where the driver
    /// left a queue disabled.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Features that both sides agreed on.
    pub negotiated_features: u64,
    /// How to interrupt the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A queue that the driver has set up and the transport has validated.
pub struct ActiveQueue {
    /// The ring.
    pub queue: Queue,
    /// The driver's notifications. The event loop waits for it; a device that
    /// hands the queue to somebody else (vhost) takes a clone.
    pub notify: Arc<EventFd>,
}

/// Interrupts the driver. Which vector it becomes is the transport's affair.
pub trait Interrupt: Send + Sync {
    /// Used buffers were added to a queue.
    ///
    /// # Errors
    /// The event descriptor could not be written.
    fn signal_queue(&self, queue: u16) -> io::Result<()>;

    /// The configuration space changed.
    ///
    /// # Errors
    /// The event descriptor could not be written.
    fn signal_config(&self) -> io::Result<()>;

    /// An event descriptor that does what [`Interrupt::signal_queue`] does when
    /// it is written, for queues that another process works on.
    ///
    /// # Errors
    /// The descriptor could not be duplicated.
    fn queue_call(&self, queue: u16) -> io::Result<OwnedFd>;
}

/// A device that could not start to work.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left a queue disabled that the device cannot do without.
    #[error("queue {0} is not enabled")]
    QueueDisabled(u16),
    /// A host resource could not be had.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The process that was to work on the queues cannot.
    #[error("back end of the device")]
    BackEnd(#[source] BackEndError),
}

/// An active device that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver's ring or descriptors break the rules.
    #[error("queue {queue}")]
    Queue {
        /// Which.
        queue: u16,
        /// Which rule.
        #[source]
        source: virtio_queue::Error,
    },
    /// A descriptor chain the device cannot take.
    #[error("queue {queue}: {what}")]
    Chain {
        /// Which.
        queue: u16,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A buffer outside guest memory.
    #[error("queue {queue}: buffer outside guest memory")]
    Memory {
        /// Which.
        queue: u16,
        /// What was tried.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// The process that works on the queues cannot go on.
    #[error("back end of the device")]
    BackEnd(#[source] BackEndError),
    /// A host resource failed.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}
