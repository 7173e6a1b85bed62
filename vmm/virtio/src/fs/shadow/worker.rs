//! Relays requests between the guest and the file server, and watches for the
//! server's end.

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;

use super::relay::{Relay, tell};
use super::{PLACES, Shadow};
use crate::fs::QUEUE_SIZES;
use crate::fs::back_end::{BackEnd, BackEndError};
use crate::{ActivateError, Activation, DeviceError, Event, Source, Worker};

/// Tokens: the server's socket, then the calls of each queue.
const SERVER: u32 = 0;
const CALLS: u32 = 1;

/// A shared file system at work whose server does not see the guest's memory.
pub(in crate::fs) struct ShadowWorker {
    back_end: BackEnd,
    shadow: Shadow,
    relays: Vec<Relay>,
    ring_features: u64,
    /// The server has the queues.
    serving: bool,
}

impl ShadowWorker {
    /// Takes server and shadow on success. The server's rings are to have
    /// `ring_features`.
    pub(in crate::fs) fn new(
        back_end: &mut Option<BackEnd>,
        shadow: &mut Option<Shadow>,
        ring_features: u64,
        mut activation: Activation,
    ) -> Result<Self, ActivateError> {
        let guest: Vec<_> = (0..QUEUE_SIZES.len() as u16)
            .map(|index| activation.take_queue(index))
            .collect::<Result<_, _>>()?;
        let gone = || ActivateError::BackEnd(BackEndError::Gone);
        let mut own_shadow = shadow.take().ok_or_else(gone)?;
        let own_back_end = match back_end.take() {
            Some(own) => own,
            None => {
                *shadow = Some(own_shadow);
                return Err(gone());
            }
        };
        for served in &mut own_shadow.served {
            served.queue.set_next_avail(0);
        }
        let event_idx = ring_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let relays: Result<_, _> = guest
            .into_iter()
            .zip(PLACES)
            .map(|(guest, place)| Relay::new(guest, &own_shadow.memory, place, event_idx))
            .collect();
        let mut worker = Self {
            back_end: own_back_end,
            shadow: own_shadow,
            relays: Vec::new(),
            ring_features,
            serving: false,
        };
        let started = relays.and_then(|relays| {
            worker.relays = relays;
            worker.start().map_err(ActivateError::BackEnd)
        });
        match started {
            Ok(()) => Ok(worker),
            Err(error) => {
                *back_end = Some(worker.back_end);
                *shadow = Some(worker.shadow);
                Err(error)
            }
        }
    }

    pub(in crate::fs) fn into_parts(self) -> (BackEnd, Shadow) {
        (self.back_end, self.shadow)
    }

    fn start(&mut self) -> Result<(), BackEndError> {
        let Shadow { memory, served, .. } = &self.shadow;
        self.back_end.start(self.ring_features, memory, served)?;
        self.serving = true;
        Ok(())
    }

    fn work(&mut self, queue: usize) -> Result<(), DeviceError> {
        let (Some(relay), Some(ends)) = (self.relays.get_mut(queue), self.shadow.ends.get(queue))
        else {
            return Ok(());
        };
        relay.work(ends.kick())
    }

    fn finish(&mut self) -> Result<(), DeviceError> {
        for (relay, served) in self.relays.iter_mut().zip(&self.shadow.served) {
            relay.finish(served.queue.next_avail())?;
        }
        Ok(())
    }
}

impl Worker for ShadowWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        let calls = self.shadow.ends.iter().map(|ends| ends.call());
        [self.back_end.socket()]
            .into_iter()
            .chain(calls)
            .zip(SERVER..)
            .map(|(fd, token)| Source {
                fd,
                token,
                readable: true,
                writable: false,
            })
            .collect()
    }

    fn process(&mut self, event: Event) -> Result<(), DeviceError> {
        let result = match event {
            Event::Queue(queue) => self.work(queue.into()),
            // The server says nothing of its own accord: this is its end.
            Event::Ready { token: SERVER, .. } => Err(DeviceError::BackEnd(BackEndError::Gone)),
            Event::Ready { token, .. } => {
                let queue = (token - CALLS) as usize;
                if let Some(ends) = self.shadow.ends.get(queue) {
                    ends.take_calls();
                }
                self.work(queue)
            }
        };
        if let Err(DeviceError::BackEnd(_)) = result {
            self.back_end.fail();
        }
        result
    }

    /// What the server has not begun stays in its ring until it goes on.
    fn quiesce(&mut self) {
        if std::mem::take(&mut self.serving) {
            let stopped = self.back_end.stop(&mut self.shadow.served);
            // If it fails the connection is cut, which is all that can be done.
            if stopped.is_ok() {
                if let Err(DeviceError::BackEnd(_)) = self.finish() {
                    self.back_end.fail();
                }
                if !self.relays.iter().any(Relay::in_flight) {
                    self.shadow.release();
                }
            }
        }
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        if self.serving {
            return Ok(());
        }
        self.start().map_err(DeviceError::BackEnd)?;
        for (relay, ends) in self.relays.iter().zip(&self.shadow.ends) {
            if relay.in_flight() {
                tell(ends.kick());
            }
        }
        Ok(())
    }
}
