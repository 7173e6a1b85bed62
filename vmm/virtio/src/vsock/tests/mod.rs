mod bulk;
mod packets;
mod streams;

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

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

/// A driver that can send any packet.
struct Driver {
    memory: GuestMemory,
    rx: DriverQueue,
    tx: DriverQueue,
    event: DriverQueue,
    interrupt: Arc<TestInterrupt>,
    rx_len: u32,
    rx_free: Vec<u64>,
    rx_given: BTreeMap<u16, u64>,
    tx_free: Vec<u64>,
    tx_given: BTreeMap<u16, u64>,
}

impl Driver {
    fn new(features: u64) -> Self {
        let memory = test_driver::memory(8 << 20);
        Self {
            rx: DriverQueue::new(&memory, 0x1000, 128, features),
            tx: DriverQueue::new(&memory, 0x3000, 128, features),
            event: DriverQueue::new(&memory, 0x5000, 8, features),
            memory,
            interrupt: TestInterrupt::new(3),
            rx_len: 4096,
            rx_free: (0..128).map(|i| RX_BUFFERS + i * RX_STRIDE).collect(),
            rx_given: BTreeMap::new(),
            tx_free: (0..64).map(|i| TX_BUFFERS + i * TX_STRIDE).collect(),
            tx_given: BTreeMap::new(),
        }
    }

    fn activate(&self, device: &mut Vsock, features: u64) -> Box<dyn Worker> {
        let queues = [&self.rx, &self.tx, &self.event];
        test_driver::activate(device, &self.memory, &queues, features, &self.interrupt)
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
}

/// A driver and the device, which works when it is told to.
struct Guest {
    driver: Driver,
    worker: Box<dyn Worker>,
}

impl Deref for Guest {
    type Target = Driver;

    fn deref(&self) -> &Driver {
        &self.driver
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Driver {
        &mut self.driver
    }
}

impl Guest {
    fn new(device: &mut Vsock, features: u64) -> Self {
        let driver = Driver::new(features);
        let worker = driver.activate(device, features);
        Self { driver, worker }
    }

    fn run(&mut self) {
        self.try_run().unwrap();
    }

    fn try_run(&mut self) -> Result<usize, DeviceError> {
        let Driver { rx, tx, event, .. } = &self.driver;
        let notify = [&*rx.notify, &*tx.notify, &*event.notify];
        test_driver::run(&mut *self.worker, &notify, 2000)
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

/// The bytes of a stream: wrong in any other place, and in another stream.
fn patterned(stream: usize, from: usize, len: usize) -> Vec<u8> {
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let byte = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
        (0..1_000_003).map(|i| byte(i * i)).collect()
    });
    let mut at = (stream * 100_000 + from) % table.len();
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let part = &table[at..table.len().min(at + len - bytes.len())];
        bytes.extend_from_slice(part);
        at = (at + part.len()) % table.len();
    }
    bytes
}
