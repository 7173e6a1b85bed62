//! Keeps the file server at work and watches for its end.

use vm_memory::GuestAddressSpace;

use super::QUEUE_SIZES;
use super::back_end::{BackEnd, BackEndError, ServedQueue};
use crate::{ActivateError, Activation, DeviceError, Event, GuestMemory, Source, Worker};

/// The only source.
const SERVER: u32 = 0;

/// A shared file system at work.
pub(super) struct FsWorker {
    back_end: BackEnd,
    queues: Vec<ServedQueue>,
    memory: GuestMemory,
    negotiated_features: u64,
    /// The server has the queues.
    serving: bool,
}

impl FsWorker {
    /// Takes the server on success.
    pub(super) fn new(
        back_end: &mut Option<BackEnd>,
        activation: Activation,
    ) -> Result<Self, ActivateError> {
        let mut queues = Vec::new();
        for (index, active) in (0..QUEUE_SIZES.len() as u16).zip(activation.queues) {
            let active = active.ok_or(ActivateError::QueueDisabled(index))?;
            let host = |source| ActivateError::Host {
                what: "duplicate a queue's event descriptor",
                source,
            };
            let notify = crate::fd::borrow(&active.notify);
            queues.push(ServedQueue {
                index,
                queue: active.queue,
                kick: notify.try_clone_to_owned().map_err(host)?,
                call: activation.interrupt.queue_call(index).map_err(host)?,
            });
        }
        let taken = back_end
            .take()
            .ok_or(ActivateError::BackEnd(BackEndError::Gone))?;
        let mut worker = Self {
            back_end: taken,
            queues,
            memory: activation.memory,
            negotiated_features: activation.negotiated_features,
            serving: false,
        };
        match worker.start() {
            Ok(()) => Ok(worker),
            Err(error) => {
                *back_end = Some(worker.back_end);
                Err(ActivateError::BackEnd(error))
            }
        }
    }

    pub(super) fn into_back_end(self) -> BackEnd {
        self.back_end
    }

    fn start(&mut self) -> Result<(), BackEndError> {
        let memory = self.memory.memory();
        self.back_end
            .start(self.negotiated_features, &memory, &self.queues)?;
        self.serving = true;
        Ok(())
    }
}

impl Worker for FsWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source {
            fd: self.back_end.socket(),
            token: SERVER,
            readable: true,
            writable: false,
        }]
    }

    fn handles_queue(&self, _queue: u16) -> bool {
        false
    }

    /// The server says nothing of its own accord: this is its end.
    fn process(&mut self, _event: Event) -> Result<(), DeviceError> {
        self.back_end.fail();
        Err(DeviceError::BackEnd(BackEndError::Gone))
    }

    fn quiesce(&mut self) {
        if std::mem::take(&mut self.serving) {
            // If it fails the connection is cut, which is all that can be done.
            let _ = self.back_end.stop(&mut self.queues);
        }
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        match self.serving {
            true => Ok(()),
            false => self.start().map_err(DeviceError::BackEnd),
        }
    }
}
