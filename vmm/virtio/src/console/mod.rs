//! Console (virtio 1.2, 5.3): one port, output only. The guest's log goes to a
//! pipe; a reader that is slow or gone never holds the guest up.

mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::queue::FEATURES;
use crate::{ActivateError, Activation, DeviceType, VirtioDevice, Worker};

use worker::ConsoleWorker;

/// Receive and transmit (5.3.2).
const QUEUE_SIZES: [u16; 2] = [16, 64];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// A console.
#[derive(Debug)]
pub struct Console {
    output: Arc<OwnedFd>,
    dropped: Arc<AtomicU64>,
}

impl Console {
    /// A console that writes to `output`, which becomes non-blocking, and adds
    /// the bytes that found no room there to `dropped`.
    ///
    /// # Errors
    /// The descriptor cannot be made non-blocking.
    pub fn new(output: OwnedFd, dropped: Arc<AtomicU64>) -> io::Result<Self> {
        let flags = fcntl_getfl(&output)?;
        if !flags.contains(OFlags::NONBLOCK) {
            fcntl_setfl(&output, flags | OFlags::NONBLOCK)?;
        }
        Ok(Self {
            output: Arc::new(output),
            dropped,
        })
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn offered_features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        Ok(Box::new(ConsoleWorker {
            transmit: activation.take_queue(TRANSMIT)?,
            output: Arc::clone(&self.output),
            dropped: Arc::clone(&self.dropped),
        }))
    }

    fn reset(&mut self, _worker: Box<dyn Worker>) {}
}
