//! An interface that may move only so much.

use std::time::{Duration, Instant};

use super::*;
use crate::rate::Rate;

/// However loaded the host is.
const PATIENCE: Duration = Duration::from_secs(60);

/// The worker's thread has others beside it.
const TURN: Duration = Duration::from_millis(1);

fn operations(per_second: u64, burst: u64) -> Limits {
    Limits {
        bytes: None,
        operations: Some(Rate::new(per_second, burst).unwrap()),
    }
}

fn bytes(per_second: u64, burst: u64) -> Limits {
    Limits {
        bytes: Some(Rate::new(per_second, burst).unwrap()),
        operations: None,
    }
}

impl Guest {
    fn limited(features: u64, limits: Limits) -> Self {
        let mut guest = Self::new(features);
        let worker = guest.worker.take().unwrap();
        guest.device.reset(worker);
        guest.device.limit(limits).unwrap();
        guest.restart();
        guest
    }

    fn restart(&mut self) {
        if let Some(mut worker) = self.worker.take() {
            worker.quiesce();
            self.device.reset(worker);
        }
        self.driver = Driver::new(self.features);
        self.worker = Some(self.driver.activate(&mut self.device, self.features));
    }

    /// All frames that have come.
    fn take(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| Some(self.driver.receive()?.0)).collect()
    }
}

#[test]
fn frames_leave_as_fast_as_they_may() {
    for features in [0, EVENT_IDX] {
        let mut guest = Guest::limited(features, operations(1000, 40));
        let frames: Vec<_> = (0..100).map(|i| frame(i, 100 + i)).collect();
        let began = Instant::now();
        for frame in &frames {
            guest.driver.send(frame);
        }
        let mut left = Vec::new();
        while left.len() < frames.len() {
            assert!(began.elapsed() < PATIENCE, "{}", left.len());
            std::thread::sleep(TURN);
            guest.run();
            left.extend(std::iter::from_fn(|| guest.left()));
        }
        assert!(began.elapsed() >= Duration::from_millis(50));
        // None is lost, and none overtakes another.
        assert!(left == frames);
    }
}

#[test]
fn what_may_not_come_yet_stays_in_the_tap() {
    for features in [EVENT_IDX, EVENT_IDX | MERGEABLE] {
        let mut guest = Guest::limited(features, operations(1000, 20));
        let frames: Vec<_> = (0..50).map(|i| frame(i, 100 + i)).collect();
        for frame in &frames {
            assert!(guest.arrive(frame));
        }
        let began = Instant::now();
        guest.driver.give(64, 65562);
        let mut came = Vec::new();
        while came.len() < frames.len() {
            assert!(began.elapsed() < PATIENCE, "{}", came.len());
            std::thread::sleep(TURN);
            guest.run();
            came.extend(guest.take());
        }
        assert!(began.elapsed() >= Duration::from_millis(25));
        for (came, frame) in came.iter().zip(&frames) {
            assert_eq!(came[12..], frame[12..]);
        }
    }
}

#[test]
fn each_direction_has_its_own_bytes_and_keeps_its_debt() {
    // The next one may move after many minutes.
    let mut guest = Guest::limited(EVENT_IDX, bytes(1, 1));
    for round in 0..3 {
        guest.driver.give(8, 65562);
        for seed in 0..4 {
            guest.driver.send(&frame(seed, 1000));
            assert!(guest.arrive(&frame(seed, 1000)));
        }
        guest.run();
        let expected = if round == 0 { 1 } else { 0 };
        assert_eq!(std::iter::from_fn(|| guest.left()).count(), expected);
        assert_eq!(guest.take().len(), expected);
        // Nothing is ready: the tap is not looked at, however full it is.
        assert_eq!(guest.try_run().unwrap(), 0);
        // A driver that notifies all the time changes nothing.
        guest.driver.tx.kick(1);
        guest.driver.rx.kick(1);
        guest.run();
        assert_eq!(guest.left(), None);
        guest.restart();
    }
}

#[test]
fn commands_are_carried_out_meanwhile() {
    let features = EVENT_IDX | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
    let mut guest = Guest::limited(features, bytes(1, 1));
    for seed in 0..4 {
        guest.driver.send(&frame(seed, 1000));
    }
    guest.run();
    assert_eq!(guest.command(&[0, 0, 1]), 0);
}
