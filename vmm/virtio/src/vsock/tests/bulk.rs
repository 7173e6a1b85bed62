//! A lot of data through a running event loop, both ways at once.

use std::io::{Read, Write};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};

use super::*;
use crate::event_loop::EventLoop;

const BYTES: usize = 100 << 20;

#[test]
fn a_hundred_megabytes_go_both_ways() {
    let (host, socket) = UnixStream::pair().unwrap();
    let mut device = Vsock::new(CID as u32, vec![(1024, socket.into())]);
    let mut driver = Driver::new(FEATURES);
    let worker = driver.activate(&mut device, FEATURES);
    let event_loop = EventLoop::start("vsock", || Ok(())).unwrap();
    let queues = [&driver.rx, &driver.tx, &driver.event];
    let queues = queues
        .iter()
        .zip(0..)
        .map(|(q, i)| (i, Arc::clone(&q.notify)));
    let on_failure = Box::new(|error: &DeviceError| panic!("{error}"));
    event_loop
        .handle()
        .add(worker, queues.collect(), on_failure)
        .unwrap();

    let reader = thread::spawn({
        let mut host = host.try_clone().unwrap();
        move || {
            let mut chunk = vec![0; 1 << 16];
            let mut at = 0;
            loop {
                let count = host.read(&mut chunk).unwrap();
                if count == 0 {
                    return at;
                }
                assert!(chunk[..count] == patterned(0, at, count), "at {at}");
                at += count;
            }
        }
    });
    let writer = thread::spawn({
        let mut host = host;
        move || {
            for at in (0..BYTES).step_by(1 << 20) {
                host.write_all(&patterned(1, at, 1 << 20)).unwrap();
            }
            host.shutdown(std::net::Shutdown::Write).unwrap();
        }
    });

    driver.give(128);
    driver.send(header(Op::Request, 7, 1024), &[]);
    let (mut sent, mut taken, mut received, mut told) = (0, 0, 0, 0);
    let mut ended = false;
    let mut said_end = false;
    while !ended || !said_end {
        let mut idle = true;
        while let Some((header, payload)) = driver.receive() {
            idle = false;
            assert!(
                payload == patterned(1, received, payload.len()),
                "at {received}"
            );
            received += payload.len();
            taken = header.fwd_cnt as usize + BUFFER_BYTES as usize;
            ended |= header.flags & SHUTDOWN_SEND != 0;
        }
        driver.give(128);
        let credit = Header {
            fwd_cnt: received as u32,
            ..header(Op::CreditUpdate, 7, 1024)
        };
        let len = (taken - sent).min(65536).min(BYTES - sent);
        if len > 0 && driver.can_send() {
            idle = false;
            let header = Header {
                op: Op::Data as u16,
                len: len as u32,
                ..credit
            };
            driver.send(header, &patterned(0, sent, len));
            (sent, told) = (sent + len, received);
        } else if received - told >= BUFFER_BYTES as usize / 2 && driver.can_send() {
            driver.send(credit, &[]);
            told = received;
        }
        if sent == BYTES && !said_end && driver.can_send() {
            let end = Header {
                op: Op::Shutdown as u16,
                flags: SHUTDOWN_SEND,
                ..credit
            };
            driver.send(end, &[]);
            said_end = true;
        }
        if idle && !(ended && said_end) {
            wait(&driver);
        }
    }
    assert_eq!(received, BYTES);
    writer.join().unwrap();
    assert_eq!(reader.join().unwrap(), BYTES);
}

/// Waits for an interrupt.
fn wait(driver: &Driver) {
    let events = &driver.interrupt.queues;
    let mut polled: Vec<_> = events
        .iter()
        .map(|event| PollFd::from_borrowed_fd(crate::fd::borrow(event), PollFlags::IN))
        .collect();
    let limit = rustix::event::Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    assert_ne!(poll(&mut polled, Some(&limit)).unwrap(), 0, "no interrupt");
    for (event, polled) in events.iter().zip(&polled) {
        if !polled.revents().is_empty() {
            event.read().unwrap();
        }
    }
}
