use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::connection::BUFFER_BYTES;
use super::packet::*;
use super::*;
use crate::test_driver::{self, DriverQueue, TestInterrupt};
use crate::{DeviceError, GuestMemory};

const CID: u64 = 42;
const FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const RX_BUFFERS: u64 = 0x10_0000;
const RX_STRIDE: u64 = 0x1000;
const TX_BUFFERS: u64 = 0x20_0000;
const TX_STRIDE: u64 = 0x1_1000;

/// A guest that can send any packet.
struct Guest {
    memory: GuestMemory,
    rx: DriverQueue,
    tx: DriverQueue,
    event: DriverQueue,
    worker: Box<dyn Worker>,
    interrupt: Arc<TestInterrupt>,
    rx_len: u32,
    rx_free: Vec<u64>,
    rx_given: BTreeMap<u16, u64>,
    tx_free: Vec<u64>,
    tx_given: BTreeMap<u16, u64>,
}

impl Guest {
    fn new(device: &mut Vsock, features: u64) -> Self {
        let memory = test_driver::memory(8 << 20);
        let rx = DriverQueue::new(&memory, 0x1000, 128, features);
        let tx = DriverQueue::new(&memory, 0x3000, 128, features);
        let event = DriverQueue::new(&memory, 0x5000, 8, features);
        let interrupt = TestInterrupt::new(3);
        let queues = [&rx, &tx, &event];
        let worker = test_driver::activate(device, &memory, &queues, features, &interrupt);
        Self {
            memory,
            rx,
            tx,
            event,
            worker,
            interrupt,
            rx_len: 4096,
            rx_free: (0..128).map(|i| RX_BUFFERS + i * RX_STRIDE).collect(),
            rx_given: BTreeMap::new(),
            tx_free: (0..64).map(|i| TX_BUFFERS + i * TX_STRIDE).collect(),
            tx_given: BTreeMap::new(),
        }
    }

    /// Gives the device receive buffers, `count` at most.
    fn give(&mut self, count: usize) {
        let mut added = 0;
        while usize::from(added) < count
            && self.rx.room() > 0
            && let Some(addr) = self.rx_free.pop()
        {
            let head = self.rx.add(&[(addr, self.rx_len, true)]);
            self.rx_given.insert(head, addr);
            added += 1;
        }
        if added > 0 {
            self.rx.kick(added);
        }
    }

    fn can_send(&mut self) -> bool {
        while let Some((head, _)) = self.tx.used_chain() {
            self.tx_free.push(self.tx_given.remove(&head).unwrap());
        }
        self.tx.room() >= 3 && !self.tx_free.is_empty()
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        assert!(self.can_send());
        let addr = self.tx_free.pop().unwrap();
        let memory = self.memory.memory();
        memory
            .write_slice(&header.to_bytes(), GuestAddress(addr))
            .unwrap();
        memory
            .write_slice(payload, GuestAddress(addr + 44))
            .unwrap();
        // Linux puts header and payload into one buffer, two, or many.
        let half = payload.len() as u32 / 2;
        let rest = payload.len() as u32 - half;
        let head = match payload.len() % 3 {
            0 => self.tx.add(&[(addr, 44 + half + rest, false)]),
            1 => self
                .tx
                .add(&[(addr, 44, false), (addr + 44, half + rest, false)]),
            _ => self.tx.add(&[
                (addr, 44 + half, false),
                (addr + 44 + u64::from(half), rest, false),
            ]),
        };
        self.tx_given.insert(head, addr);
        self.tx.kick(1);
    }

    fn run(&mut self) {
        self.try_run().unwrap();
    }

    fn try_run(&mut self) -> Result<usize, DeviceError> {
        let notify = [&*self.rx.notify, &*self.tx.notify, &*self.event.notify];
        test_driver::run(&mut *self.worker, &notify, 2000)
    }

    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.rx.used_chain()?;
        let addr = self.rx_given.remove(&head).unwrap();
        self.rx_free.push(addr);
        let memory = self.memory.memory();
        let mut packet = vec![0; len as usize];
        memory.read_slice(&mut packet, GuestAddress(addr)).unwrap();
        let payload = packet.split_off(HEADER_BYTES);
        let header = Header::from_bytes(&packet.try_into().unwrap());
        assert_eq!(header.len as usize, payload.len());
        assert_eq!(header.dst_cid, CID);
        Some((header, payload))
    }

    /// Lets the device work and returns all it sends.
    fn exchange(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        loop {
            self.give(128);
            self.run();
            let before = packets.len();
            packets.extend(std::iter::from_fn(|| self.receive()));
            if packets.len() == before {
                return packets;
            }
        }
    }

    /// As [`Guest::exchange`], only the operations.
    fn ops(&mut self) -> Vec<Op> {
        self.exchange()
            .iter()
            .map(|(header, _)| Op::from_wire(header.op).unwrap())
            .collect()
    }
}

fn header(op: Op, guest: u32, host: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        socket_type: TYPE_STREAM,
        op: op as u16,
        buf_alloc: BUFFER_BYTES,
        ..Header::default()
    }
}

fn data(guest: u32, host: u32, payload: &[u8]) -> Header {
    Header {
        len: payload.len() as u32,
        ..header(Op::Data, guest, host)
    }
}

fn shutdown_header(guest: u32, host: u32, flags: u32) -> Header {
    Header {
        flags,
        ..header(Op::Shutdown, guest, host)
    }
}

fn pair() -> (UnixStream, OwnedFd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (ours, theirs.into())
}

/// A guest with one connection, from its port 7 to the host's 1024.
fn connected() -> (Guest, UnixStream) {
    let (host, socket) = pair();
    let mut guest = Guest::new(&mut Vsock::new(CID as u32, vec![(1024, socket)]), FEATURES);
    guest.send(header(Op::Request, 7, 1024), &[]);
    assert_eq!(guest.ops(), [Op::Response]);
    (guest, host)
}

fn read_all(host: &mut UnixStream) -> (Vec<u8>, io::Result<()>) {
    let mut bytes = Vec::new();
    let end = host.read_to_end(&mut bytes).map(|_| ());
    (bytes, end)
}

fn would_block(result: io::Result<()>) -> bool {
    result.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

#[test]
fn tells_its_cid() {
    let device = Vsock::new(0x0102_0304, Vec::new());
    let mut config = [0xff; 10];
    device.read_config(0, &mut config);
    assert_eq!(config, [4, 3, 2, 1, 0, 0, 0, 0, 0, 0]);
    device.read_config(2, &mut config[..2]);
    assert_eq!(config[..2], [2, 1]);
    device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 10]);
}

#[test]
fn a_port_can_be_dialled_once() {
    let (mut guest, _host) = connected();
    guest.send(header(Op::Request, 8, 1024), &[]);
    guest.send(header(Op::Request, 9, 1025), &[]);
    let packets = guest.exchange();
    assert_eq!(packets.len(), 2);
    for ((reply, _), (guest, host)) in packets.iter().zip([(8, 1024), (9, 1025)]) {
        assert_eq!(reply.op, Op::Reset as u16);
        assert_eq!((reply.src_cid, reply.src_port), (HOST_CID, host));
        assert_eq!((reply.dst_cid, reply.dst_port), (CID, guest));
    }
    // The first connection has not noticed.
    guest.send(data(7, 1024, b"hello"), b"hello");
    assert_eq!(guest.ops(), []);
}

#[test]
fn strangers_are_refused() {
    let (mut guest, mut host) = connected();
    let other_host = Header {
        dst_cid: 5,
        ..header(Op::Request, 7, 1024)
    };
    let other_type = Header {
        socket_type: 2,
        ..header(Op::Request, 7, 1024)
    };
    guest.send(other_host, &[]);
    guest.send(other_type, &[]);
    let packets = guest.exchange();
    assert_eq!(packets[0].0, other_host.reset());
    assert_eq!(packets[1].0, other_type.reset());
    assert_eq!(packets.len(), 2);

    // Forged, unknown, and an RST: no answer.
    guest.send(
        Header {
            src_cid: 9,
            ..header(Op::Request, 1, 1)
        },
        &[],
    );
    guest.send(header(Op::Reset, 99, 99), &[]);
    assert_eq!(guest.ops(), []);

    // An operation that does not exist ends the connection.
    guest.send(
        Header {
            op: 77,
            ..header(Op::Data, 7, 1024)
        },
        &[],
    );
    assert_eq!(guest.ops(), [Op::Reset]);
    assert!(read_all(&mut host).1.is_ok());
}

#[test]
fn bytes_go_both_ways_and_each_way_ends_alone() {
    let (mut guest, mut host) = connected();
    guest.send(data(7, 1024, b"from the guest"), b"from the guest");
    host.write_all(b"from the host").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let packets = guest.exchange();
    assert_eq!(packets[0].1, b"from the host");
    assert_eq!(packets[0].0.fwd_cnt, 14);
    assert_eq!(packets[1].0.op, Op::Shutdown as u16);
    assert_eq!(packets[1].0.flags, SHUTDOWN_SEND);
    let (bytes, end) = read_all(&mut host);
    assert_eq!(bytes, b"from the guest");
    assert!(would_block(end));

    // The guest may go on.
    guest.send(data(7, 1024, b"more"), b"more");
    guest.send(shutdown_header(7, 1024, SHUTDOWN_SEND), &[]);
    guest.run();
    let (bytes, end) = read_all(&mut host);
    assert_eq!(bytes, b"more");
    assert!(end.is_ok());

    // Both ways are over; now everybody knows.
    let packets = guest.exchange();
    assert_eq!(packets[0].0.flags, SHUTDOWN_BOTH);
    guest.send(shutdown_header(7, 1024, SHUTDOWN_BOTH), &[]);
    assert_eq!(guest.ops(), [Op::Reset]);
    guest.send(data(7, 1024, b"late"), b"late");
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn the_guest_half_closes_and_reads_on() {
    let (mut guest, mut host) = connected();
    guest.send(shutdown_header(7, 1024, SHUTDOWN_SEND), &[]);
    assert_eq!(guest.ops(), []);
    let (bytes, end) = read_all(&mut host);
    assert!(bytes.is_empty() && end.is_ok());
    host.write_all(b"answer").unwrap();
    assert_eq!(guest.exchange()[0].1, b"answer");
}

#[test]
fn the_host_stops_reading() {
    let (mut guest, mut host) = connected();
    host.shutdown(Shutdown::Read).unwrap();
    guest.send(data(7, 1024, b"unwanted"), b"unwanted");
    let packets = guest.exchange();
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0].0.op, Op::Shutdown as u16);
    assert_eq!(packets[0].0.flags, SHUTDOWN_RECEIVE);
    host.write_all(b"still here").unwrap();
    assert_eq!(guest.exchange()[0].1, b"still here");
}

#[test]
fn the_guest_stops_reading() {
    let (mut guest, mut host) = connected();
    guest.send(shutdown_header(7, 1024, SHUTDOWN_RECEIVE), &[]);
    guest.run();
    assert_eq!(
        host.write(b"unwanted").unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
    guest.send(data(7, 1024, b"still here"), b"still here");
    guest.run();
    assert_eq!(read_all(&mut host).0, b"still here");
}

#[test]
fn the_host_goes_away_without_credit_to_say_so() {
    let (host, socket) = pair();
    let mut guest = Guest::new(&mut Vsock::new(CID as u32, vec![(1024, socket)]), FEATURES);
    let request = Header {
        buf_alloc: 10,
        ..header(Op::Request, 7, 1024)
    };
    guest.send(request, &[]);
    guest.run();
    (&host).write_all(b"0123456789abcdef").unwrap();
    drop(host);
    // Ends, though the socket is hung up and cannot be read.
    let packets = guest.exchange();
    let ops: Vec<_> = packets
        .iter()
        .map(|(h, _)| Op::from_wire(h.op).unwrap())
        .collect();
    assert_eq!(
        ops,
        [Op::Response, Op::Data, Op::CreditRequest, Op::Shutdown]
    );
    assert_eq!(packets[1].1, b"0123456789");
    assert_eq!(packets[3].0.flags, SHUTDOWN_RECEIVE);
    guest.send(
        Header {
            buf_alloc: 10,
            fwd_cnt: 10,
            ..header(Op::CreditUpdate, 7, 1024)
        },
        &[],
    );
    let packets = guest.exchange();
    assert_eq!(packets[0].1, b"abcdef");
    assert_eq!(packets[1].0.flags, SHUTDOWN_BOTH);
    guest.send(header(Op::Reset, 7, 1024), &[]);
    assert_eq!(guest.ops(), []);
}

#[test]
fn asks_for_credit_once() {
    let (mut guest, mut host) = connected();
    let closed = Header {
        buf_alloc: 0,
        ..header(Op::CreditUpdate, 7, 1024)
    };
    guest.send(closed, &[]);
    guest.run();
    host.write_all(b"x").unwrap();
    assert_eq!(guest.ops(), [Op::CreditRequest]);
    guest.send(closed, &[]);
    assert_eq!(guest.ops(), []);
    guest.send(header(Op::CreditUpdate, 7, 1024), &[]);
    assert_eq!(guest.ops(), [Op::Data]);
    guest.send(header(Op::CreditRequest, 7, 1024), &[]);
    assert_eq!(guest.ops(), [Op::CreditUpdate]);
}

#[test]
fn credit_from_nowhere_is_none() {
    let (mut guest, mut host) = connected();
    guest.send(
        Header {
            fwd_cnt: 1,
            buf_alloc: u32::MAX,
            ..header(Op::CreditUpdate, 7, 1024)
        },
        &[],
    );
    host.write_all(b"x").unwrap();
    assert_eq!(guest.ops(), [Op::CreditRequest]);
}

/// Sends until the device holds all that it said it would.
fn fill(guest: &mut Guest, port: u32) -> Vec<u8> {
    let chunk: Vec<u8> = (0..16384u32).map(|i| (i % 251) as u8).collect();
    let mut sent = Vec::new();
    let mut forwarded = 0;
    let mut idle = 0;
    while idle < 2 {
        let room = BUFFER_BYTES as usize - (sent.len() - forwarded as usize);
        let part = &chunk[..chunk.len().min(room)];
        idle += 1;
        if !part.is_empty() {
            guest.send(data(port, 1024, part), part);
            sent.extend_from_slice(part);
            idle = 0;
        }
        for (reply, _) in guest.exchange() {
            assert_eq!(reply.op, Op::CreditUpdate as u16);
            forwarded = reply.fwd_cnt;
        }
    }
    sent
}

#[test]
fn what_the_guest_sent_before_it_closed_arrives() {
    for close in [
        shutdown_header(7, 1024, SHUTDOWN_BOTH),
        header(Op::Reset, 7, 1024),
    ] {
        let (mut guest, mut host) = connected();
        let sent = fill(&mut guest, 7);
        assert!(sent.len() > BUFFER_BYTES as usize);
        guest.send(close, &[]);
        guest.run();
        let mut got = Vec::new();
        loop {
            let (bytes, end) = read_all(&mut host);
            got.extend(bytes);
            guest.run();
            if end.is_ok() {
                break;
            }
            assert!(got.len() < sent.len());
        }
        assert!(got == sent);
        assert!(guest.worker.sources().is_empty());
    }
}

#[test]
fn overrunning_the_credit_ends_the_connection_but_not_others() {
    let (host, socket) = pair();
    let (mut other, other_socket) = pair();
    let ports = vec![(1024, socket), (1025, other_socket)];
    let mut guest = Guest::new(&mut Vsock::new(CID as u32, ports), FEATURES);
    guest.send(header(Op::Request, 7, 1024), &[]);
    guest.send(header(Op::Request, 7, 1025), &[]);
    assert_eq!(guest.ops(), [Op::Response, Op::Response]);
    fill(&mut guest, 7);

    // The stalled stream is full; the other one works.
    guest.send(data(7, 1025, b"hello"), b"hello");
    other.write_all(b"you").unwrap();
    assert_eq!(guest.exchange()[0].1, b"you");
    assert_eq!(read_all(&mut other).0, b"hello");

    // Some of it has gone on since the device last spoke of its credit.
    let excess = [0; 65536];
    let mut sent = 0;
    while guest.ops().is_empty() {
        assert!(sent < BUFFER_BYTES);
        guest.send(data(7, 1024, &excess), &excess);
        sent += excess.len() as u32;
    }
    drop(host);
    guest.run();
    guest.send(data(7, 1025, b"hello"), b"hello");
    guest.run();
    assert_eq!(read_all(&mut other).0, b"hello");
}

#[test]
fn bytes_the_guest_never_read_are_no_error_for_the_host() {
    let (mut guest, mut host) = connected();
    guest.send(
        Header {
            buf_alloc: 0,
            ..data(7, 1024, b"bye")
        },
        b"bye",
    );
    guest.run();
    host.write_all(b"never read").unwrap();
    guest.run();
    guest.send(shutdown_header(7, 1024, SHUTDOWN_BOTH), &[]);
    guest.run();
    let (bytes, end) = read_all(&mut host);
    assert_eq!(bytes, b"bye");
    assert!(end.is_ok());
}

#[test]
fn a_payload_longer_than_its_packet_ends_the_connection() {
    for len in [6, 65537, u32::MAX, u32::MAX - 43] {
        let (mut guest, _host) = connected();
        guest.send(
            Header {
                len,
                ..data(7, 1024, b"short")
            },
            b"short",
        );
        assert_eq!(guest.ops(), [Op::Reset], "{len}");
    }
}

#[test]
fn ports_can_be_added_any_time_and_outlast_a_reset() {
    let mut device = Vsock::new(CID as u32, Vec::new());
    let (_host, first) = pair();
    VirtioDevice::control(&mut device, Box::new(AddHostPorts(vec![(1, first)])));
    let mut guest = Guest::new(&mut device, FEATURES);
    let (_host, second) = pair();
    let (_host, third) = pair();
    guest
        .worker
        .control(Box::new(AddHostPorts(vec![(2, second), (3, third)])));
    for port in [1, 2] {
        guest.send(header(Op::Request, port, port), &[]);
        assert_eq!(guest.ops(), [Op::Response]);
    }
    device.reset(guest.worker);
    let mut guest = Guest::new(&mut device, FEATURES);
    for (port, op) in [(1, Op::Reset), (2, Op::Reset), (3, Op::Response)] {
        guest.send(header(Op::Request, port, port), &[]);
        assert_eq!(guest.ops(), [op], "port {port}");
    }
}

#[test]
fn a_reset_ends_connections() {
    let mut device = Vsock::new(CID as u32, Vec::new());
    let (guest, mut host) = connected();
    device.reset(guest.worker);
    assert!(read_all(&mut host).1.is_ok());
}

#[test]
fn refusals_without_buffers_are_bounded() {
    let mut guest = Guest::new(&mut Vsock::new(CID as u32, Vec::new()), FEATURES);
    for _ in 0..100 {
        while guest.can_send() {
            guest.send(header(Op::Request, 1, 1), &[]);
        }
        guest.run();
    }
    let replies = guest.ops().len();
    assert!((1..=256).contains(&replies), "{replies}");
}

#[test]
fn works_without_event_indices() {
    let (mut host, socket) = pair();
    let mut guest = Guest::new(&mut Vsock::new(CID as u32, vec![(1024, socket)]), 0);
    guest.send(header(Op::Request, 7, 1024), &[]);
    guest.send(data(7, 1024, b"ping"), b"ping");
    host.write_all(b"pong").unwrap();
    let packets = guest.exchange();
    assert_eq!(packets[1].1, b"pong");
    assert_eq!(read_all(&mut host).0, b"ping");
    assert!(guest.interrupt.queues[0].read().unwrap() > 0);
    assert!(guest.interrupt.queues[1].read().unwrap() > 0);
}

#[test]
fn short_buffers_and_packets_are_an_error() {
    for len in [0, 43, 44] {
        let (_host, socket) = pair();
        let mut guest = Guest::new(&mut Vsock::new(CID as u32, vec![(1024, socket)]), FEATURES);
        guest.rx_len = len;
        guest.give(1);
        guest.send(header(Op::Request, 7, 1024), &[]);
        assert!(matches!(
            guest.try_run(),
            Err(DeviceError::Chain { queue: RX, .. })
        ));
    }

    let (mut guest, _host) = connected();
    guest.tx.add(&[(TX_BUFFERS, 43, false)]);
    guest.tx.kick(1);
    assert!(matches!(
        guest.try_run(),
        Err(DeviceError::Chain { queue: TX, .. })
    ));
}

// Streams, as Linux has them.

const STREAMS: usize = 3;

/// The guest's end of a stream.
struct Stream {
    port: u32,
    buf_alloc: u32,
    connected: bool,
    /// Received and not yet read by the program.
    received: VecDeque<u8>,
    read: u32,
    told_read: u32,
    /// The device asked for credit.
    asked: bool,
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    peer_shutdown: u32,
    shutdown: u32,
    /// All bytes so far, to be compared at the end.
    bytes_sent: Vec<u8>,
    bytes_read: Vec<u8>,
}

impl Stream {
    fn header(&mut self, op: Op) -> Header {
        self.told_read = self.read;
        self.asked = false;
        Header {
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.read,
            ..header(op, self.port, self.port)
        }
    }

    fn on_packet(&mut self, header: &Header, payload: &[u8]) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        assert!(self.sent.wrapping_sub(header.fwd_cnt) <= header.buf_alloc);
        match Op::from_wire(header.op).unwrap() {
            Op::Response => self.connected = true,
            Op::Data => {
                assert!(self.connected && self.peer_shutdown & SHUTDOWN_SEND == 0);
                assert!(!payload.is_empty());
                self.received.extend(payload);
                assert!(self.received.len() <= self.buf_alloc as usize);
            }
            Op::Shutdown => self.peer_shutdown |= header.flags,
            Op::CreditUpdate => {}
            Op::CreditRequest => self.asked = true,
            op => panic!("{op:?}"),
        }
    }

    fn room(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight) as usize
    }
}

/// The host's end of a stream.
struct HostEnd {
    socket: UnixStream,
    written: Vec<u8>,
    got: Vec<u8>,
    closed: bool,
    ended: bool,
}

impl HostEnd {
    fn read(&mut self, most: usize) -> usize {
        let mut bytes = vec![0; most];
        match self.socket.read(&mut bytes) {
            Ok(0) => {
                self.ended |= most > 0;
                0
            }
            Ok(count) => {
                self.got.extend(&bytes[..count]);
                count
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                0
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    GuestSend(usize, usize),
    GuestRead(usize, usize),
    GuestShutdown(usize),
    HostWrite(usize, usize),
    HostRead(usize, usize),
    HostShutdown(usize),
    Give(usize),
    Run,
    Handle,
}

fn step() -> impl Strategy<Value = Step> {
    let stream = 0..STREAMS;
    let size = prop_oneof![1usize..200, 1usize..70_000, Just(300_000)];
    prop_oneof![
        6 => (stream.clone(), size.clone()).prop_map(|(s, n)| Step::GuestSend(s, n)),
        4 => (stream.clone(), size.clone()).prop_map(|(s, n)| Step::GuestRead(s, n)),
        1 => stream.clone().prop_map(Step::GuestShutdown),
        6 => (stream.clone(), size.clone()).prop_map(|(s, n)| Step::HostWrite(s, n)),
        4 => (stream.clone(), size).prop_map(|(s, n)| Step::HostRead(s, n)),
        1 => stream.prop_map(Step::HostShutdown),
        4 => (0usize..40).prop_map(Step::Give),
        8 => Just(Step::Run),
        8 => Just(Step::Handle),
    ]
}

struct World {
    guest: Guest,
    streams: Vec<Stream>,
    hosts: Vec<HostEnd>,
}

/// The bytes of a stream: wrong in any other place, and in another stream.
fn patterned(stream: usize, from: usize, len: usize) -> Vec<u8> {
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let byte = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
        (0..1_000_003).map(|i| byte(i * i)).collect()
    });
    let at = (stream * 100_000 + from) % table.len();
    table[at..]
        .iter()
        .chain(table.iter().cycle())
        .take(len)
        .copied()
        .collect()
}

impl World {
    fn new(rx_len: u32, buf_alloc: u32, features: u64) -> Self {
        let mut hosts = Vec::new();
        let mut ports = Vec::new();
        for port in 0..STREAMS as u32 {
            let (socket, theirs) = pair();
            ports.push((port, theirs));
            hosts.push(HostEnd {
                socket,
                written: Vec::new(),
                got: Vec::new(),
                closed: false,
                ended: false,
            });
        }
        let mut guest = Guest::new(&mut Vsock::new(CID as u32, ports), features);
        guest.rx_len = rx_len;
        let mut streams = Vec::new();
        for port in 0..STREAMS as u32 {
            let mut stream = Stream {
                port,
                buf_alloc,
                connected: false,
                received: VecDeque::new(),
                read: 0,
                told_read: 0,
                asked: false,
                sent: 0,
                peer_buf_alloc: 0,
                peer_fwd_cnt: 0,
                peer_shutdown: 0,
                shutdown: 0,
                bytes_sent: Vec::new(),
                bytes_read: Vec::new(),
            };
            guest.send(stream.header(Op::Request), &[]);
            streams.push(stream);
        }
        Self {
            guest,
            streams,
            hosts,
        }
    }

    fn guest_send(&mut self, index: usize, len: usize) -> bool {
        if !self.guest.can_send() {
            return false;
        }
        let stream = &mut self.streams[index];
        let len = len.min(stream.room()).min(65536);
        if !stream.connected || len == 0 || stream.shutdown & SHUTDOWN_SEND != 0 {
            return false;
        }
        let bytes = patterned(index, stream.bytes_sent.len(), len);
        let header = Header {
            len: len as u32,
            ..stream.header(Op::Data)
        };
        stream.sent = stream.sent.wrapping_add(len as u32);
        stream.bytes_sent.extend(&bytes);
        self.guest.send(header, &bytes);
        true
    }

    fn guest_read(&mut self, index: usize, len: usize) -> usize {
        let stream = &mut self.streams[index];
        let len = len.min(stream.received.len());
        stream.bytes_read.extend(stream.received.drain(..len));
        stream.read = stream.read.wrapping_add(len as u32);
        // As Linux: tells when the sender sees little room.
        let untold = stream.read.wrapping_sub(stream.told_read);
        let seen = stream.buf_alloc - stream.received.len() as u32 - untold;
        if (untold > 0 && seen < 65536 || stream.asked) && self.guest.can_send() {
            let header = stream.header(Op::CreditUpdate);
            self.guest.send(header, &[]);
        }
        len
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::GuestSend(s, n) => {
                self.guest_send(s, n);
            }
            Step::GuestRead(s, n) => {
                self.guest_read(s, n);
            }
            Step::GuestShutdown(s) => {
                let stream = &mut self.streams[s];
                if stream.connected && stream.shutdown == 0 && self.guest.can_send() {
                    stream.shutdown = SHUTDOWN_SEND;
                    let header = Header {
                        flags: SHUTDOWN_SEND,
                        ..stream.header(Op::Shutdown)
                    };
                    self.guest.send(header, &[]);
                }
            }
            Step::HostWrite(s, n) => {
                let host = &mut self.hosts[s];
                if !host.closed {
                    let bytes = patterned(s + STREAMS, host.written.len(), n);
                    if let Ok(count) = host.socket.write(&bytes) {
                        host.written.extend(&bytes[..count]);
                    }
                }
            }
            Step::HostRead(s, n) => {
                self.hosts[s].read(n);
            }
            Step::HostShutdown(s) => {
                self.hosts[s].closed = true;
                let _ = self.hosts[s].socket.shutdown(Shutdown::Write);
            }
            Step::Give(n) => self.guest.give(n),
            Step::Run => self.guest.run(),
            Step::Handle => {
                self.handle();
            }
        }
    }

    fn handle(&mut self) -> bool {
        let mut any = false;
        while let Some((header, payload)) = self.guest.receive() {
            any = true;
            self.streams[header.dst_port as usize].on_packet(&header, &payload);
        }
        any
    }

    /// Everybody reads all there is.
    fn finish(&mut self) {
        loop {
            let mut busy = false;
            self.guest.give(128);
            self.guest.run();
            busy |= self.handle();
            for index in 0..STREAMS {
                busy |= self.guest_read(index, usize::MAX) > 0;
                busy |= self.hosts[index].read(1 << 20) > 0;
            }
            if !busy {
                return;
            }
        }
    }

    fn check(&self) {
        for (stream, host) in self.streams.iter().zip(&self.hosts) {
            assert!(stream.connected);
            assert!(stream.bytes_sent == host.got, "guest to host");
            assert!(host.written == stream.bytes_read, "host to guest");
            assert_eq!(host.ended, stream.shutdown & SHUTDOWN_SEND != 0);
            assert_eq!(host.closed, stream.peer_shutdown & SHUTDOWN_SEND != 0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_or_reordered(
        steps in prop::collection::vec(step(), 0..120),
        rx_len in prop_oneof![4 => Just(4096), 1 => 300u32..4096],
        buf_alloc in prop_oneof![4 => Just(BUFFER_BYTES), 1 => 500u32..5000],
        event_idx in any::<bool>(),
    ) {
        let features = if event_idx { FEATURES } else { 0 };
        let mut world = World::new(rx_len, buf_alloc, features);
        for step in steps {
            world.take(step);
        }
        world.finish();
        world.check();
    }

    #[test]
    fn garbage_does_no_harm(
        packets in prop::collection::vec(
            (
                prop_oneof![Just(CID), any::<u64>()],
                prop_oneof![Just(HOST_CID), any::<u64>()],
                0u32..3,
                0u32..3,
                prop_oneof![0u32..100, any::<u32>()],
                prop_oneof![9 => Just(TYPE_STREAM), 1 => any::<u16>()],
                prop_oneof![9 => 0u16..9, 1 => any::<u16>()],
                any::<u32>(),
                any::<u32>(),
                any::<u32>(),
            ),
            0..100,
        ),
    ) {
        let mut world = World::new(4096, BUFFER_BYTES, FEATURES);
        for (i, packet) in packets.into_iter().enumerate() {
            let (src_cid, dst_cid, src_port, dst_port, len, socket_type, op, flags, buf_alloc, fwd_cnt) =
                packet;
            let header = Header {
                src_cid, dst_cid, src_port, dst_port, len, socket_type, op, flags, buf_alloc, fwd_cnt,
            };
            world.guest.send(header, &[0; 100]);
            let _ = world.hosts[i % STREAMS].socket.write(&[0; 1000]);
            world.guest.give(128);
            world.guest.run();
            while world.guest.receive().is_some() {}
        }
    }

    #[test]
    fn garbage_rings_do_no_harm(
        descriptors in prop::collection::vec(
            (
                prop_oneof![Just(TX_BUFFERS), 0u64..0x80_0000, any::<u64>()],
                prop_oneof![0u32..5000, any::<u32>()],
                0u16..8,
                0u16..130,
            ),
            128,
        ),
        heads in prop::collection::vec((any::<bool>(), 0u16..130), 0..100),
    ) {
        let mut world = World::new(4096, BUFFER_BYTES, FEATURES);
        world.guest.run();
        for (i, (addr, len, flags, next)) in descriptors.into_iter().enumerate() {
            world.guest.tx.write_descriptor(i as u16, addr, len, flags, next);
            world.guest.rx.write_descriptor(i as u16, addr, len, flags, next);
        }
        for (tx, head) in heads {
            let queue = if tx { &mut world.guest.tx } else { &mut world.guest.rx };
            queue.offer(head);
            queue.notify.write(1).unwrap();
            let _ = world.hosts[0].socket.write(&[0; 1000]);
            if world.guest.try_run().is_err() {
                break;
            }
        }
    }
}
