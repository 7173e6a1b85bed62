mod limit;
mod waiting;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;
use tempfile::tempfile;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::test_driver;
use crate::testing::{Buffer, Driver, DriverQueue, wait_until};
use crate::{DeviceError, Event};

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// The feature `VIRTIO_BLK_F_FLUSH`.
const FLUSHES: u64 = 1 << 9;

const SECTORS: u64 = 256;
const BYTES: usize = SECTORS as usize * 512;

/// A disk with a driver, and the file beneath.
struct Bench {
    driver: Driver,
    queue: DriverQueue,
    file: File,
}

fn engines() -> [Engine; 2] {
    let uring = Engine::new();
    assert!(
        matches!(uring, Engine::Uring(_)),
        "this machine has no io_uring"
    );
    [uring, Engine::Waiting]
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 512 + i % 251) as u8).collect()
}

impl Bench {
    fn new(read_only: bool, engine: Engine) -> Self {
        Self::with_features(read_only, engine, u64::MAX)
    }

    fn with_features(read_only: bool, engine: Engine, features: u64) -> Self {
        let mut file = tempfile().unwrap();
        file.write_all(&pattern(BYTES)).unwrap();
        let block = Block::new(file.try_clone().unwrap(), read_only, "disk-1", engine).unwrap();
        let mut driver = Driver::new(block);
        let queue = driver.start(features).remove(0);
        Self {
            driver,
            queue,
            file,
        }
    }

    fn header(&mut self, kind: u32, sector: u64) -> Buffer {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.allocate_with(&header)
    }

    /// Sends a request and gives its status and the bytes written to `input`.
    fn send(&mut self, kind: u32, sector: u64, output: &[u8], input: usize) -> (u8, Vec<u8>) {
        let header = self.header(kind, sector);
        let mut chain = vec![header];
        if !output.is_empty() {
            chain.push(self.driver.allocate_with(output));
        }
        let at = self.driver.allocate(input + 1);
        self.driver.write(at, &vec![0xee; input + 1]);
        if input > 0 {
            chain.push(Buffer::writable(at, input as u32));
        }
        chain.push(Buffer::writable(at + input as u64, 1));
        let head = self.queue.add(&chain);
        self.driver.notify(0);
        self.driver.wait_queue(0);
        assert_eq!(self.queue.pop_used(), Some((head.into(), input as u32 + 1)));
        let status = self.driver.read(at + input as u64, 1)[0];
        (status, self.driver.read(at, input))
    }

    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut segment = [0; 16];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&sectors.to_le_bytes());
        segment[12..].copy_from_slice(&flags.to_le_bytes());
        self.send(kind, 0, &segment, 0).0
    }

    fn on_disk(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.file.read_exact_at(&mut data, at).unwrap();
        data
    }
}

const HEADER: usize = 16;

#[test]
fn describes_itself() {
    let mut bench = Bench::new(false, Engine::Waiting);
    assert_eq!(bench.driver.device_config(0), SECTORS.to_le_bytes());
    assert_eq!(bench.driver.device_config(0x0c), 126_u32.to_le_bytes());
    assert_eq!(bench.driver.device_config(0x14), 512_u32.to_le_bytes());
    assert_eq!(bench.driver.device_config(0x18), [3, 0, 8, 0]);
    assert_eq!(
        bench.driver.device_config(0x24),
        (1_u32 << 21).to_le_bytes()
    );
    assert_eq!(bench.driver.device_config(0x38), [1, 0, 0, 0]);
    assert_eq!(bench.driver.device_config(0x3c), [0; 8]);
    let writable = bench.driver.offered_features();
    assert_eq!(
        writable & (1 << 5 | 1 << 9 | 1 << 13 | 1 << 14),
        1 << 9 | 1 << 13 | 1 << 14
    );
    let mut bench = Bench::new(true, Engine::Waiting);
    let read_only = bench.driver.offered_features();
    assert_eq!(
        read_only & (1 << 5 | 1 << 9 | 1 << 13 | 1 << 14),
        1 << 5 | 1 << 9
    );
}

#[test]
fn reads_and_writes() {
    for engine in engines() {
        let mut bench = Bench::new(false, engine);
        let (status, data) = bench.send(READ, 3, &[], 2048);
        assert_eq!(status, OK);
        assert_eq!(data, pattern(BYTES)[3 * 512..][..2048]);
        let text = vec![b'x'; 1024];
        assert_eq!(bench.send(WRITE, 254, &text, 0).0, OK);
        assert_eq!(bench.on_disk(254 * 512, 1024), text);
        assert_eq!(
            bench.on_disk(253 * 512, 512),
            pattern(BYTES)[253 * 512..][..512]
        );
        assert_eq!(bench.send(FLUSH, 0, &[], 0).0, OK);
        assert_eq!(bench.send(READ, 255, &[], 512), (OK, vec![b'x'; 512]));
        assert_eq!(bench.send(READ, 0, &[], 0).0, OK);
    }
}

#[test]
fn takes_any_framing() {
    for engine in engines() {
        let mut bench = Bench::new(false, engine);
        // The header in two pieces, the second together with data; the status
        // in the same piece as data.
        let header = bench.header(WRITE, 7);
        let all = [bench.driver.read(header.address, HEADER), vec![b'y'; 1024]].concat();
        let at = bench.driver.allocate_with(&all).address;
        let status = bench.driver.allocate(1);
        bench.queue.add(&[
            Buffer::readable(at, 5),
            Buffer::readable(at + 5, 600),
            Buffer::readable(at + 605, 0),
            Buffer::readable(at + 605, 435),
            Buffer::writable(status, 1),
        ]);
        bench.driver.notify(0);
        bench.driver.wait_queue(0);
        bench.queue.pop_used().unwrap();
        assert_eq!(bench.on_disk(7 * 512, 1024), vec![b'y'; 1024]);

        let header = bench.header(READ, 7);
        let at = bench.driver.allocate(2000);
        bench.queue.add(&[
            header,
            Buffer::writable(at, 1),
            Buffer::writable(at + 1, 1022),
            Buffer::writable(at + 1023, 2),
        ]);
        bench.driver.notify(0);
        bench.driver.wait_queue(0);
        assert_eq!(bench.queue.pop_used().map(|used| used.1), Some(1025));
        assert_eq!(bench.driver.read(at, 1024), vec![b'y'; 1024]);
        assert_eq!(bench.driver.read(at + 1024, 1), [OK]);
    }
}

#[test]
fn tells_its_serial() {
    let mut bench = Bench::new(false, Engine::Waiting);
    let (status, serial) = bench.send(GET_ID, 0, &[], 20);
    assert_eq!(status, OK);
    assert_eq!(&serial, b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(bench.send(GET_ID, 0, &[], 3), (OK, b"dis".to_vec()));
}

#[test]
fn refuses_what_is_not_on_the_disk() {
    for engine in engines() {
        let mut bench = Bench::new(false, engine);
        for (sector, len) in [
            (SECTORS, 512),
            (SECTORS - 1, 1024),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (u64::MAX / 512 + 1, 512),
            (0, 511),
            (0, 513),
        ] {
            let (status, data) = bench.send(READ, sector, &[], len);
            assert_eq!((status, data), (ERROR, vec![0xee; len]), "{sector}");
            assert_eq!(bench.send(WRITE, sector, &vec![1; len], 0).0, ERROR);
        }
        for (sector, sectors) in [
            (SECTORS, 1),
            (0, SECTORS as u32 + 1),
            (u64::MAX, 1),
            (0, u32::MAX),
            (u64::MAX / 512 + 1, 1),
        ] {
            assert_eq!(bench.range(DISCARD, sector, sectors, 0), ERROR);
            assert_eq!(bench.range(WRITE_ZEROES, sector, sectors, 0), ERROR);
        }
        assert_eq!(bench.on_disk(0, BYTES), pattern(BYTES));
        assert_eq!(bench.file.metadata().unwrap().len(), BYTES as u64);
    }
}

#[test]
fn refuses_what_it_does_not_know() {
    let mut bench = Bench::new(false, Engine::Waiting);
    assert_eq!(bench.send(77, 0, &[], 512).0, UNSUPPORTED);
    assert_eq!(bench.range(DISCARD, 0, 8, 1), UNSUPPORTED);
    assert_eq!(bench.range(WRITE_ZEROES, 0, 8, 2), UNSUPPORTED);
    assert_eq!(bench.send(DISCARD, 0, &[0; 32], 0).0, ERROR, "two segments");
    assert_eq!(
        bench.send(DISCARD, 0, &[0; 8], 0).0,
        ERROR,
        "half a segment"
    );
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    for engine in engines() {
        let mut bench = Bench::new(true, engine);
        assert_eq!(bench.send(WRITE, 0, &[1; 512], 0).0, ERROR);
        assert_eq!(bench.range(DISCARD, 0, 8, 0), ERROR);
        assert_eq!(bench.range(WRITE_ZEROES, 0, 8, 0), ERROR);
        assert_eq!(bench.send(FLUSH, 0, &[], 0).0, OK);
        assert_eq!(bench.send(READ, 0, &[], 512).0, OK);
        assert_eq!(bench.on_disk(0, BYTES), pattern(BYTES));
    }
}

#[test]
fn gives_space_back() {
    for engine in engines() {
        let mut bench = Bench::new(false, engine);
        bench.file.sync_all().unwrap();
        let before = bench.file.metadata().unwrap().blocks();
        assert_eq!(bench.range(DISCARD, 8, 64, 0), OK);
        assert_eq!(bench.on_disk(8 * 512, 64 * 512), vec![0; 64 * 512]);
        assert_eq!(bench.file.metadata().unwrap().blocks(), before - 64);
        assert_eq!(bench.range(WRITE_ZEROES, 128, 64, 1), OK);
        assert_eq!(bench.on_disk(128 * 512, 64 * 512), vec![0; 64 * 512]);
        assert_eq!(bench.file.metadata().unwrap().blocks(), before - 128);
        let expected = &pattern(BYTES)[192 * 512..];
        assert_eq!(bench.on_disk(192 * 512, 64 * 512), expected);
        // Whether a file system can zero and keep the space is its affair.
        let status = bench.range(WRITE_ZEROES, 200, 8, 0);
        assert!(matches!(status, OK | UNSUPPORTED));
        if status == OK {
            assert_eq!(bench.on_disk(200 * 512, 4096), vec![0; 4096]);
            assert!(bench.file.metadata().unwrap().blocks() >= before - 128);
        }
        assert_eq!(bench.range(DISCARD, 0, 0, 0), OK);
        assert_eq!(bench.file.metadata().unwrap().len(), BYTES as u64);
    }
}

#[test]
fn works_without_flushes() {
    for engine in engines() {
        let features = !FLUSHES;
        let mut bench = Bench::with_features(false, engine, features);
        assert_eq!(bench.send(WRITE, 1, &[7; 512], 0).0, OK);
        assert_eq!(bench.on_disk(512, 512), [7; 512]);
    }
}

#[test]
fn a_file_that_shrank_is_an_error() {
    for engine in engines() {
        let mut bench = Bench::new(false, engine);
        bench.file.set_len(10 * 512 + 100).unwrap();
        assert_eq!(bench.send(READ, 10, &[], 1024).0, ERROR);
        assert_eq!(bench.send(READ, 9, &[], 512).0, OK);
    }
}

#[test]
fn a_request_without_status_costs_a_reset() {
    let chains: [fn(u64) -> Vec<Buffer>; 3] = [
        |at| vec![Buffer::readable(at, 16)],
        |at| vec![Buffer::readable(at, 15), Buffer::writable(at, 513)],
        |at| vec![Buffer::writable(at, 513)],
    ];
    for chain in chains {
        let mut bench = Bench::new(false, Engine::new());
        let at = bench.driver.allocate(1024);
        bench.queue.add(&chain(at));
        bench.driver.notify(0);
        bench.driver.wait_needs_reset();
        bench.queue = bench.driver.start(u64::MAX).remove(0);
        assert_eq!(bench.send(READ, 0, &[], 512).0, OK);
    }
}

/// More requests than slots: repeats of one head, which no honest driver makes.
#[test]
fn bounds_what_is_in_flight() {
    for engine in engines() {
        let mut bench = Bench::new(false, engine);
        let header = bench.header(READ, 0);
        let at = bench.driver.allocate(4097);
        let mut head = bench.queue.add(&[header, Buffer::writable(at, 4097)]);
        let mut sent = 1_u16;
        while sent < 1000 {
            wait_until("there is room", || {
                sent - bench.queue.used_index() < bench.queue.size
            });
            bench.queue.publish(head);
            sent += 1;
            bench.driver.notify(0);
        }
        wait_until("all are used", || bench.queue.used_index() == sent);
        assert_eq!(bench.driver.read(at, 4096), pattern(4096));
        head = 0;
        assert!(bench.driver.reports.lock().unwrap().is_empty(), "{head}");
    }
}

#[test]
fn a_reset_waits_for_the_kernel() {
    for engine in engines() {
        let mut bench = Bench::new(false, engine);
        for round in 0..20_u8 {
            let mut statuses = Vec::new();
            let data = bench.driver.allocate(16384);
            for _ in 0..40 {
                let header = bench.header(READ, 0);
                let status = bench.driver.allocate(1);
                bench.driver.write(status, &[0xee]);
                statuses.push(status);
                bench.queue.add(&[
                    header,
                    Buffer::writable(data, 16384),
                    Buffer::writable(status, 1),
                ]);
            }
            bench.driver.notify(0);
            if round % 2 == 0 {
                bench.driver.wait_queue(0);
            }
            bench.driver.set_status(0);
            // Nothing touches memory any more.
            let done = bench.queue.used_index();
            bench.driver.write(data, &vec![round; 16384]);
            std::thread::sleep(std::time::Duration::from_millis(2));
            assert_eq!(bench.driver.read(data, 16384), vec![round; 16384]);
            assert_eq!(bench.queue.used_index(), done);
            let ended = statuses
                .iter()
                .filter(|at| bench.driver.read(**at, 1) == [OK])
                .count();
            assert_eq!(ended, usize::from(done));
            bench = bench.restart();
        }
        assert_eq!(bench.send(READ, 0, &[], 512).0, OK);
    }
}

/// Durable writes take their time, and so are in flight when the reset comes.
/// What the driver puts into its buffers afterwards never gets to the disk.
#[test]
fn a_reset_waits_for_writes() {
    for engine in engines() {
        let mut bench = Bench::with_features(false, engine, !FLUSHES);
        bench.file.write_all_at(&[0; BYTES], 0).unwrap();
        for _ in 0..5 {
            let data = bench.driver.allocate(65536);
            bench.driver.write(data, &[1; 65536]);
            let status = bench.driver.allocate(1);
            for request in 0..40 {
                let header = bench.header(WRITE, request % 2 * 128);
                let data = Buffer::readable(data, 65536);
                bench
                    .queue
                    .add(&[header, data, Buffer::writable(status, 1)]);
            }
            bench.driver.notify(0);
            bench.driver.wait_queue(0);
            bench.driver.set_status(0);
            bench.driver.write(data, &[2; 65536]);
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!bench.on_disk(0, BYTES).contains(&2));
            bench.queue = bench.driver.start(!FLUSHES).remove(0);
            bench.driver.forget_buffers();
        }
    }
}

#[test]
fn positions_are_on_the_disk() {
    let mut file = tempfile().unwrap();
    file.write_all(&pattern(BYTES)).unwrap();
    let disk = Disk::new(file, true, "").unwrap();
    assert_eq!(disk.position(0, BYTES as u64), Some(0));
    assert_eq!(disk.position(SECTORS, 0), Some(BYTES as u64));
    assert_eq!(disk.position(1, BYTES as u64), None);
    assert_eq!(disk.position(u64::MAX / 512, 512), None);
    assert_eq!(disk.position(u64::MAX / 512 + 1, 0), None);
}

impl Bench {
    fn restart(mut self) -> Self {
        self.queue = self.driver.start(u64::MAX).remove(0);
        self.driver.forget_buffers();
        self
    }
}

/// A loop device on a file; detached when dropped.
struct Loop(String);

impl Loop {
    fn new(file: &std::path::Path) -> Result<Self, String> {
        let mut losetup = std::process::Command::new("losetup");
        let output = losetup
            .args(["--find", "--show", "--sector-size", "4096"])
            .arg(file)
            .output()
            .map_err(|error| error.to_string())?;
        match output.status.success() {
            true => Ok(Self(String::from_utf8_lossy(&output.stdout).trim().into())),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().into()),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup")
            .args(["--detach", &self.0])
            .status();
    }
}

#[test]
fn works_on_a_block_device() {
    for engine in engines() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&pattern(BYTES)).unwrap();
        let device = match Loop::new(file.path()) {
            Ok(device) => device,
            Err(why) => return println!("skipped: no loop device: {why}"),
        };
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .open(&device.0)
                .unwrap()
        };
        let block = Block::new(open(), false, "loop", engine).unwrap();
        let mut driver = Driver::new(block);
        let queue = driver.start(u64::MAX).remove(0);
        let mut bench = Bench {
            driver,
            queue,
            file: open(),
        };
        assert_eq!(bench.driver.device_config(0), SECTORS.to_le_bytes());
        assert_eq!(bench.driver.device_config(0x14), 4096_u32.to_le_bytes());
        assert_eq!(bench.send(WRITE, 8, &[5; 8192], 0).0, OK);
        assert_eq!(bench.send(READ, 8, &[], 4096), (OK, vec![5; 4096]));
        assert_eq!(bench.send(FLUSH, 0, &[], 0).0, OK);
        assert_eq!(bench.range(WRITE_ZEROES, 8, 8, 0), OK);
        assert_eq!(bench.range(DISCARD, 64, 64, 0), OK);
        assert_eq!(bench.on_disk(4096, 4096), [0; 4096]);
        assert_eq!(bench.on_disk(8192, 4096), [5; 4096]);
        assert_eq!(bench.on_disk(64 * 512, 64 * 512), [0; 64 * 512]);
        assert_eq!(
            bench.on_disk(128 * 512, 4096),
            pattern(BYTES)[128 * 512..][..4096]
        );
    }
}

#[test]
fn takes_only_what_can_be_a_disk() {
    let new = |file: File, read_only| Block::new(file, read_only, "x", Engine::Waiting).err();
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(new(null, true), Some(DiskError::Kind)));
    let file = tempfile::NamedTempFile::new().unwrap();
    let reading = || File::open(file.path()).unwrap();
    assert!(matches!(new(reading(), false), Some(DiskError::ReadOnly)));
    assert!(new(reading(), true).is_none());
}

#[test]
fn the_ring_does_nothing_else() {
    let Engine::Uring(ring) = Engine::new() else {
        panic!("this machine has no io_uring");
    };
    ring.assert_restricted();
}

#[test]
fn a_disk_that_goes_gives_its_ring_back() {
    let spares = Spares::new(1);
    let lent = |engine: &Engine| matches!(engine, Engine::Uring(_));
    // Idle, and while it works.
    for start in [false, true] {
        let engine = spares.take();
        assert!(lent(&engine));
        assert!(!lent(&spares.take()));
        let mut bench = Bench::new(false, engine);
        if start {
            assert_eq!(bench.send(READ, 0, &[], 512).0, OK);
            assert!(bench.driver.function.retire());
        }
        drop(bench);
    }
    // And one that cannot be a disk.
    let directory = File::open("/").unwrap();
    assert!(Block::new(directory, true, "x", spares.take()).is_err());
    let Engine::Uring(ring) = spares.take() else {
        panic!("the ring is gone");
    };
    ring.assert_restricted();
}

#[test]
fn a_reset_does_not_wait_for_a_ring_that_refuses() {
    let file = tempfile().unwrap();
    file.set_len(BYTES as u64).unwrap();
    let engine = Engine::Uring(Box::new(engine::Ring::disabled()));
    let mut block = Block::new(file.try_clone().unwrap(), false, "x", engine).unwrap();
    let memory = test_driver::memory(0x10_0000);
    let mut queue = test_driver::DriverQueue::new(&memory, 0x1000, QUEUE_SIZE, 0);
    let interrupt = test_driver::TestInterrupt::new(1);
    let mut worker = test_driver::activate(&mut block, &memory, &[&queue], 0, &interrupt);
    let guest = memory.memory();
    guest.write_obj(WRITE, GuestAddress(0x8000)).unwrap();
    let data = (0x9000, 512, false);
    guest.write_obj(7_u64, GuestAddress(0x9000)).unwrap();
    queue.add(&[(0x8000, HEADER as u32, false), data, (0xa000, 1, true)]);
    assert!(matches!(
        worker.process(Event::Queue(0)),
        Err(DeviceError::Host { .. })
    ));
    // As the loop does before it gives the worker back.
    worker.quiesce();
    // From here on the kernel would take the request.
    let ring = worker.sources()[0].fd.as_raw_fd();
    const IORING_REGISTER_ENABLE_RINGS: libc::c_long = 12;
    // SAFETY: the call reads no memory.
    let enabled = unsafe {
        let call = libc::SYS_io_uring_register;
        libc::syscall(call, ring, IORING_REGISTER_ENABLE_RINGS, 0, 0)
    };
    assert_eq!(enabled, 0);
    block.reset(worker);
    assert!(block.engine.is_none());
    assert_eq!(file.metadata().unwrap().blocks(), 0);
}

fn any_request() -> impl Strategy<Value = (u32, u64, Vec<(u64, u32, bool)>)> {
    let kind = prop_oneof![
        Just(READ),
        Just(WRITE),
        Just(FLUSH),
        Just(GET_ID),
        Just(DISCARD),
        Just(WRITE_ZEROES),
        any::<u32>()
    ];
    let sector = prop_oneof![4 => 0..SECTORS, 1 => any::<u64>()];
    let len = prop_oneof![
        (0..4_u32).prop_map(|n| n * 512),
        0..2000_u32,
        Just(1),
        Just(16)
    ];
    let buffer = (0x10_0000..0x20_0000_u64, len, any::<bool>());
    (kind, sector, prop::collection::vec(buffer, 0..6))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Any requests, well framed or not: the file keeps its size, and the
    /// device works on or wants a reset.
    #[test]
    fn survives_any_request(
        requests in prop::collection::vec(any_request(), 1..30),
        waiting in any::<bool>(),
    ) {
        let engine = if waiting { Engine::Waiting } else { Engine::new() };
        let mut bench = Bench::new(false, engine);
        for (kind, sector, buffers) in requests {
            let header = bench.header(kind, sector);
            let mut chain = vec![header];
            let (readable, writable): (Vec<_>, Vec<_>) = buffers.into_iter().partition(|b| !b.2);
            chain.extend(readable.into_iter().map(|(at, len, _)| Buffer::readable(at, len)));
            chain.extend(writable.into_iter().map(|(at, len, _)| Buffer::writable(at, len)));
            bench.queue.add(&chain);
            bench.driver.notify(0);
        }
        bench = bench.restart();
        prop_assert_eq!(bench.send(READ, 0, &[], 512).0, OK);
        prop_assert_eq!(bench.file.metadata().unwrap().len(), BYTES as u64);
    }
}
