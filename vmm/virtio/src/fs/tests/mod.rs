mod files;
mod pauses;
pub(crate) mod server;
mod shadow;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::*;
use crate::event_loop::EventLoop;
use crate::test_driver::{self, DriverQueue, TestInterrupt};
use crate::{DeviceError, Event, GuestMemory};

const MEMORY_BYTES: usize = 2 << 20;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const VERSION_1: u64 = 1 << 32;

/// Two regions of one file.
fn memory() -> GuestMemory {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(2 * MEMORY_BYTES as u64).unwrap();
    let region = |at, offset| {
        let file = FileOffset::new(file.try_clone().unwrap(), offset);
        (GuestAddress(at), MEMORY_BYTES, Some(file))
    };
    let regions = [region(0, 0), region(1 << 32, MEMORY_BYTES as u64)];
    GuestMemory::new(GuestMemoryMmap::from_ranges_with_files(regions).unwrap())
}

struct Guest {
    memory: GuestMemory,
    queues: [DriverQueue; 2],
    interrupt: Arc<TestInterrupt>,
}

impl Guest {
    fn new(memory: GuestMemory, features: u64) -> Self {
        // One queue in either region.
        let queue = |at| DriverQueue::new(&memory, at, 128, features);
        Self {
            queues: [queue(0x1000), queue((1 << 32) + 0x1000)],
            memory,
            interrupt: TestInterrupt::new(2),
        }
    }

    fn activate(&self, device: &mut Fs, features: u64) -> Result<Box<dyn Worker>, ActivateError> {
        device.activate(Activation {
            memory: self.memory.clone(),
            queues: self
                .queues
                .iter()
                .map(|queue| Some(queue.active()))
                .collect(),
            negotiated_features: features,
            interrupt: Arc::clone(&self.interrupt) as _,
        })
    }

    fn ask(&mut self, queue: usize, request: &[u8]) {
        let memory = self.memory.memory();
        memory.write_slice(request, GuestAddress(0x8000)).unwrap();
        let len = request.len() as u32;
        let answer = (1 << 32) + 0x8000;
        let queue = &mut self.queues[queue];
        queue.add(&[
            (0x8000, 1, false),
            (0x8001, len - 1, false),
            (answer, len, true),
        ]);
        queue.kick(1);
    }

    /// Waits for the interrupt and returns the answer.
    fn answer(&mut self, queue: usize) -> Vec<u8> {
        let (_, len) = loop {
            if let Some(used) = self.queues[queue].used_chain() {
                break used;
            }
            assert!(self.interrupted(queue, 10), "no interrupt");
        };
        let mut answer = vec![0; len as usize];
        self.memory
            .memory()
            .read_slice(&mut answer, GuestAddress((1 << 32) + 0x8000))
            .unwrap();
        answer
    }

    fn interrupted(&self, queue: usize, seconds: i64) -> bool {
        let event = &self.interrupt.queues[queue];
        let limit = Timespec {
            tv_sec: seconds,
            tv_nsec: 100_000_000,
        };
        let mut polled = [PollFd::from_borrowed_fd(
            crate::fd::borrow(event),
            PollFlags::IN,
        )];
        let any = poll(&mut polled, Some(&limit)).unwrap() > 0;
        if any {
            event.read().unwrap();
        }
        any
    }
}

fn pair() -> (OwnedFd, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours.into(), theirs)
}

#[test]
fn tells_its_tag() {
    let (socket, theirs) = pair();
    let (_server, _thread) = server::start(theirs, server::FEATURES);
    let device = Fs::new(socket, "husk", PATIENCE).unwrap();
    assert_eq!(device.offered_features(), queue::FEATURES);
    let mut config = [0xff; 42];
    device.read_config(0, &mut config);
    assert_eq!(&config[..6], b"husk\0\0");
    assert_eq!(config[35..], [0, 1, 0, 0, 0, 0, 0]);
}

#[test]
fn offers_what_the_server_does() {
    let (socket, theirs) = pair();
    let (_server, _thread) = server::start(theirs, VERSION_1 | 1 << 30 | 1 << 28 | 1 << 5);
    let device = Fs::new(socket, "husk", PATIENCE).unwrap();
    assert_eq!(device.offered_features(), 1 << 28);

    for (offered, lacking) in [(1 << 30, "VERSION_1"), (VERSION_1, "protocol")] {
        let (socket, theirs) = pair();
        let (_server, _thread) = server::start(theirs, offered);
        let error = Fs::new(socket, "husk", PATIENCE).unwrap_err().to_string();
        assert!(error.contains(lacking), "{error}");
    }
}

#[test]
fn requests_are_served_through_resets_and_pauses() {
    let (socket, theirs) = pair();
    let (server, thread) = server::start(theirs, server::FEATURES);
    let mut device = Fs::new(socket, "husk", PATIENCE).unwrap();
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let mut guest = Guest::new(memory(), features);
        // Before the server knows of the queue.
        guest.ask(1, b"early");
        let mut worker = guest.activate(&mut device, features).unwrap();
        assert_eq!(guest.answer(1), b"ylrae");
        assert_eq!(server.lock().unwrap().features, features | 1 << 30);
        for queue in [0, 1] {
            guest.ask(queue, b"hello");
            assert_eq!(guest.answer(queue), b"olleh");
        }
        assert!(!worker.handles_queue(0) && !worker.handles_queue(1));
        assert_eq!(worker.sources().len(), 1);
        // The server's end is all there is to wait for.
        assert_eq!(test_driver::run(&mut *worker, &[], 1).unwrap(), 0);

        for _ in 0..2 {
            worker.quiesce();
            worker.quiesce();
            assert!(server.lock().unwrap().rings.iter().all(|r| !r.running));
            // Those of answers that were found without waiting.
            guest.interrupted(1, 0);
            guest.ask(1, b"later");
            assert!(!guest.interrupted(1, 0));
            worker.resume().unwrap();
            worker.resume().unwrap();
            assert_eq!(guest.answer(1), b"retal");
        }
        worker.quiesce();
        device.reset(worker);
    }
    // Each once.
    assert_eq!(server.lock().unwrap().served, 2 * 5);
    drop(device);
    thread.join().unwrap();
}

#[test]
fn the_event_loop_pauses_the_server() {
    let (socket, theirs) = pair();
    let (server, _thread) = server::start(theirs, server::FEATURES);
    let mut device = Fs::new(socket, "husk", PATIENCE).unwrap();
    let mut guest = Guest::new(memory(), VERSION_1);
    let worker = guest.activate(&mut device, VERSION_1).unwrap();
    let event_loop = EventLoop::start("fs", || Ok(())).unwrap();
    let handle = event_loop.handle();
    let on_failure = Box::new(|error: &DeviceError| panic!("{error}"));
    let id = handle.add(worker, Vec::new(), on_failure).unwrap();
    let running = || server.lock().unwrap().rings.iter().any(|ring| ring.running);
    handle.pause().unwrap();
    assert!(!running());
    guest.ask(0, b"abc");
    handle.resume().unwrap();
    assert_eq!(guest.answer(0), b"cba");
    let worker = handle
        .remove(id)
        .unwrap()
        .wait(Duration::from_secs(10))
        .unwrap();
    device.reset(worker.expect("it rests"));
    assert!(!running());
}

#[test]
fn the_server_dies() {
    let (socket, theirs) = pair();
    let killer = theirs.try_clone().unwrap();
    let (_server, thread) = server::start(theirs, server::FEATURES);
    let mut device = Fs::new(socket, "husk", PATIENCE).unwrap();
    let guest = Guest::new(memory(), VERSION_1);
    let mut worker = guest.activate(&mut device, VERSION_1).unwrap();
    killer.shutdown(std::net::Shutdown::Both).unwrap();
    thread.join().unwrap();
    assert!(matches!(
        test_driver::run(&mut *worker, &[], 2),
        Err(DeviceError::BackEnd(BackEndError::Gone))
    ));
    let before = Instant::now();
    worker.quiesce();
    assert!(worker.resume().is_err());
    device.reset(worker);
    assert!(matches!(
        guest.activate(&mut device, VERSION_1),
        Err(ActivateError::BackEnd(BackEndError::Gone))
    ));
    assert!(before.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_silent_server_is_given_up() {
    // From the start; and after it has begun.
    let (socket, _theirs) = pair();
    let before = Instant::now();
    assert!(matches!(
        Fs::new(socket, "husk", PATIENCE),
        Err(BackEndError::Silent)
    ));
    assert!(before.elapsed() < Duration::from_secs(10));

    let (socket, theirs) = pair();
    let (server, thread) = server::start(theirs, server::FEATURES);
    let mut device = Fs::new(socket, "husk", PATIENCE).unwrap();
    let guest = Guest::new(memory(), VERSION_1);
    let mut worker = guest.activate(&mut device, VERSION_1).unwrap();
    let busy = server.lock().unwrap();
    let before = Instant::now();
    worker.quiesce();
    assert!(before.elapsed() < Duration::from_secs(10));
    drop(busy);
    // It was told by the end of the connection.
    thread.join().unwrap();
    assert!(matches!(
        worker.process(Event::Queue(0)),
        Err(DeviceError::BackEnd(_))
    ));
}

#[test]
fn what_the_server_refuses_is_told() {
    let (socket, theirs) = pair();
    let (server, _thread) = server::start(theirs, server::FEATURES);
    let mut device = Fs::new(socket, "husk", PATIENCE).unwrap();
    // Too small for the queues that the driver will set up.
    for ring in &mut server.lock().unwrap().rings {
        ring.queue = virtio_queue::QueueT::new(64).unwrap();
    }
    let guest = Guest::new(memory(), VERSION_1);
    let refused = guest.activate(&mut device, VERSION_1).err().unwrap();
    assert!(
        matches!(
            refused,
            ActivateError::BackEnd(BackEndError::Refused { request: 8 })
        ),
        "{refused:?}"
    );
}

#[test]
fn memory_without_a_file_cannot_be_shared() {
    let (socket, theirs) = pair();
    let (_server, _thread) = server::start(theirs, server::FEATURES);
    let mut device = Fs::new(socket, "husk", PATIENCE).unwrap();
    let private = GuestMemory::new(
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), MEMORY_BYTES),
            (GuestAddress(1 << 32), MEMORY_BYTES),
        ])
        .unwrap(),
    );
    let guest = Guest::new(private, VERSION_1);
    assert!(matches!(
        guest.activate(&mut device, VERSION_1),
        Err(ActivateError::BackEnd(BackEndError::Memory))
    ));
    // Nothing has been said to the server: it can still be used.
    let mut guest = Guest::new(memory(), VERSION_1);
    let _worker = guest.activate(&mut device, VERSION_1).unwrap();
    guest.ask(0, b"abc");
    assert_eq!(guest.answer(0), b"cba");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_mad_server_does_no_harm(
        good in 0usize..5,
        bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let (socket, mut theirs) = pair();
        let talker = thread::spawn(move || {
            let answers: [(u32, u64); 4] = [
                (1, VERSION_1 | 1 << 30),
                (15, 1 << 3 | 1),
                (17, 2),
                (2, 0),
            ];
            for (request, value) in answers.into_iter().take(good) {
                let mut message = Vec::new();
                for word in [request, 5, 8, value as u32, (value >> 32) as u32] {
                    message.extend(word.to_le_bytes());
                }
                let _ = theirs.write_all(&message);
            }
            let _ = theirs.write_all(&bytes);
            let _ = theirs.shutdown(std::net::Shutdown::Write);
            let _ = theirs.read_to_end(&mut Vec::new());
        });
        if let Ok(mut device) = Fs::new(socket, "husk", PATIENCE) {
            prop_assert!(good >= 3);
            let guest = Guest::new(memory(), VERSION_1);
            prop_assert!(guest.activate(&mut device, VERSION_1).is_err());
        }
        talker.join().unwrap();
    }
}
