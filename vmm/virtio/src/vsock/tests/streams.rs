//! Streams as programs see them, against a driver that keeps them as Linux does.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;

use proptest::prelude::*;

use super::*;

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
