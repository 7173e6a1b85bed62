//! Moves frames between the queues and the tap.

use std::io;
use std::os::fd::AsFd;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_MRG_RXBUF};

use super::receive::{Received, Receiver};
use super::tap::Tap;
use super::{
    CONTROL, ETHERNET_BYTES, FRAME_BYTES, GUEST_OFFLOADS, GUEST_SEGMENTS, HEADER_BYTES, Limiters,
    RX, TX, control,
};
use crate::queue::DeviceQueue;
use crate::{ActivateError, Activation, DeviceError, Event, Source, Worker};

/// Frames received in one wake-up.
const FRAMES: usize = 256;

/// The shortest frame that is passed on: a whole Ethernet header.
const FRAME_BYTES_MIN: usize = HEADER_BYTES + 14;

/// The sources.
const TAP: u32 = 0;
const RECEIVE_LIMITER: u32 = 1;
const TRANSMIT_LIMITER: u32 = 2;

/// A network interface at work.
pub(super) struct NetWorker {
    tap: Tap,
    rx: Receiver,
    tx: DeviceQueue,
    control: Option<DeviceQueue>,
    /// What the driver may switch on the control queue.
    switchable: Option<u64>,
    limiters: Limiters,
    reading: Reading,
    sources_changed: bool,
}

/// What the receiving side waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// The tap.
    Frames,
    /// The driver's receive buffers.
    Buffers,
    /// The limiter.
    Tokens,
    /// Nothing any more: the tap is gone.
    Nothing,
}

impl NetWorker {
    /// Takes tap and limiters on success.
    pub(super) fn new(
        tap: &mut Option<Tap>,
        limiters: &mut Limiters,
        mtu: u16,
        mut activation: Activation,
    ) -> Result<Self, ActivateError> {
        let features = activation.negotiated_features;
        let offloads = features & GUEST_OFFLOADS;
        let rx = activation.take_queue(RX)?;
        let tx = activation.take_queue(TX)?;
        let control = activation.take_queue(CONTROL).ok();
        let tap = match tap.take() {
            Some(mut taken) => match taken.set_offloads(offloads) {
                Ok(()) => Ok(taken),
                Err(error) => {
                    *tap = Some(taken);
                    Err(error)
                }
            },
            None => Err(io::ErrorKind::ResourceBusy.into()),
        }
        .map_err(|source| ActivateError::Host {
            what: "set the tap's offloads",
            source,
        })?;
        let longest = match offloads & GUEST_SEGMENTS {
            0 => HEADER_BYTES + ETHERNET_BYTES + usize::from(mtu),
            _ => FRAME_BYTES,
        };
        let mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let switchable = features & 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS != 0;
        Ok(Self {
            tap,
            rx: Receiver::new(rx, mergeable, longest),
            tx,
            control,
            switchable: switchable.then_some(offloads),
            limiters: std::mem::take(limiters),
            reading: Reading::Frames,
            sources_changed: false,
        })
    }

    pub(super) fn into_parts(self) -> (Tap, Limiters) {
        (self.tap, self.limiters)
    }

    fn receive(&mut self) -> Result<(), DeviceError> {
        self.rx.queue.begin();
        let mut reading = Reading::Frames;
        for _ in 0..FRAMES {
            if !self.limiters.receive.allows()? {
                reading = Reading::Tokens;
                break;
            }
            match self.rx.receive(&self.tap)? {
                Received::Frame(bytes) => {
                    self.limiters.receive.moved(bytes as u64);
                    continue;
                }
                Received::Nothing => {}
                Received::NoBuffers => reading = Reading::Buffers,
                Received::Gone => reading = Reading::Nothing,
            }
            break;
        }
        self.sources_changed |= reading != self.reading;
        self.reading = reading;
        self.rx.queue.signal()
    }

    fn transmit(&mut self) -> Result<(), DeviceError> {
        self.tx.begin();
        while self.limiters.transmit.allows()? {
            let Some(frame) = self.tx.pop()? else {
                break;
            };
            let len = frame.readable_len();
            self.limiters.transmit.moved(len as u64);
            if (FRAME_BYTES_MIN..=FRAME_BYTES).contains(&len) {
                // What the kernel does not take is lost, as on a wire.
                let _ = frame.write_to(self.tap.as_fd(), 0, len);
            }
            self.tx.add_used(frame.head(), 0)?;
        }
        self.tx.signal()
    }

    fn control(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.control else {
            return Ok(());
        };
        queue.begin();
        while let Some(command) = queue.pop()? {
            let answer = control::execute(&command, &mut self.tap, self.switchable);
            if !command.write(0, &[answer]) {
                return Err(queue.chain_error("a command has no room for the answer"));
            }
            queue.add_used(command.head(), 1)?;
        }
        queue.signal()
    }
}

impl Worker for NetWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        // Not even for errors while it is not read: nothing could be done.
        let tap = (self.reading == Reading::Frames).then(|| Source {
            fd: self.tap.as_fd(),
            token: TAP,
            readable: true,
            writable: false,
        });
        let limiters = [
            self.limiters.receive.source(RECEIVE_LIMITER),
            self.limiters.transmit.source(TRANSMIT_LIMITER),
        ];
        tap.into_iter()
            .chain(limiters.into_iter().flatten())
            .collect()
    }

    fn sources_changed(&mut self) -> bool {
        std::mem::take(&mut self.sources_changed)
    }

    fn process(&mut self, event: Event) -> Result<(), DeviceError> {
        match event {
            Event::Queue(TX) => self.transmit(),
            Event::Queue(CONTROL) => self.control(),
            Event::Queue(_) if self.reading == Reading::Buffers => self.receive(),
            Event::Queue(_) => Ok(()),
            Event::Ready {
                token: TRANSMIT_LIMITER,
                ..
            } => {
                self.limiters.transmit.woken();
                self.transmit()
            }
            Event::Ready {
                token: RECEIVE_LIMITER,
                ..
            } => {
                self.limiters.receive.woken();
                match self.reading {
                    Reading::Tokens => self.receive(),
                    _ => Ok(()),
                }
            }
            Event::Ready { .. } => self.receive(),
        }
    }

    fn quiesce(&mut self) {
        self.rx.release_buffers();
    }
}
