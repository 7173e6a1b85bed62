//! What each packet does.

use std::io::{self, Read, Write};
use std::net::Shutdown;

use super::*;

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
fn connections_take_turns() {
    let (mut many, many_socket) = pair();
    let (mut one, one_socket) = pair();
    let ports = vec![(1024, many_socket), (1025, one_socket)];
    let mut guest = Guest::new(&mut Vsock::new(CID as u32, ports), FEATURES);
    guest.send(header(Op::Request, 7, 1024), &[]);
    guest.send(header(Op::Request, 7, 1025), &[]);
    guest.give(2);
    guest.run();
    while guest.receive().is_some() {}
    many.write_all(&[0; 100_000]).unwrap();
    guest.run();
    one.write_all(b"me too").unwrap();
    guest.run();
    guest.give(2);
    guest.run();
    let first = guest.receive().unwrap();
    let second = guest.receive().unwrap();
    assert_eq!((first.0.src_port, second.0.src_port), (1024, 1025));
    assert_eq!(second.1, b"me too");
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
    host.write_all(&[0; 20_000]).unwrap();
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
fn ports_can_be_taken_back_until_they_are_dialled() {
    let mut device = Vsock::new(CID as u32, Vec::new());
    let (mut hosts, ports): (Vec<_>, Vec<_>) = (1..=3)
        .map(|port| {
            let (host, far) = pair();
            (host, (port, far))
        })
        .unzip();
    VirtioDevice::control(&mut device, Box::new(AddHostPorts(ports)));
    VirtioDevice::control(&mut device, Box::new(RemoveHostPorts(vec![1, 7])));
    let mut guest = Guest::new(&mut device, FEATURES);
    guest.send(header(Op::Request, 2, 2), &[]);
    assert_eq!(guest.ops(), [Op::Response]);
    guest.worker.control(Box::new(RemoveHostPorts(vec![2, 3])));
    for port in [1, 3] {
        guest.send(header(Op::Request, port, port), &[]);
        assert_eq!(guest.ops(), [Op::Reset], "port {port}");
    }
    assert!(read_all(&mut hosts[2]).1.is_ok());
    // The one that was dialled goes on.
    guest.send(header(Op::Data, 2, 2), &[]);
    assert_eq!(guest.ops(), []);
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

#[test]
fn a_restored_device_has_the_driver_end_its_connections() {
    const EVENTS: u64 = 0x7000;
    let prepare = |guest: &mut Guest| {
        let memory = guest.driver.memory.memory();
        memory
            .write_slice(&[0xff; 8], GuestAddress(EVENTS))
            .unwrap();
        guest.event.add(&[(EVENTS, 8, true)]);
        guest.event.kick(1);
    };
    let mut new = Vsock::new(CID as u32, Vec::new());
    let mut guest = Guest::new(&mut new, FEATURES);
    prepare(&mut guest);
    guest.run();
    assert_eq!(guest.event.used_chain(), None, "nothing has gone");

    let (_stream, socket) = pair();
    let mut device = Vsock::new(CID as u32, vec![(1024, socket)]);
    device.restored();
    let mut guest = Guest::new(&mut device, FEATURES);
    // Before the driver has room for the event, and after.
    guest.run();
    prepare(&mut guest);
    guest.run();
    let (_, length) = guest.event.used_chain().unwrap();
    assert_eq!(length, 4);
    let mut event = [0; 8];
    let memory = guest.driver.memory.memory();
    memory.read_slice(&mut event, GuestAddress(EVENTS)).unwrap();
    assert_eq!(event, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);

    // Once. A connection from before is not known, and new ones are made.
    prepare(&mut guest);
    guest.send(data(7, 1024, b"old"), b"old");
    assert_eq!(guest.ops(), [Op::Reset]);
    guest.send(header(Op::Request, 8, 1024), &[]);
    assert_eq!(guest.ops(), [Op::Response]);
    assert_eq!(guest.event.used_chain(), None);
}
