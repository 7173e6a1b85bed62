//! Two kernels' worth of TCP over two real taps: what arrives on one interface
//! leaves on the other. Needs root for its network namespaces.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;

const BYTES: usize = 16 << 20;

/// A network namespace with a tap in it, and a thread in the namespace that runs
/// `program` once it is told that there is a network.
fn namespace<T: Send + 'static>(
    address: &'static str,
    program: impl FnOnce() -> T + Send + 'static,
) -> (OwnedFd, mpsc::Sender<()>, JoinHandle<T>) {
    let (give_tap, tap) = mpsc::channel();
    let (ready, wait) = mpsc::channel();
    let thread = thread::spawn(move || {
        // SAFETY: only this thread changes its network namespace.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        let tap = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        // `struct ifreq`: a name and flags, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR.
        let mut request = [0u8; 40];
        request[..4].copy_from_slice(b"tap0");
        request[16..18].copy_from_slice(&0x5002u16.to_le_bytes());
        // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which is that long.
        let result = unsafe { libc::ioctl(tap.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        for arguments in [
            &["addr", "add", address, "dev", "tap0"][..],
            &["link", "set", "tap0", "up"],
        ] {
            assert!(
                Command::new("ip")
                    .args(arguments)
                    .status()
                    .unwrap()
                    .success()
            );
        }
        give_tap.send(tap.into()).unwrap();
        wait.recv().unwrap();
        program()
    });
    (tap.recv().unwrap(), ready, thread)
}

fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from / 8..(from + len) / 8)
        .flat_map(|word| {
            (word as u64)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_le_bytes()
        })
        .collect()
}

/// Sends and checks at the same time.
fn exchange(stream: TcpStream) {
    let mut sender = stream.try_clone().unwrap();
    let send = thread::spawn(move || {
        for at in (0..BYTES).step_by(1 << 20) {
            sender.write_all(&pattern(at, 1 << 20)).unwrap();
        }
        sender.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut stream = stream;
    let mut chunk = vec![0; 1 << 20];
    for at in (0..BYTES).step_by(1 << 20) {
        stream.read_exact(&mut chunk).unwrap();
        assert!(chunk == pattern(at, 1 << 20), "at {at}");
    }
    assert_eq!(stream.read(&mut chunk).unwrap(), 0);
    send.join().unwrap();
}

struct Side {
    driver: Driver,
    worker: Box<dyn Worker>,
    longest: usize,
    unchecked: usize,
}

impl Side {
    fn new(tap: OwnedFd, features: u64) -> Self {
        let mut device = Net::new(tap, MAC, 1500).unwrap();
        assert_ne!(device.offered_features() & UDP_FEATURES, 0);
        let features = device.offered_features() & features;
        let driver = Driver::new(features);
        let worker = driver.activate(&mut device, features);
        Self {
            driver,
            worker,
            longest: 0,
            unchecked: 0,
        }
    }

    /// What arrives here leaves there.
    fn forward(&mut self, other: &mut Self) -> bool {
        self.driver.give(256, 2048);
        let Driver { rx, tx, .. } = &self.driver;
        let events =
            test_driver::run(&mut *self.worker, &[&rx.notify, &tx.notify], 100_000).unwrap();
        while other.driver.can_send()
            && let Some((frame, _)) = self.driver.receive()
        {
            self.longest = self.longest.max(frame.len());
            self.unchecked += usize::from(frame[0] & 1);
            other.driver.send(&frame);
        }
        events > 0
    }
}

/// What these tests need, or a word about its absence.
fn may_make_taps() -> bool {
    // SAFETY: cannot fail and touches nothing.
    let root = unsafe { libc::geteuid() } == 0;
    let may = root && File::open("/dev/net/tun").is_ok();
    if !may {
        eprintln!("skipped: needs root and /dev/net/tun");
    }
    may
}

/// Returns the longest frame either side saw, and how many had no checksum yet.
fn run_tcp(features: u64) -> Option<(usize, usize)> {
    if !may_make_taps() {
        return None;
    }
    let (first_tap, listening, server) = namespace("10.9.0.1/24", || {
        let listener = TcpListener::bind("10.9.0.1:5001").unwrap();
        exchange(listener.accept().unwrap().0);
    });
    let (second_tap, go, client) = namespace("10.9.0.2/24", || {
        let mut tries = 0;
        let stream = loop {
            match TcpStream::connect("10.9.0.1:5001") {
                Ok(stream) => break stream,
                Err(error) if tries == 50 => panic!("{error}"),
                Err(_) => tries += 1,
            }
            thread::sleep(Duration::from_millis(20));
        };
        exchange(stream);
    });
    let done = Arc::new(AtomicBool::new(false));
    let wire = thread::spawn({
        let done = Arc::clone(&done);
        move || {
            let mut first = Side::new(first_tap, features);
            let mut second = Side::new(second_tap, features);
            while !done.load(Ordering::Relaxed) {
                let busy = first.forward(&mut second) | second.forward(&mut first);
                if !busy {
                    thread::sleep(Duration::from_micros(50));
                }
            }
            (
                first.longest.max(second.longest),
                first.unchecked + second.unchecked,
            )
        }
    });
    listening.send(()).unwrap();
    go.send(()).unwrap();
    client.join().unwrap();
    server.join().unwrap();
    done.store(true, Ordering::Relaxed);
    Some(wire.join().unwrap())
}

#[test]
fn tcp_in_large_frames() {
    if let Some((longest, unchecked)) = run_tcp(u64::MAX) {
        assert!(longest > 30_000, "{longest}");
        assert!(unchecked > 100);
    }
}

#[test]
fn tcp_in_checked_frames_of_the_mtu() {
    if let Some((longest, unchecked)) = run_tcp(EVENT_IDX) {
        assert_eq!(longest, 12 + 14 + 1500);
        assert_eq!(unchecked, 0);
    }
}

#[test]
fn every_choice_of_offloads_is_accepted() {
    if !may_make_taps() {
        return;
    }
    let (tap, done, thread) = namespace("10.9.0.1/24", || ());
    let tap = Tap::new(tap).unwrap();
    let bits: Vec<u64> = (0..64)
        .map(|bit| 1 << bit)
        .filter(|bit| GUEST_OFFLOADS & bit != 0)
        .collect();
    for choice in 0..1u32 << bits.len() {
        let chosen = bits
            .iter()
            .enumerate()
            .filter(|(i, _)| choice & 1 << i != 0);
        let offloads = chosen.fold(0, |offloads, (_, bit)| offloads | bit);
        assert!(
            tap.set_flags(tap::tun_flags(offloads)).is_ok(),
            "{offloads:#x}"
        );
    }
    done.send(()).unwrap();
    thread.join().unwrap();
}

#[test]
fn a_frame_that_the_tap_drops_does_not_end_reception() {
    if !may_make_taps() {
        return;
    }
    let (tap, go, thread) = namespace("10.9.0.1/24", || {
        let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
        socket.set_broadcast(true).unwrap();
        socket.connect("10.9.0.255:9").unwrap();
        socket
    });
    go.send(()).unwrap();
    // It stays in the namespace.
    let socket = thread.join().unwrap();
    let handle = tap.try_clone().unwrap();
    let mut side = Side::new(tap, EVENT_IDX);
    side.driver.give(100, 2048);
    // A header that no buffer holds fails as one that cannot be made does.
    for (header_bytes, arrives) in [(1 << 20, false), (HEADER_BYTES as libc::c_int, true)] {
        let address = &raw const header_bytes;
        // SAFETY: TUNSETVNETHDRSZ reads an int from the address, which is that of one.
        let result = unsafe { libc::ioctl(handle.as_raw_fd(), 0x4004_54d8, address) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        socket.send(b"husk").unwrap();
        let Driver { rx, tx, .. } = &side.driver;
        test_driver::run(&mut *side.worker, &[&rx.notify, &tx.notify], 1000).unwrap();
        let mut frames = std::iter::from_fn(|| side.driver.receive());
        assert_eq!(frames.any(|(frame, _)| frame.ends_with(b"husk")), arrives);
    }
}

#[test]
fn an_interface_that_is_deleted_is_left_alone() {
    if !may_make_taps() {
        return;
    }
    let (tap, go, thread) = namespace("10.9.0.1/24", || {
        let arguments = ["link", "delete", "tap0"];
        assert!(
            Command::new("ip")
                .args(arguments)
                .status()
                .unwrap()
                .success()
        );
    });
    let mut side = Side::new(tap, EVENT_IDX);
    side.driver.give(10, 2048);
    let Driver { rx, tx, .. } = &side.driver;
    test_driver::run(&mut *side.worker, &[&rx.notify, &tx.notify], 1000).unwrap();
    assert_eq!(side.worker.sources().len(), 1);
    go.send(()).unwrap();
    thread.join().unwrap();
    side.driver.send(&frame(1, 100));
    let Driver { rx, tx, .. } = &side.driver;
    test_driver::run(&mut *side.worker, &[&rx.notify, &tx.notify], 1000).unwrap();
    assert!(side.worker.sources().is_empty());
}
