//! A disk that may do only so much.

use std::time::{Duration, Instant};

use super::*;
use crate::rate::Rate;

fn limits(bytes: Option<(u64, u64)>, operations: Option<(u64, u64)>) -> Limits {
    let rate = |(per_second, burst)| Rate::new(per_second, burst).unwrap();
    Limits {
        bytes: bytes.map(rate),
        operations: operations.map(rate),
    }
}

impl Bench {
    fn limited(engine: Engine, limits: Limits) -> Self {
        let mut file = tempfile().unwrap();
        file.write_all(&pattern(BYTES)).unwrap();
        let mut block = Block::new(file.try_clone().unwrap(), false, "disk-1", engine).unwrap();
        block.limit(limits).unwrap();
        let mut driver = Driver::new(block);
        let queue = driver.start(u64::MAX).remove(0);
        Self {
            driver,
            queue,
            file,
        }
    }

    /// Asks for `count` sectors, each by a request of its own.
    fn ask(&mut self, count: u64) {
        for sector in 0..count {
            let header = self.header(READ, sector);
            let at = self.driver.allocate(513);
            let data = Buffer::writable(at, 512);
            self.queue
                .add(&[header, data, Buffer::writable(at + 512, 1)]);
        }
        self.driver.notify(0);
    }

    /// How many have come.
    fn answers(&mut self) -> u16 {
        self.queue.used_index()
    }
}

/// Longer than a device needs for a few requests, however loaded the host is.
fn a_while() {
    std::thread::sleep(Duration::from_millis(300));
}

#[test]
fn waits_for_operations_and_goes_on_by_itself() {
    for engine in engines() {
        let mut bench = Bench::limited(engine, limits(None, Some((20, 2))));
        let began = Instant::now();
        bench.ask(6);
        wait_until("six answers", || bench.answers() == 6);
        // Two at once, the third with the first part of a token, and three more.
        assert!(began.elapsed() >= Duration::from_millis(150));
        assert!(bench.driver.reports.lock().unwrap().is_empty());
    }
}

#[test]
fn waits_for_bytes() {
    for engine in engines() {
        let mut bench = Bench::limited(engine, limits(Some((512 * 20, 1024)), None));
        let began = Instant::now();
        bench.ask(6);
        wait_until("six answers", || bench.answers() == 6);
        assert!(began.elapsed() >= Duration::from_millis(150));
        // What moves nothing takes nothing.
        let mut bench = Bench::limited(Engine::Waiting, limits(Some((1, 1)), None));
        for _ in 0..20 {
            assert_eq!(bench.send(FLUSH, 0, &[], 0).0, OK);
        }
        assert_eq!(bench.send(READ, 0, &[], 512).0, OK);
        bench.ask(1);
        a_while();
        assert_eq!(bench.answers(), 21);
    }
}

#[test]
fn a_reset_gives_no_new_burst() {
    // The second sector would come after minutes.
    let mut bench = Bench::limited(Engine::new(), limits(Some((1, 1)), None));
    bench.ask(2);
    wait_until("an answer", || bench.answers() == 1);
    for _ in 0..3 {
        bench = bench.restart();
        bench.ask(1);
        a_while();
        assert_eq!(bench.answers(), 0);
    }
}

#[test]
fn can_be_paused_and_taken_away_while_it_waits() {
    let mut bench = Bench::limited(Engine::new(), limits(None, Some((2, 1))));
    bench.ask(3);
    wait_until("an answer", || bench.answers() >= 1);
    let handle = bench.driver.event_loop.handle();
    handle.pause().unwrap();
    let before = bench.answers();
    // There are tokens again, but nobody looks.
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(bench.answers(), before);
    handle.resume().unwrap();
    wait_until("the others", || bench.answers() == 3);
    bench.ask(1);
    let began = Instant::now();
    assert!(bench.driver.function.retire());
    assert!(began.elapsed() < Duration::from_secs(5));
}
