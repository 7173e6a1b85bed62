use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::RECEIVE;
use crate::queue::DeviceQueue;
use crate::{DeviceError, Event, Source, Worker};

pub(super) struct ConsoleWorker {
    pub(super) transmit: DeviceQueue,
    pub(super) output: Arc<OwnedFd>,
    pub(super) dropped: Arc<AtomicU64>,
}

impl Worker for ConsoleWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        Vec::new()
    }

    /// There never is input: buffers to receive it stay where they are.
    fn handles_queue(&self, queue: u16) -> bool {
        queue != RECEIVE
    }

    fn process(&mut self, _event: Event) -> Result<(), DeviceError> {
        self.transmit.begin();
        while let Some(chain) = self.transmit.pop()? {
            if chain.writable_len() != 0 {
                return Err(self.transmit.chain_error("output from a writable buffer"));
            }
            let len = chain.readable_len();
            // Full, or its reader is gone: in either case nobody reads this.
            let written = chain.write_to(self.output.as_fd(), 0, len).unwrap_or(0);
            self.dropped
                .fetch_add((len - written) as u64, Ordering::Relaxed);
            self.transmit.add_used(chain.head(), 0)?;
        }
        self.transmit.signal()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};

    use super::*;
    use crate::console::Console;
    use crate::testing::{Buffer, Driver, DriverQueue};

    fn send(driver: &mut Driver, queue: &mut DriverQueue, buffers: &[Buffer]) {
        queue.add(buffers);
        driver.notify(1);
        driver.wait_queue(1);
        assert_eq!(queue.pop_used().map(|used| used.1), Some(0));
    }

    #[test]
    fn writes_what_the_guest_says() {
        let (mut reader, writer) = pipe().unwrap();
        let dropped = Arc::new(AtomicU64::new(0));
        let console = Console::new(writer.into(), Arc::clone(&dropped)).unwrap();
        let mut driver = Driver::new(console);
        let mut queues = driver.start(u64::MAX);
        let input = driver.allocate(64);
        queues[0].add(&[Buffer::writable(input, 64)]);
        driver.notify(0);
        for parts in [&["hello, ", "world\n"][..], &["again\n"]] {
            let buffers: Vec<_> = parts
                .iter()
                .map(|part| driver.allocate_with(part.as_bytes()))
                .collect();
            send(&mut driver, &mut queues[1], &buffers);
            let mut text = vec![0; parts.concat().len()];
            reader.read_exact(&mut text).unwrap();
            assert_eq!(text, parts.concat().into_bytes());
        }
        assert_eq!(dropped.load(Ordering::Relaxed), 0);
        assert_eq!(queues[0].used_index(), 0, "no input");
    }

    #[test]
    fn never_waits_for_the_reader() {
        let (mut reader, writer) = pipe().unwrap();
        let dropped = Arc::new(AtomicU64::new(0));
        let console = Console::new(writer.into(), Arc::clone(&dropped)).unwrap();
        let mut driver = Driver::new(console);
        let mut queues = driver.start(u64::MAX);
        let page = driver.allocate_with(&[b'x'; 4096]);
        for _ in 0..20 {
            send(&mut driver, &mut queues[1], &[page]);
        }
        // A pipe holds 64 KiB, 16 pages.
        assert_eq!(dropped.load(Ordering::Relaxed), 4 * 4096);
        let mut text = vec![0; 16 * 4096];
        reader.read_exact(&mut text).unwrap();
        send(&mut driver, &mut queues[1], &[page]);
        assert_eq!(
            dropped.load(Ordering::Relaxed),
            4 * 4096,
            "there is room again"
        );
        drop(reader);
        send(&mut driver, &mut queues[1], &[page]);
        assert_eq!(dropped.load(Ordering::Relaxed), 5 * 4096, "nobody reads");
    }

    #[test]
    fn a_writable_buffer_costs_a_reset() {
        let (_reader, writer) = pipe().unwrap();
        let console = Console::new(writer.into(), Arc::default()).unwrap();
        let mut driver = Driver::new(console);
        let mut queues = driver.start(u64::MAX);
        let at = driver.allocate(64);
        queues[1].add(&[Buffer::writable(at, 64)]);
        driver.notify(1);
        driver.wait_needs_reset();
    }
}
