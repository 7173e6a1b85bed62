mod frames;
mod limit;
mod real_tap;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use rustix::net::{AddressFamily, SocketFlags, SocketType, recv, send, socketpair};
use rustix::net::{RecvFlags, SendFlags};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::test_driver::{self, DriverQueue, TestInterrupt};
use crate::{DeviceError, GuestMemory};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x200_0000;
const STRIDE: u64 = 0x1_1000;
const MEMORY_BYTES: usize = 0x800_0000;

/// A driver of a network interface.
struct Driver {
    memory: GuestMemory,
    rx: DriverQueue,
    tx: DriverQueue,
    control: DriverQueue,
    interrupt: Arc<TestInterrupt>,
    rx_free: Vec<u64>,
    rx_given: BTreeMap<u16, u64>,
    tx_free: Vec<u64>,
    tx_given: BTreeMap<u16, u64>,
}

impl Driver {
    fn new(features: u64) -> Self {
        let memory = test_driver::memory(MEMORY_BYTES);
        Self {
            rx: DriverQueue::new(&memory, 0x1000, 256, features),
            tx: DriverQueue::new(&memory, 0x4000, 256, features),
            control: DriverQueue::new(&memory, 0x8000, 16, features),
            memory,
            interrupt: TestInterrupt::new(3),
            rx_free: (0..256).map(|i| RX_BUFFERS + i * STRIDE).collect(),
            rx_given: BTreeMap::new(),
            tx_free: (0..128).map(|i| TX_BUFFERS + i * STRIDE).collect(),
            tx_given: BTreeMap::new(),
        }
    }

    fn activate(&self, device: &mut Net, features: u64) -> Box<dyn Worker> {
        let queues = [&self.rx, &self.tx, &self.control];
        test_driver::activate(device, &self.memory, &queues, features, &self.interrupt)
    }

    /// Gives `count` receive buffers of `len` bytes.
    fn give(&mut self, count: usize, len: u32) {
        let mut added = 0;
        for _ in 0..count {
            let Some(addr) = self.rx_free.pop() else {
                break;
            };
            let head = self.rx.add(&[(addr, len, true)]);
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
        !self.tx_free.is_empty()
    }

    /// Sends a frame, header included.
    fn send(&mut self, frame: &[u8]) {
        assert!(self.can_send());
        let addr = self.tx_free.pop().unwrap();
        let memory = self.memory.memory();
        memory.write_slice(frame, GuestAddress(addr)).unwrap();
        let len = frame.len() as u32;
        let head = match frame.len() % 2 {
            0 => self.tx.add(&[(addr, len, false)]),
            _ => self
                .tx
                .add(&[(addr, 12, false), (addr + 12, len - 12, false)]),
        };
        self.tx_given.insert(head, addr);
        self.tx.kick(1);
    }

    /// A received frame, header included, and how many buffers it took.
    fn receive(&mut self) -> Option<(Vec<u8>, usize)> {
        let memory = self.memory.memory();
        let mut frame = Vec::new();
        let mut buffers = 0;
        loop {
            let Some((head, len)) = self.rx.used_chain() else {
                assert_eq!(buffers, 0, "a part of a frame");
                return None;
            };
            let addr = self.rx_given.remove(&head).unwrap();
            self.rx_free.push(addr);
            let at = frame.len();
            frame.resize(at + len as usize, 0);
            memory
                .read_slice(&mut frame[at..], GuestAddress(addr))
                .unwrap();
            buffers += 1;
            if buffers == usize::from(u16::from_le_bytes([frame[10], frame[11]])) {
                return Some((frame, buffers));
            }
        }
    }
}

/// A driver and the device on a socket, which works when it is told to.
struct Guest {
    driver: Driver,
    device: Net,
    worker: Option<Box<dyn Worker>>,
    /// The wire behind the stand-in for a tap.
    wire: OwnedFd,
    /// What the tap was last told of offloads.
    offloads: Arc<AtomicU32>,
    features: u64,
}

impl Guest {
    fn new(features: u64) -> Self {
        let (wire, tap) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        let tap = Tap::stand_in(tap);
        let offloads = Arc::clone(tap.stand_in.as_ref().unwrap());
        let mut device = Net::on(tap, FEATURES | UDP_FEATURES, MAC, 1500);
        let driver = Driver::new(features);
        let worker = Some(driver.activate(&mut device, features));
        Self {
            driver,
            device,
            worker,
            wire,
            offloads,
            features,
        }
    }

    fn run(&mut self) {
        self.try_run().unwrap();
    }

    fn try_run(&mut self) -> Result<usize, DeviceError> {
        let Driver {
            rx, tx, control, ..
        } = &self.driver;
        let notify: [&EventFd; 3] = [&rx.notify, &tx.notify, &control.notify];
        test_driver::run(&mut **self.worker.as_mut().unwrap(), &notify, 2000)
    }

    /// A frame comes over the wire.
    fn arrive(&self, frame: &[u8]) -> bool {
        send(&self.wire, frame, SendFlags::DONTWAIT).is_ok()
    }

    /// A frame that left over the wire.
    fn left(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 100_000];
        let (len, _) = recv(&self.wire, &mut frame, RecvFlags::DONTWAIT).ok()?;
        frame.truncate(len);
        Some(frame)
    }

    /// Carries out a command and returns the answer.
    fn command(&mut self, command: &[u8]) -> u8 {
        let memory = self.driver.memory.memory();
        let at = 0x9000;
        memory.write_slice(command, GuestAddress(at)).unwrap();
        memory.write_obj(0xffu8, GuestAddress(at + 0x1000)).unwrap();
        let half = command.len() as u32 / 2;
        self.driver.control.add(&[
            (at, half, false),
            (at + u64::from(half), command.len() as u32 - half, false),
            (at + 0x1000, 1, true),
        ]);
        self.driver.control.kick(1);
        self.run();
        assert_eq!(self.driver.control.used_chain().unwrap().1, 1);
        memory.read_obj(GuestAddress(at + 0x1000)).unwrap()
    }
}

/// A frame of `len` bytes with its header, made from `seed`.
fn frame(seed: usize, len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|i| (i * 7 + seed * 13) as u8).collect();
    frame[..HEADER_BYTES].fill(0);
    frame
}

/// What the driver gets of it.
fn received(mut frame: Vec<u8>, buffers: u16) -> Option<(Vec<u8>, usize)> {
    frame[10..12].copy_from_slice(&buffers.to_le_bytes());
    Some((frame, buffers.into()))
}
