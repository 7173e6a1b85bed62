use rustix::rand::{GetRandomFlags, getrandom};

use crate::queue::DeviceQueue;
use crate::{DeviceError, Event, Source, Worker};

/// Most bytes for one request. A driver that wants more asks again; with the
/// ring's size this bounds the work for one event.
const REQUEST_BYTES: usize = 4096;

pub(super) struct RngWorker {
    pub(super) requests: DeviceQueue,
}

impl Worker for RngWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        Vec::new()
    }

    fn process(&mut self, _event: Event) -> Result<(), DeviceError> {
        let mut entropy = [0; REQUEST_BYTES];
        self.requests.begin();
        while let Some(chain) = self.requests.pop()? {
            if chain.readable_len() != 0 {
                return Err(self
                    .requests
                    .chain_error("entropy asked of a readable buffer"));
            }
            let wanted = chain.writable_len().min(REQUEST_BYTES);
            let got =
                getrandom(&mut entropy[..wanted], GetRandomFlags::empty()).map_err(|source| {
                    DeviceError::Host {
                        what: "getrandom",
                        source: source.into(),
                    }
                })?;
            // It fits: the chain is as long as asked for.
            let _ = chain.write(0, &entropy[..got]);
            self.requests.add_used(chain.head(), got as u32)?;
        }
        self.requests.signal()
    }
}

#[cfg(test)]
mod tests {
    use crate::rng::Rng;
    use crate::testing::{Buffer, Driver};

    #[test]
    fn fills_requests() {
        let mut driver = Driver::new(Rng);
        let mut queues = driver.start(u64::MAX);
        let at = driver.allocate(64);
        let mut seen = Vec::new();
        for _ in 0..3 {
            queues[0].add(&[Buffer::writable(at, 20), Buffer::writable(at + 32, 12)]);
            driver.notify(0);
            driver.wait_queue(0);
            assert_eq!(queues[0].pop_used().map(|used| used.1), Some(32));
            let bytes = driver.read(at, 64);
            assert_eq!((&bytes[20..32], &bytes[44..]), (&[0; 12][..], &[0; 20][..]));
            assert!(!seen.contains(&bytes));
            seen.push(bytes);
        }
    }

    #[test]
    fn bounds_requests() {
        let mut driver = Driver::new(Rng);
        let mut queues = driver.start(u64::MAX);
        let at = driver.allocate(1 << 20);
        queues[0].add(&[Buffer::writable(at, 1 << 20)]);
        queues[0].add(&[Buffer::writable(at, 0)]);
        driver.notify(0);
        driver.wait_queue(0);
        assert_eq!(queues[0].pop_used().map(|used| used.1), Some(4096));
        if queues[0].used_index() < 2 {
            driver.wait_queue(0);
        }
        assert_eq!(queues[0].pop_used().map(|used| used.1), Some(0));
    }

    #[test]
    fn a_readable_buffer_costs_a_reset() {
        let mut driver = Driver::new(Rng);
        let mut queues = driver.start(u64::MAX);
        let at = driver.allocate(64);
        queues[0].add(&[Buffer::readable(at, 64)]);
        driver.notify(0);
        driver.wait_needs_reset();
    }
}
