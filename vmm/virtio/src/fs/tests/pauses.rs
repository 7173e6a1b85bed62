//! Pauses at any moment, with more under way than the shadow takes.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::server;
use crate::fs::{Fs, PATIENCE, Shadow};
use crate::testing::{Buffer, Driver, wait_until};

#[test]
fn nothing_is_lost_by_pauses_while_requests_wait() {
    for (features, len) in [
        (0, 8),
        (1 << VIRTIO_RING_F_EVENT_IDX, 8),
        (0, 200_000),
        (u64::MAX, 200_000),
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (server, thread) = server::start(theirs, server::FEATURES);
        let device = Fs::new(ours.into(), "husk", PATIENCE).unwrap();
        let mut driver = Driver::new(device.through(Shadow::new().unwrap()));
        let mut queues = driver.start(features);
        let at = driver.allocate(len as usize);
        let handle = driver.event_loop.handle();
        let mut done = 0_usize;
        for round in 0..12_u64 {
            for _ in 0..128 {
                queues[1].add(&[Buffer::readable(at, len)]);
            }
            driver.notify(1);
            for step in 0..4 {
                std::thread::sleep(Duration::from_micros((round * 37 + step * 101) % 700));
                handle.pause().unwrap();
                handle.resume().unwrap();
            }
            let mut came = 0;
            wait_until("all of a round", || {
                while queues[1].pop_used().is_some() {
                    came += 1;
                }
                came == 128
            });
            done += came;
        }
        assert_eq!(server.lock().unwrap().served, done);
        assert_eq!(*driver.reports.lock().unwrap(), [""; 0]);
        drop(driver);
        thread.join().unwrap();
    }
}
