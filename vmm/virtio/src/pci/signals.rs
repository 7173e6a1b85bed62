//! How a device's working half reaches its driver.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::state::SignalsState;
use super::{Reporter, StateError};
use crate::Interrupt;
use crate::fd::borrow;

/// No vector (virtio 1.2, 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Failures of one function that are reported; a driver can make any number.
const REPORTS_MAX: u8 = 8;

/// What the transport, on vCPU threads, and a worker, on its loop's thread, both
/// touch. Single values, so that neither ever waits for the other.
pub(super) struct Signals {
    name: String,
    report: Reporter,
    events: Vec<Arc<EventFd>>,
    /// For a queue without a vector: nobody listens. Made with the others, since the
    /// threads of vCPUs can make none.
    unheard: EventFd,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    generation: AtomicU8,
    needs_reset: AtomicBool,
    driver_ok: AtomicBool,
    reports: AtomicU8,
}

impl Signals {
    pub(super) fn new(
        name: String,
        report: Reporter,
        events: Vec<Arc<EventFd>>,
        queues: usize,
    ) -> io::Result<Self> {
        Ok(Self {
            name,
            report,
            events,
            unheard: EventFd::new(EFD_NONBLOCK)?,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
            reports: AtomicU8::new(0),
        })
    }

    /// The device cannot go on until it is reset.
    pub(super) fn fail(&self, error: &dyn std::error::Error) {
        self.needs_reset.store(true, Ordering::Release);
        if self.reports.load(Ordering::Relaxed) < REPORTS_MAX {
            self.reports.fetch_add(1, Ordering::Relaxed);
            (self.report)(&self.name, error);
        }
        // virtio 1.2, 2.1.2: the driver is told once it has said DRIVER_OK.
        if self.driver_ok.load(Ordering::Acquire) {
            let _ = self.signal_config();
        }
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn set_driver_ok(&self) {
        self.driver_ok.store(true, Ordering::Release);
    }

    /// The driver reset the device.
    pub(super) fn reset(&self) {
        self.driver_ok.store(false, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    pub(super) fn save(&self) -> SignalsState {
        let queues = 0..self.queue_vectors.len() as u16;
        SignalsState {
            config_vector: self.config_vector(),
            queue_vectors: queues.map(|queue| self.queue_vector(queue)).collect(),
            isr: self.isr.load(Ordering::Acquire),
            generation: self.generation(),
            needs_reset: self.needs_reset(),
        }
    }

    pub(super) fn restore(&self, saved: &SignalsState, ready: bool) -> Result<(), StateError> {
        if saved.queue_vectors.len() != self.queue_vectors.len() {
            return Err(StateError::Unlike("device"));
        }
        self.set_config_vector(saved.config_vector);
        for (queue, vector) in (0..).zip(&saved.queue_vectors) {
            self.set_queue_vector(queue, *vector);
        }
        self.isr.store(saved.isr, Ordering::Release);
        self.generation.store(saved.generation, Ordering::Release);
        self.needs_reset.store(saved.needs_reset, Ordering::Release);
        self.driver_ok.store(ready, Ordering::Release);
        Ok(())
    }

    /// Counts an interrupt that was pending.
    pub(super) fn restore_pending(&self, vector: u16) -> io::Result<()> {
        self.raise(vector)
    }

    /// Reading acknowledges (virtio 1.2, 4.1.4.5).
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector
            .store(self.existing(vector), Ordering::Release);
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(queue)) {
            slot.store(self.existing(vector), Ordering::Release);
        }
    }

    /// The driver sees from `NO_VECTOR` that its choice was not accepted.
    fn existing(&self, vector: u16) -> u16 {
        match usize::from(vector) < self.events.len() {
            true => vector,
            false => NO_VECTOR,
        }
    }

    fn raise(&self, vector: u16) -> io::Result<()> {
        match self.events.get(usize::from(vector)) {
            Some(event) => match event.write(1) {
                // A masked vector that has counted 2^64 interrupts is pending.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
                result => result,
            },
            None => Ok(()),
        }
    }
}

impl Interrupt for Signals {
    fn signal_queue(&self, queue: u16) -> io::Result<()> {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        self.raise(self.queue_vector(queue))
    }

    fn signal_config(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.raise(self.config_vector())
    }

    fn queue_call(&self, queue: u16) -> io::Result<OwnedFd> {
        let event = self.events.get(usize::from(self.queue_vector(queue)));
        borrow(event.map_or(&self.unheard, |event| event)).try_clone_to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever asks may be a thread that can make no descriptors but of others.
    #[test]
    fn a_queue_without_a_vector_gets_a_copy_of_what_is_there() {
        let signals = Signals::new("test".into(), Arc::new(|_, _| ()), Vec::new(), 2).unwrap();
        let [one, other] = [0, 1].map(|queue| signals.queue_call(queue).unwrap());
        rustix::io::write(&one, &1_u64.to_ne_bytes()).unwrap();
        let mut count = [0; 8];
        rustix::io::read(&other, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
    }
}
