//! File systems whose server does not see the guest's memory.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::server::{self, Mischief, Server};
use crate::fs::{Fs, PATIENCE, Shadow};
use crate::testing::{Buffer, Driver, DriverQueue, HIGH, MEMORY_BYTES, NEEDS_RESET, wait_until};
use crate::{VirtioDevice, queue};

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// Where answers go.
const ANSWERS: u64 = HIGH;

struct Machine {
    driver: Driver,
    queues: Vec<DriverQueue>,
    server: Arc<Mutex<Server>>,
    connection: UnixStream,
    thread: JoinHandle<()>,
}

impl Machine {
    fn new(features: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connection = theirs.try_clone().unwrap();
        let (server, thread) = server::start(theirs, server::FEATURES);
        let device = Fs::new(OwnedFd::from(ours), "husk", PATIENCE).unwrap();
        let mut driver = Driver::new(device.through(Shadow::new().unwrap()));
        let queues = driver.start(features);
        Self {
            driver,
            queues,
            server,
            connection,
            thread,
        }
    }

    /// Has the driver begin anew.
    fn reset(&mut self, features: u64) {
        self.queues = self.driver.start(features);
        self.driver.forget_buffers();
    }

    fn served(&self) -> usize {
        self.server.lock().unwrap().served
    }

    /// Waits until so many requests of the second queue have got to the server's
    /// ring.
    fn wait_passed_on(&self, count: u16) {
        // Its available ring's index.
        let index = GuestAddress((1 << 32) + 4096 + 2048 + 2);
        wait_until("requests are passed on", || {
            let server = self.server.lock().unwrap();
            server.memory.read_obj::<u16>(index).unwrap() == count
        });
    }

    fn misbehave(&self, mischief: Option<Mischief>) {
        self.server.lock().unwrap().mischief = mischief;
    }

    fn returned(&mut self, queue: usize) -> (u32, u32) {
        let mut used = None;
        wait_until("a chain is returned", || {
            used = used.or_else(|| self.queues[queue].pop_used());
            used.is_some()
        });
        used.unwrap()
    }

    /// Sends a request and gives the answer.
    fn ask(&mut self, queue: usize, request: &[u8], room: u32) -> Vec<u8> {
        let request = self.driver.allocate_with(request);
        let chain = [request, Buffer::writable(ANSWERS, room)];
        let head = self.queues[queue].add(&chain);
        self.driver.notify(queue as u16);
        let (used, written) = self.returned(queue);
        assert_eq!(used, u32::from(head));
        self.driver.read(ANSWERS, written as usize)
    }
}

#[test]
fn offers_the_rings_that_are_here() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    // A server that knows neither.
    let (_server, _thread) = server::start(theirs, 1 << 32 | 1 << 30);
    let device = Fs::new(ours.into(), "husk", PATIENCE).unwrap();
    assert_eq!(device.offered_features(), 0);
    let device = device.through(Shadow::new().unwrap());
    assert_eq!(device.offered_features(), queue::FEATURES);
    let mut driver = Driver::new(device);
    let mut queues = driver.start(u64::MAX);
    for text in [b"abc", b"xyz"] {
        let request = driver.allocate_with(text);
        queues[1].add(&[request, Buffer::writable(ANSWERS, 3)]);
        driver.notify(1);
        driver.wait_queue(1);
        assert_eq!(queues[1].pop_used().map(|(_, written)| written), Some(3));
    }
    assert_eq!(driver.read(ANSWERS, 3), b"zyx");
}

#[test]
fn requests_are_served_through_resets_and_pauses() {
    let mut machine = Machine::new(0);
    for features in [0, EVENT_IDX, u64::MAX] {
        machine.reset(features);
        for step in 0..200 {
            let queue = step % 2;
            let text = format!("request {step}");
            let answer = machine.ask(queue, text.as_bytes(), 100);
            assert_eq!(answer, text.bytes().rev().collect::<Vec<_>>());
            if features & EVENT_IDX == 0 {
                machine.driver.wait_queue(queue as u16);
            }
            if step % 50 == 7 {
                let handle = machine.driver.event_loop.handle();
                handle.pause().unwrap();
                let rings = |server: &Server| server.rings.iter().any(|ring| ring.running);
                assert!(!rings(&machine.server.lock().unwrap()));
                handle.pause().unwrap();
                handle.resume().unwrap();
            }
        }
    }
    assert_eq!(machine.served(), 600);
    assert_eq!(*machine.driver.reports.lock().unwrap(), [""; 0]);
    // The server knows the shadow alone.
    {
        let server = machine.server.lock().unwrap();
        let guest = GuestAddress(ANSWERS);
        assert!(server.memory.read_obj::<u8>(guest).is_err());
    }
    drop(machine.driver);
    machine.thread.join().unwrap();
}

#[test]
fn an_answer_is_as_long_as_its_room() {
    let mut machine = Machine::new(u64::MAX);
    machine.driver.write(ANSWERS, b"..........");
    assert_eq!(machine.ask(1, b"0123456789", 4), b"9876");
    assert_eq!(machine.driver.read(ANSWERS, 10), b"9876......");
    assert_eq!(machine.ask(1, b"0123456789", 0), b"");
}

#[test]
fn large_requests_wait_for_room_and_lose_nothing() {
    for features in [0, EVENT_IDX] {
        let mut machine = Machine::new(features);
        // More than the shadow holds, at once.
        let len = 1 << 20;
        let data: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let request = machine.driver.allocate_with(&data);
        let heads: Vec<_> = (0..24)
            .map(|i| {
                let answer = Buffer::writable(ANSWERS + i * 64, 64);
                machine.queues[1].add(&[request, answer])
            })
            .collect();
        machine.driver.notify(1);
        for head in heads {
            assert_eq!(machine.returned(1), (head.into(), 64));
        }
        let expected: Vec<u8> = data.iter().rev().take(64).copied().collect();
        for i in 0..24 {
            assert_eq!(machine.driver.read(ANSWERS + i * 64, 64), expected);
        }
        // And more chains than it has numbers for.
        let small = machine.driver.allocate_with(b"x");
        for _ in 0..3 {
            for _ in 0..128 {
                machine.queues[1].add(&[small]);
            }
            machine.driver.notify(1);
            for _ in 0..128 {
                assert_eq!(machine.returned(1).1, 0);
            }
        }
        assert_eq!(machine.served(), 24 + 3 * 128);
    }
}

#[test]
fn a_pause_lets_go_of_pages() {
    let mut machine = Machine::new(u64::MAX);
    let pages = |machine: &Machine| {
        let server = machine.server.lock().unwrap();
        let region = server.memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        file.metadata().unwrap().blocks() / 8
    };
    for _ in 0..2 {
        machine.driver.forget_buffers();
        assert_eq!(machine.ask(1, &[7; 1 << 20], 4), [7; 4]);
        assert!(pages(&machine) >= 256);
        let handle = machine.driver.event_loop.handle();
        handle.pause().unwrap();
        // The rings are left.
        assert!(pages(&machine) <= 2);
        handle.resume().unwrap();
    }
    // What the server still has stays.
    machine.driver.forget_buffers();
    machine.server.lock().unwrap().turn = Some(0);
    let request = machine.driver.allocate_with(&[9; 1 << 20]);
    machine.queues[1].add(&[request, Buffer::writable(ANSWERS, 4)]);
    machine.driver.notify(1);
    machine.wait_passed_on(3);
    let handle = machine.driver.event_loop.handle();
    handle.pause().unwrap();
    assert!(pages(&machine) >= 256);
    machine.server.lock().unwrap().turn = None;
    handle.resume().unwrap();
    assert_eq!(machine.returned(1).1, 4);
    assert_eq!(machine.driver.read(ANSWERS, 4), [9; 4]);
}

#[test]
fn one_queue_does_not_wait_for_the_other() {
    let mut machine = Machine::new(u64::MAX);
    // What is asked of the second is never answered.
    machine.misbehave(Some(Box::new(|queue, head, written| match queue {
        0 => (vec![(head, written)], 0),
        _ => (Vec::new(), 0),
    })));
    let request = machine.driver.allocate(1 << 20);
    for _ in 0..100 {
        machine.queues[1].add(&[Buffer::readable(request, 1 << 20)]);
    }
    machine.driver.notify(1);
    for _ in 0..100 {
        assert_eq!(machine.ask(0, b"forget", 100), b"tegrof");
    }
    assert_eq!(machine.queues[1].used_index(), 0);
}

#[test]
fn requests_that_cannot_be_passed_on_cost_a_reset() {
    let mut machine = Machine::new(u64::MAX);
    let most = (1 << 20) + (128 << 10);
    let chains: [(usize, Vec<Buffer>, &str); 4] = [
        (1, vec![Buffer::readable(0, most + 1)], "too large"),
        (
            1,
            vec![Buffer::readable(0, 64), Buffer::writable(0, most)],
            "too large",
        ),
        (0, vec![Buffer::readable(0, 65 << 10)], "too large"),
        (1, vec![Buffer::writable(0, 64)], "says nothing"),
    ];
    for (queue, chain, why) in chains {
        machine.queues[queue].add(&chain);
        machine.driver.notify(queue as u16);
        machine.driver.wait_needs_reset();
        let report = machine.driver.reports.lock().unwrap().pop().unwrap();
        assert!(report.contains(why), "{report}");
        machine.reset(u64::MAX);
        assert_eq!(machine.ask(1, b"abc", 3), b"cba");
    }
    // The largest.
    let chain = [Buffer::readable(0, 64), Buffer::writable(HIGH, most - 64)];
    machine.queues[1].add(&chain);
    machine.driver.notify(1);
    assert_eq!(machine.returned(1).1, 64);
}

#[test]
fn what_the_server_has_not_begun_survives_a_pause_and_not_a_reset() {
    for features in [0, u64::MAX] {
        let mut machine = Machine::new(features);
        let handle = machine.driver.event_loop.handle();
        machine.server.lock().unwrap().turn = Some(0);
        let request = machine.driver.allocate_with(b"abc");
        let ask = |machine: &mut Machine| {
            for i in 0..10 {
                let answer = Buffer::writable(ANSWERS + i * 16, 16);
                machine.queues[1].add(&[request, answer]);
            }
            machine.driver.notify(1);
        };
        ask(&mut machine);
        machine.wait_passed_on(10);
        handle.pause().unwrap();
        assert_eq!(machine.queues[1].used_index(), 0);
        machine.server.lock().unwrap().turn = Some(3);
        handle.resume().unwrap();
        handle.pause().unwrap();
        let some = machine.queues[1].used_index();
        assert!((3..=10).contains(&some), "{some}");
        assert_eq!(machine.served(), usize::from(some));
        machine.server.lock().unwrap().turn = None;
        handle.resume().unwrap();
        for _ in 0..10 {
            assert_eq!(machine.returned(1).1, 3);
        }
        assert_eq!(machine.served(), 10);

        machine.server.lock().unwrap().turn = Some(0);
        ask(&mut machine);
        machine.wait_passed_on(20);
        machine.driver.set_status(0);
        machine.driver.write(ANSWERS, &[7; 160]);
        machine.server.lock().unwrap().turn = None;
        machine.reset(features);
        assert_eq!(machine.ask(0, b"abc", 3), b"cba");
        assert_eq!(machine.served(), 11);
        assert_eq!(machine.driver.read(ANSWERS + 16, 144), [7; 144]);
    }
}

#[test]
fn the_server_dies_with_requests() {
    let mut machine = Machine::new(u64::MAX);
    machine.server.lock().unwrap().turn = Some(0);
    let request = machine.driver.allocate_with(b"abc");
    machine.queues[1].add(&[request, Buffer::writable(ANSWERS, 3)]);
    machine.driver.notify(1);
    machine.wait_passed_on(1);
    machine
        .connection
        .shutdown(std::net::Shutdown::Both)
        .unwrap();
    machine.driver.wait_needs_reset();
    assert_eq!(machine.queues[1].used_index(), 0);
    // It does not come back, and nothing waits for it.
    machine.reset(u64::MAX);
    assert_ne!(machine.driver.status() & NEEDS_RESET, 0);
    let reports = machine.driver.reports.lock().unwrap().join("\n");
    assert!(reports.contains("the file server is gone"), "{reports}");
}

#[test]
fn a_server_that_breaks_the_rules_breaks_the_device() {
    let lies: [(&str, Mischief); 8] = [
        ("does not have", Box::new(|_, h, w| (vec![(h + 1, w)], 0))),
        ("does not have", Box::new(|_, h, w| (vec![(h + 2, w)], 0))),
        ("does not have", Box::new(|_, _, w| (vec![(128, w)], 0))),
        (
            "does not have",
            Box::new(|_, h, w| (vec![(h | 1 << 16, w)], 0)),
        ),
        (
            "does not have",
            Box::new(|_, _, w| (vec![(u32::MAX, w)], 0)),
        ),
        ("more bytes", Box::new(|_, h, _| (vec![(h, 5)], 0))),
        ("more bytes", Box::new(|_, h, _| (vec![(h, u32::MAX)], 0))),
        ("more requests", Box::new(|_, h, w| (vec![(h, w)], 1))),
    ];
    for (why, lie) in lies {
        let mut machine = Machine::new(u64::MAX);
        assert_eq!(machine.ask(1, b"abcd", 4), b"dcba");
        machine.misbehave(Some(lie));
        machine.driver.write(ANSWERS, b"........");
        let request = machine.driver.allocate_with(b"abcd");
        machine.queues[1].add(&[request, Buffer::writable(ANSWERS, 4)]);
        machine.driver.notify(1);
        machine.driver.wait_needs_reset();
        let report = machine.driver.reports.lock().unwrap().join("\n");
        assert!(report.contains(why), "{report}");
        assert_eq!(machine.driver.read(ANSWERS, 8), b"........");
        // It was hung up on.
        machine.thread.join().unwrap();
        machine.driver.set_status(0);
        assert_eq!(machine.driver.status(), 0);
    }
}

#[test]
fn one_that_returns_a_request_twice_does_so_as_well() {
    let mut machine = Machine::new(u64::MAX);
    machine.server.lock().unwrap().turn = Some(0);
    let request = machine.driver.allocate_with(b"abcd");
    for _ in 0..2 {
        machine.queues[1].add(&[request, Buffer::writable(ANSWERS, 4)]);
    }
    machine.driver.notify(1);
    machine.wait_passed_on(2);
    machine.misbehave(Some(Box::new(|_, _, w| (vec![(0, w), (0, w)], 0))));
    machine.server.lock().unwrap().turn = None;
    let handle = machine.driver.event_loop.handle();
    handle.pause().unwrap();
    handle.resume().unwrap();
    machine.driver.wait_needs_reset();
    assert!(machine.queues[1].used_index() <= 1);
}

#[test]
fn one_that_keeps_a_request_is_given_up_at_the_next_pause() {
    let mut machine = Machine::new(u64::MAX);
    machine.misbehave(Some(Box::new(|_, _, _| (Vec::new(), 0))));
    let request = machine.driver.allocate_with(b"abcd");
    machine.queues[1].add(&[request, Buffer::writable(ANSWERS, 4)]);
    machine.driver.notify(1);
    let server = Arc::clone(&machine.server);
    wait_until("it has the request", || server.lock().unwrap().served == 1);
    let handle = machine.driver.event_loop.handle();
    handle.pause().unwrap();
    machine.misbehave(None);
    handle.resume().unwrap();
    machine.driver.wait_needs_reset();
    machine.thread.join().unwrap();
}

#[test]
fn one_that_hangs_does_not_hold_up_a_reset_for_long() {
    let mut machine = Machine::new(u64::MAX);
    let server = Arc::clone(&machine.server);
    let busy = server.lock().unwrap();
    let request = machine.driver.allocate_with(b"abcd");
    machine.queues[1].add(&[request, Buffer::writable(ANSWERS, 4)]);
    machine.driver.notify(1);
    let before = std::time::Instant::now();
    machine.driver.set_status(0);
    assert!(before.elapsed() < PATIENCE + Duration::from_secs(3));
    assert_eq!(machine.driver.status(), 0);
    drop(busy);
    machine.thread.join().unwrap();
    assert_eq!(machine.queues[1].used_index(), 0);
}

/// Pieces of so many bytes, one behind the other.
fn pieces(at: u64, lens: &[u32], piece: fn(u64, u32) -> Buffer) -> Vec<Buffer> {
    let mut at = at;
    let mut take = |len: u32| {
        at += u64::from(len);
        piece(at - u64::from(len), len)
    };
    lens.iter().map(|len| take(*len)).collect()
}

/// A write of the server into its memory: where in the rings, and what.
fn any_scribble() -> impl Strategy<Value = (u64, u16)> {
    let at = prop_oneof![
        // Used rings, available rings, anything.
        3 => 2312..2400_u64,
        3 => (4096 + 2312)..(4096 + 2400_u64),
        1 => 2048..2310_u64,
        2 => 0..8190_u64,
    ];
    let value = prop_oneof![0..12_u16, Just(128), any::<u16>()];
    (at, value)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn scattered_requests_arrive_whole(
        readable in prop::collection::vec(0..9000_u32, 1..30),
        writable in prop::collection::vec(0..9000_u32, 0..30),
    ) {
        let total: u32 = readable.iter().sum();
        let room: u32 = writable.iter().sum();
        let mut machine = Machine::new(u64::MAX);
        let data: Vec<u8> = (0..total).map(|i| (i % 253) as u8).collect();
        let request = machine.driver.allocate_with(&data);
        machine.driver.write(ANSWERS, &vec![0xee; room as usize + 16]);
        let chain = [
            pieces(request.address, &readable, Buffer::readable),
            pieces(ANSWERS, &writable, Buffer::writable),
        ]
        .concat();
        machine.queues[1].add(&chain);
        machine.driver.notify(1);
        if total == 0 {
            machine.driver.wait_needs_reset();
        } else {
            let (_, written) = machine.returned(1);
            prop_assert_eq!(written, total.min(room));
            let answer = machine.driver.read(ANSWERS, room as usize + 16);
            let (answer, rest) = answer.split_at(written as usize);
            let expected: Vec<u8> = data.iter().rev().take(answer.len()).copied().collect();
            prop_assert_eq!(answer, expected);
            prop_assert!(rest.iter().all(|byte| *byte == 0xee));
        }
    }

    #[test]
    fn a_server_that_scribbles_harms_nobody(
        scribbles in prop::collection::vec(any_scribble(), 1..200),
        pause in any::<bool>(),
    ) {
        let mut machine = Machine::new(u64::MAX);
        let answers = 0x20_0000;
        let guest = machine.driver.memory.clone();
        let scribbler = Arc::clone(&machine.server);
        let request = machine.driver.allocate_with(b"abcd");
        for i in 0..32 {
            machine.queues[1].add(&[request, Buffer::writable(answers + i * 64, 16)]);
            machine.queues[0].add(&[request]);
        }
        machine.driver.write(answers, &[0xee; 64 * 32]);
        machine.driver.write(request.address, b"abcd");
        machine.server.lock().unwrap().turn = Some(0);
        for (step, (at, value)) in scribbles.into_iter().enumerate() {
            let server = scribbler.lock().unwrap();
            server.memory.write_obj(value, GuestAddress((1 << 32) + at)).unwrap();
            drop(server);
            machine.driver.notify((step % 2) as u16);
            for ring in &mut scribbler.lock().unwrap().rings[..2] {
                ring.call();
            }
            if pause && step == 20 {
                let handle = machine.driver.event_loop.handle();
                handle.pause().unwrap();
                handle.resume().unwrap();
            }
        }
        // The loop lives.
        machine.driver.event_loop.handle().pause().unwrap();
        // Nothing but answers was written, and nothing behind them.
        for i in 0..32 {
            let gap = machine.driver.read(answers + i * 64 + 16, 48);
            prop_assert_eq!(gap, [0xee; 48]);
        }
        let mut rest = vec![0; (MEMORY_BYTES - 0x20_1000) as usize];
        vm_memory::GuestAddressSpace::memory(&guest)
            .read_slice(&mut rest, GuestAddress(0x20_1000))
            .unwrap();
        prop_assert!(rest.iter().all(|byte| *byte == 0));
        machine.driver.event_loop.handle().resume().unwrap();
        machine.driver.set_status(0);
        prop_assert_eq!(machine.driver.status(), 0);
    }
}
