//! Every device against a driver that does whatever it likes: random registers,
//! rings, descriptors and buffers, resets and pauses in between. Whatever it did,
//! nothing panics or hangs, and a reset brings the device back.

use std::io::pipe;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::VirtioDevice;
use crate::balloon::Balloon;
use crate::block::{Block, Engine};
use crate::console::Console;
use crate::fs::tests::server;
use crate::fs::{self, Fs, Shadow};
use crate::mem::Mem;
use crate::pci::PciFunction;
use crate::rng::Rng;
use crate::testing::{
    Buffer, Driver, DriverQueue, HIGH, HOLE, INDIRECT, MEMORY_BYTES, NEEDS_RESET, NEXT, WRITABLE,
};
use crate::vsock::{AddHostPorts, Vsock};

#[derive(Clone, Debug)]
enum Act {
    /// Writes to any register.
    Register(u64, Vec<u8>),
    /// Writes to a register of the common structure in the right width.
    Common(u64, u64, usize),
    /// Puts a descriptor into a ring.
    Descriptor(u16, u16, Buffer),
    /// Puts bytes where many buffers are.
    Bytes(u64, Vec<u8>),
    /// Makes a head available.
    Publish(u16, u16),
    /// Sets the available index.
    Jump(u16, u16),
    Notify(u16),
    Start(u64),
    Pause,
}

/// Where most buffers, and the indirect tables, are.
const NEAR: std::ops::Range<u64> = 0x20_0000..0x20_1000;

fn any_buffer() -> impl Strategy<Value = Buffer> {
    let address = prop_oneof![
        8 => NEAR,
        2 => 0..MEMORY_BYTES,
        1 => HOLE - 64..HOLE + 64,
        1 => HIGH..HIGH + MEMORY_BYTES,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => 0..64_u32,
        4 => prop::sample::select(vec![1_u32, 16, 44, 512, 513, 4096]),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        4 => Just(0),
        4 => Just(NEXT),
        4 => Just(WRITABLE),
        4 => Just(NEXT | WRITABLE),
        2 => Just(INDIRECT),
        1 => any::<u16>(),
    ];
    (address, len, flags, 0..8_u16)
        .prop_map(|(address, len, flags, next)| Buffer::raw(address, len, flags, next))
}

fn any_act() -> impl Strategy<Value = Act> {
    let bytes = || prop::collection::vec(prop_oneof![0..16_u8, any::<u8>()], 1..64);
    let fields = vec![
        (0x00, 4),
        (0x08, 4),
        (0x0c, 4),
        (0x10, 2),
        (0x14, 1),
        (0x16, 2),
        (0x18, 2),
        (0x1a, 2),
        (0x1c, 2),
        (0x20, 8),
        (0x28, 8),
        (0x30, 8),
    ];
    let value = prop_oneof![0..16_u64, Just(0x1_0000), any::<u64>()];
    prop_oneof![
        1 => (0..0x8000_u64, prop::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(at, data)| Act::Register(at, data)),
        1 => (prop::sample::select(fields), value)
            .prop_map(|((at, len), value)| Act::Common(at, value, len)),
        8 => (0..3_u16, 0..8_u16, any_buffer())
            .prop_map(|(queue, index, buffer)| Act::Descriptor(queue, index, buffer)),
        4 => (NEAR, bytes()).prop_map(|(at, data)| Act::Bytes(at, data)),
        6 => (0..3_u16, 0..9_u16).prop_map(|(queue, head)| Act::Publish(queue, head)),
        1 => (0..3_u16, any::<u16>()).prop_map(|(queue, index)| Act::Jump(queue, index)),
        6 => (0..3_u16).prop_map(Act::Notify),
        2 => any::<u64>().prop_map(Act::Start),
        1 => Just(Act::Pause),
    ]
}

fn run(device: impl VirtioDevice + 'static, acts: Vec<Act>) -> Driver {
    let mut driver = Driver::new(device);
    let mut queues: Vec<DriverQueue> = driver.start(u64::MAX);
    for act in acts {
        match act {
            Act::Register(at, mut data) => {
                driver.function.write_bar(0, at, &data);
                driver.function.read_bar(0, at, &mut data);
            }
            Act::Common(at, value, len) => driver.set_common(at, &value.to_le_bytes()[..len]),
            Act::Descriptor(queue, index, buffer) => {
                if let Some(queue) = queues.get(usize::from(queue)) {
                    queue.set_descriptor(index, buffer);
                }
            }
            Act::Bytes(at, data) => driver.write(at, &data),
            Act::Publish(queue, head) => {
                if let Some(queue) = queues.get_mut(usize::from(queue)) {
                    queue.publish(head);
                }
            }
            Act::Jump(queue, index) => {
                if let Some(queue) = queues.get_mut(usize::from(queue)) {
                    queue.set_available_index(index);
                }
            }
            Act::Notify(queue) => {
                if usize::from(queue) < queues.len() {
                    driver.notify(queue);
                }
            }
            Act::Start(features) => queues = driver.start(features),
            Act::Pause => {
                let handle = driver.event_loop.handle();
                handle.pause().unwrap();
                handle.resume().unwrap();
            }
        }
    }
    // The loop lives: it answers.
    driver.event_loop.handle().pause().unwrap();
    driver.event_loop.handle().resume().unwrap();
    driver
}

/// Starts the device again and waits until it returns `chain`.
fn serves(driver: &mut Driver, queue: usize, chain: &[Buffer]) {
    let mut queues = driver.start(u64::MAX);
    assert_eq!(driver.status() & NEEDS_RESET, 0);
    queues[queue].add(chain);
    driver.notify(queue as u16);
    let deadline = Instant::now() + Duration::from_secs(10);
    while queues[queue].pop_used().is_none() {
        assert!(Instant::now() < deadline, "{:?}", driver.reports.lock());
        std::thread::yield_now();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn rng(acts in prop::collection::vec(any_act(), 1..300)) {
        let mut driver = run(Rng, acts);
        serves(&mut driver, 0, &[Buffer::writable(NEAR.start, 16)]);
    }

    #[test]
    fn balloon(acts in prop::collection::vec(any_act(), 1..300)) {
        let mut driver = run(Balloon::default(), acts);
        serves(&mut driver, 2, &[Buffer::writable(NEAR.start, 4096)]);
    }

    #[test]
    fn console(acts in prop::collection::vec(any_act(), 1..300)) {
        let (_reader, writer) = pipe().unwrap();
        let mut driver = run(Console::new(writer.into(), Arc::default()).unwrap(), acts);
        serves(&mut driver, 1, &[Buffer::readable(NEAR.start, 16)]);
    }

    #[test]
    fn block(acts in prop::collection::vec(any_act(), 1..300), waiting in any::<bool>()) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let engine = if waiting { Engine::Waiting } else { Engine::new() };
        let mut driver = run(Block::new(file.try_clone().unwrap(), false, "x", engine).unwrap(), acts);
        driver.write(NEAR.start, &[0; 16]);
        serves(&mut driver, 0, &[Buffer::readable(NEAR.start, 16), Buffer::writable(NEAR.start + 16, 513)]);
        prop_assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    }

    #[test]
    fn mem(acts in prop::collection::vec(any_act(), 1..300)) {
        let mut driver = run(Mem::new(HIGH..HIGH + MEMORY_BYTES), acts);
        driver.write(NEAR.start, &[0; 24]);
        serves(&mut driver, 0, &[Buffer::readable(NEAR.start, 24), Buffer::writable(NEAR.start + 24, 10)]);
    }

    #[test]
    fn fs(acts in prop::collection::vec(any_act(), 1..300)) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (_server, _thread) = server::start(theirs, server::FEATURES);
        let device = Fs::new(ours.into(), "x", fs::PATIENCE).unwrap();
        let mut driver = run(device.through(Shadow::new().unwrap()), acts);
        driver.write(NEAR.start, b"fuse");
        serves(&mut driver, 1, &[Buffer::readable(NEAR.start, 4), Buffer::writable(NEAR.start + 4, 4)]);
        prop_assert_eq!(driver.read(NEAR.start, 8), b"fuseesuf");
    }

    #[test]
    fn fs_and_its_server(
        acts in prop::collection::vec(any_act(), 1..300),
        lies in prop::collection::vec((prop::option::of((0..300_u32, any::<u32>())), 0..3_u16), 1..20),
    ) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (server, thread) = server::start(theirs, server::FEATURES);
        // Every other answer is the right one.
        let mut lies = lies.into_iter().cycle();
        let mut honest = false;
        server.lock().unwrap().mischief = Some(Box::new(move |_, head, written| {
            honest = !honest;
            match lies.next() {
                Some((lie, leap)) if !honest => (lie.into_iter().collect(), leap),
                _ => (vec![(head, written)], 0),
            }
        }));
        let device = Fs::new(ours.into(), "x", fs::PATIENCE).unwrap();
        let mut driver = run(device.through(Shadow::new().unwrap()), acts);
        driver.set_status(0);
        prop_assert_eq!(driver.status(), 0);
        drop(driver);
        thread.join().unwrap();
    }

    #[test]
    fn vsock(acts in prop::collection::vec(any_act(), 1..300)) {
        let (_shim, ours) = UnixStream::pair().unwrap();
        let mut driver = run(Vsock::new(3, vec![(1, ours.into())]), acts);
        let (_shim, ours) = UnixStream::pair().unwrap();
        driver.function.control(Box::new(AddHostPorts(vec![(2, ours.into())]))).unwrap();
        driver.write(NEAR.start, &[0; 44]);
        serves(&mut driver, 1, &[Buffer::readable(NEAR.start, 44)]);
    }
}
