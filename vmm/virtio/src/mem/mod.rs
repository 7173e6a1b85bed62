//! Memory that comes and goes (virtio 1.2, 5.15): the host says how much of a
//! region the driver should have, and the driver plugs and unplugs blocks of it.
//! Unplugged blocks hold no memory of the host's.

mod blocks;
mod worker;

use std::any::Any;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::queue::FEATURES;
use crate::{ActivateError, Activation, DeviceType, VirtioDevice, Worker};

use blocks::Blocks;
use worker::MemWorker;

/// Bytes that are plugged or unplugged together; a huge page, so that what is
/// left over stays whole.
pub const BLOCK_BYTES: u64 = 2 << 20;

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` (5.15.3): the driver leaves alone what
/// it has not plugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const QUEUE_SIZES: [u16; 1] = [16];

/// Message to the device: the driver should have so many bytes of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize(pub u64);

/// What happens to memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The driver wants to use it, and does so if this is not refused.
    Plug(Range<u64>),
    /// The driver gives it up, where it has it. The host's memory goes when this is
    /// done; what cannot go is plugged again.
    Unplug(Range<u64>),
}

/// Told of each change, on the device's thread.
pub type Watcher = Arc<dyn Fn(Change) -> io::Result<()> + Send + Sync>;

/// A region of memory at rest.
pub struct Mem {
    blocks: Shared,
    watcher: Option<Watcher>,
}

/// Both halves need it: the driver reads from vCPU threads what its requests
/// have changed.
#[derive(Clone, Debug)]
struct Shared(Arc<Mutex<Blocks>>);

impl Mem {
    /// The driver may plug blocks of `region`, which is part of guest memory. It
    /// begins with none, and is not to have any. Bounds that are not those of
    /// blocks are moved inwards.
    pub fn new(region: Range<u64>) -> Self {
        Self {
            blocks: Shared(Arc::new(Mutex::new(Blocks::new(region)))),
            watcher: None,
        }
    }

    /// Has `watcher` know what happens to the region.
    #[must_use]
    pub fn watched_by(mut self, watcher: Watcher) -> Self {
        self.watcher = Some(watcher);
        self
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn offered_features(&self) -> u64 {
        FEATURES | UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.blocks.lock().config_space();
        crate::config::read(&space, offset, data);
    }

    fn control(&mut self, message: Box<dyn Any + Send>) {
        if let Ok(resize) = message.downcast::<Resize>() {
            self.blocks.lock().request(resize.0);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        Ok(Box::new(MemWorker {
            requests: activation.take_queue(0)?,
            interrupt: activation.interrupt,
            memory: activation.memory,
            blocks: self.blocks.clone(),
            watcher: self.watcher.clone(),
        }))
    }

    /// What is plugged stays so: the driver's memory outlives a driver's reset.
    fn reset(&mut self, _worker: Box<dyn Worker>) {}
}
