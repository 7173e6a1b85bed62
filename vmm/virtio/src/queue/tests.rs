use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::testing::{
    Buffer, HIGH, HOLE, INDIRECT, MEMORY_BYTES, NEXT, WRITABLE, adjacent_memory, memory,
};

#[derive(Default)]
struct Count(AtomicU32);

impl Interrupt for Count {
    fn signal_queue(&self, _queue: u16) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn signal_config(&self) -> io::Result<()> {
        Ok(())
    }

    fn queue_call(&self, _queue: u16) -> io::Result<std::os::fd::OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

const SIZE: u16 = 16;
const INDEX: u16 = 3;

/// A ring whose descriptors are at 0x1000, and the device's end of it.
struct Ring {
    memory: GuestMemory,
    interrupts: Arc<Count>,
    notify: Arc<EventFd>,
    device: DeviceQueue,
    available: u16,
    /// Addresses of available and used ring.
    at: (u64, u64),
}

impl Ring {
    fn new(memory: GuestMemory) -> Self {
        let at = (0x2000, 0x3000);
        let mut queue = Queue::new(SIZE).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(0x1000))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(at.0))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(at.1)).unwrap();
        queue.set_event_idx(true);
        queue.set_ready(true);
        assert!(queue.is_valid(&*memory.memory()));
        let interrupts = Arc::new(Count::default());
        let notify = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut queues: Vec<_> = (0..INDEX).map(|_| None).collect();
        queues.push(Some(ActiveQueue {
            queue,
            notify: Arc::clone(&notify),
        }));
        let mut activation = Activation {
            memory: memory.clone(),
            queues,
            negotiated_features: FEATURES,
            interrupt: Arc::clone(&interrupts) as Arc<dyn Interrupt>,
        };
        let device = activation.take_queue(INDEX).unwrap();
        assert!(matches!(
            activation.take_queue(INDEX),
            Err(ActivateError::QueueDisabled(INDEX))
        ));
        Self {
            memory,
            interrupts,
            notify,
            device,
            available: 0,
            at,
        }
    }

    fn put(&self, at: u64, data: &[u8]) {
        let memory = self.memory.memory();
        memory.write_slice(data, GuestAddress(at)).unwrap();
    }

    fn table(&self, at: u64, buffers: &[Buffer]) {
        for (i, buffer) in (0..).zip(buffers) {
            self.put(at + i * 16, &buffer.bytes());
        }
    }

    fn descriptors(&self, buffers: &[Buffer]) {
        self.table(0x1000, buffers);
    }

    fn publish(&mut self, head: u16) {
        let slot = u64::from(self.available % SIZE);
        self.put(self.at.0 + 4 + slot * 2, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.put(self.at.0 + 2, &self.available.to_le_bytes());
    }

    fn pop_error(&mut self) -> String {
        self.publish(0);
        match self.device.pop() {
            Ok(_) => "no error".into(),
            Err(DeviceError::Chain { queue: INDEX, what }) => what.into(),
            Err(DeviceError::Queue {
                queue: INDEX,
                source,
            }) => source.to_string(),
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn yields_what_is_sound() {
    let mut ring = Ring::new(memory());
    ring.put(0x8000, b"hello, ");
    ring.put(0x9000, b"world");
    ring.descriptors(&[
        Buffer::raw(0x8000, 7, NEXT, 1),
        Buffer::raw(0x9000, 5, NEXT, 2),
        Buffer::raw(0xa000, 4, NEXT | WRITABLE, 3),
        Buffer::raw(0xb000, 100, WRITABLE, 0),
    ]);
    ring.publish(0);
    let chain = ring.device.pop().unwrap().unwrap();
    assert_eq!(
        (chain.head(), chain.readable_len(), chain.writable_len()),
        (0, 12, 104)
    );
    let mut text = [0; 12];
    assert!(chain.read(0, &mut text));
    assert_eq!(&text, b"hello, world");
    assert!(!chain.read(1, &mut text));
    assert_eq!(chain.read_object::<[u8; 3]>(5), Some(*b", w"));
    assert_eq!(chain.read_object::<u64>(5), None);
    assert!(chain.write(2, b"abcd"));
    assert!(!chain.write(103, b"zy"));
    let memory = ring.memory.memory();
    assert_eq!(
        memory.read_obj::<[u8; 4]>(GuestAddress(0xa000)).unwrap(),
        *b"\0\0ab"
    );
    assert_eq!(
        memory.read_obj::<[u8; 2]>(GuestAddress(0xb000)).unwrap(),
        *b"cd"
    );
    assert_eq!(
        memory.read_obj::<[u8; 2]>(GuestAddress(0xb063)).unwrap(),
        *b"z\0"
    );
    assert!(ring.device.pop().unwrap().is_none());
}

#[test]
fn moves_bytes_through_descriptors() {
    let mut ring = Ring::new(memory());
    ring.put(0x8000, b"abcdef");
    ring.descriptors(&[
        Buffer::raw(0x8000, 3, NEXT, 1),
        Buffer::raw(0x8003, 3, NEXT, 2),
        Buffer::raw(0xa000, 2, NEXT | WRITABLE, 3),
        Buffer::raw(0xb000, 100, WRITABLE, 0),
    ]);
    ring.publish(0);
    let chain = ring.device.pop().unwrap().unwrap();
    let (reader, writer) = io::pipe().unwrap();
    assert_eq!(chain.write_to(writer.as_fd(), 1, 4).unwrap(), 4);
    assert_eq!(chain.read_from(reader.as_fd(), 1, usize::MAX).unwrap(), 4);
    let memory = ring.memory.memory();
    assert_eq!(
        memory.read_obj::<[u8; 2]>(GuestAddress(0xa000)).unwrap(),
        *b"\0b"
    );
    assert_eq!(
        memory.read_obj::<[u8; 4]>(GuestAddress(0xb000)).unwrap(),
        *b"cde\0"
    );
}

#[test]
fn refuses_what_breaks_the_rules() {
    let last = MEMORY_BYTES - 1;
    let broken = "the chain is broken";
    let outside = "a buffer is outside guest memory";
    let cases: [(&str, &[Buffer]); 14] = [
        (outside, &[Buffer::readable(HOLE, 1)]),
        (outside, &[Buffer::readable(last, 2)]),
        (outside, &[Buffer::writable(HIGH - 1, 2)]),
        (outside, &[Buffer::writable(HIGH + last, 2)]),
        (outside, &[Buffer::readable(u64::MAX, 1)]),
        (outside, &[Buffer::readable(u64::MAX - 3, 8)]),
        (outside, &[Buffer::writable(0x8000, u32::MAX)]),
        (broken, &[Buffer::raw(0x8000, 1, NEXT, SIZE)]),
        (broken, &[Buffer::raw(0x8000, 1, NEXT, 0)]),
        (
            broken,
            &[
                Buffer::raw(0x8000, 1, NEXT, 1),
                Buffer::raw(0x8000, 1, NEXT, 0),
            ],
        ),
        (
            "a readable buffer follows a writable one",
            &[
                Buffer::raw(0x8000, 1, NEXT | WRITABLE, 1),
                Buffer::readable(0x9000, 1),
            ],
        ),
        (broken, &[Buffer::raw(0x8000, 15, INDIRECT, 0)]),
        (broken, &[Buffer::raw(HOLE, 16, INDIRECT, 0)]),
        (broken, &[Buffer::raw(u64::MAX - 15, 32, INDIRECT, 0)]),
    ];
    for (expected, buffers) in cases {
        let mut ring = Ring::new(memory());
        ring.descriptors(buffers);
        assert_eq!(ring.pop_error(), expected, "{buffers:?}");
    }
}

#[test]
fn refuses_indirect_tables_in_indirect_tables() {
    let mut ring = Ring::new(memory());
    ring.descriptors(&[Buffer::raw(0x8000, 32, INDIRECT, 0)]);
    ring.table(
        0x8000,
        &[
            Buffer::raw(0x9000, 1, NEXT, 1),
            Buffer::raw(0x8000, 32, INDIRECT, 0),
        ],
    );
    assert_eq!(ring.pop_error(), "the chain is broken");
}

#[test]
fn follows_indirect_tables() {
    let mut ring = Ring::new(memory());
    ring.descriptors(&[
        Buffer::raw(0x7000, 1, NEXT, 1),
        Buffer::raw(0x8000, 48, INDIRECT, 0),
    ]);
    ring.table(
        0x8000,
        &[
            Buffer::raw(0x9000, 2, NEXT, 2),
            Buffer::raw(HOLE, 9, NEXT, 9),
            Buffer::raw(0xa000, 3, WRITABLE, 0),
        ],
    );
    ring.publish(0);
    let chain = ring.device.pop().unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (3, 3));
}

#[test]
fn bounds_long_chains() {
    let mut ring = Ring::new(memory());
    let count = CHAIN_SEGMENTS_MAX as u16 + 1;
    for (len, sound) in [(count - 1, true), (count, false)] {
        ring.descriptors(&[Buffer::raw(0x2_0000, u32::from(len) * 16, INDIRECT, 0)]);
        let table: Vec<_> = (1..len)
            .map(|next| Buffer::raw(0x8000, 1, NEXT, next))
            .chain([Buffer::readable(0x8000, 1)])
            .collect();
        ring.table(0x2_0000, &table);
        let expected = if sound {
            "no error"
        } else {
            "the chain has too many buffers"
        };
        assert_eq!(ring.pop_error(), expected);
    }
}

#[test]
fn bounds_chains_of_nothing() {
    let mut ring = Ring::new(memory());
    let count = CHAIN_SEGMENTS_MAX as u16 + 1;
    ring.descriptors(&[Buffer::raw(0x2_0000, u32::from(count) * 16, INDIRECT, 0)]);
    let table: Vec<_> = (1..count)
        .map(|next| Buffer::raw(0x8000, 0, NEXT, next))
        .chain([Buffer::readable(0x8000, 1)])
        .collect();
    ring.table(0x2_0000, &table);
    assert_eq!(ring.pop_error(), "the chain has too many buffers");
}

#[test]
fn bounds_the_bytes_of_a_chain() {
    // Each buffer is within memory; together they are more than 4 GiB.
    let whole = 64 << 20;
    let ranges = [(GuestAddress(0), whole as usize)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let mut ring = Ring::new(GuestMemory::new(memory));
    let count = 65_u16;
    ring.descriptors(&[Buffer::raw(0x2_0000, u32::from(count) * 16, INDIRECT, 0)]);
    let table: Vec<_> = (1..count)
        .map(|next| Buffer::raw(0, whole, NEXT, next))
        .chain([Buffer::readable(0, whole)])
        .collect();
    ring.table(0x2_0000, &table);
    assert_eq!(ring.pop_error(), "the chain is broken");
}

#[test]
fn refuses_jumps_of_the_available_index() {
    let mut ring = Ring::new(memory());
    ring.descriptors(&[Buffer::readable(0x8000, 1)]);
    ring.available = SIZE;
    let error = ring.pop_error();
    assert!(error.contains("available ring index"), "{error}");
}

#[test]
fn refuses_heads_outside_the_table() {
    let mut ring = Ring::new(memory());
    ring.publish(SIZE);
    assert!(ring.device.pop().is_err());
}

#[test]
fn takes_buffers_across_regions() {
    let mut ring = Ring::new(adjacent_memory());
    ring.put(0xf_fffe, b"abcd");
    ring.descriptors(&[
        Buffer::raw(0xf_fffe, 4, NEXT, 1),
        Buffer::raw(0x1f_ffff, 0x10_0002, WRITABLE, 0),
    ]);
    ring.publish(0);
    let chain = ring.device.pop().unwrap().unwrap();
    assert_eq!(chain.read_object(0), Some(*b"abcd"));
    assert_eq!(chain.readable_iovecs(0, usize::MAX).len(), 2);
    assert_eq!(chain.writable_iovecs(0, usize::MAX).len(), 3);
    assert_eq!(chain.writable_iovecs(1, 0x10_0000).len(), 1);
    assert!(chain.write(0, b"xyz"));
    let memory = ring.memory.memory();
    assert_eq!(
        memory.read_obj::<[u8; 3]>(GuestAddress(0x1f_ffff)).unwrap(),
        *b"xyz"
    );
}

#[test]
fn pops_a_ringful_in_one_event() {
    let mut ring = Ring::new(memory());
    ring.descriptors(&[Buffer::readable(0x8000, 1)]);
    for _ in 0..SIZE {
        ring.publish(0);
        assert!(ring.device.pop().unwrap().is_some());
    }
    ring.publish(0);
    assert!(ring.notify.read().is_err());
    assert!(ring.device.pop().unwrap().is_none());
    assert_eq!(ring.notify.read().unwrap(), 1, "it notified itself");
    ring.device.begin();
    assert!(ring.device.pop().unwrap().is_some());
}

#[test]
fn puts_back_what_was_popped_last() {
    let mut ring = Ring::new(memory());
    ring.descriptors(&[Buffer::readable(0x8000, 1), Buffer::readable(0x9000, 2)]);
    ring.publish(0);
    ring.publish(1);
    for _ in 0..40 {
        let chain = ring.device.pop().unwrap().unwrap();
        assert_eq!(chain.head(), 0);
        ring.device.unpop(chain);
    }
    assert_eq!(ring.device.pop().unwrap().unwrap().head(), 0);
    assert_eq!(ring.device.pop().unwrap().unwrap().head(), 1);
}

#[test]
fn asks_for_notifications_when_empty() {
    let mut ring = Ring::new(memory());
    ring.descriptors(&[Buffer::readable(0x8000, 1)]);
    ring.publish(0);
    ring.device.pop().unwrap();
    assert!(ring.device.pop().unwrap().is_none());
    let memory = ring.memory.memory();
    let avail_event = GuestAddress(ring.at.1 + 4 + u64::from(SIZE) * 8);
    assert_eq!(memory.read_obj::<u16>(avail_event).unwrap(), 1);
}

#[test]
fn interrupts_when_the_driver_wants_to_know() {
    let mut ring = Ring::new(memory());
    let used_event = ring.at.0 + 4 + u64::from(SIZE) * 2;
    let interrupts = Arc::clone(&ring.interrupts);
    let count = || interrupts.0.load(Ordering::Relaxed);
    ring.device.signal().unwrap();
    assert_eq!(count(), 0, "nothing is new");
    ring.put(used_event, &2_u16.to_le_bytes());
    ring.device.add_used(0, 0).unwrap();
    ring.device.signal().unwrap();
    assert_eq!(count(), 0, "it waits for the third");
    ring.device.add_used(0, 0).unwrap();
    ring.device.add_used(0, 0).unwrap();
    ring.device.signal().unwrap();
    assert_eq!(count(), 1);
    ring.device.signal().unwrap();
    assert_eq!(count(), 1);
}

fn any_buffer() -> impl Strategy<Value = Buffer> {
    let address = prop_oneof![
        4 => 0..MEMORY_BYTES,
        1 => HIGH..HIGH + MEMORY_BYTES,
        1 => HOLE - 64..HOLE + 64,
        1 => any::<u64>(),
    ];
    let len =
        prop_oneof![4 => 0..256_u32, 2 => (0..32_u32).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![4 => Just(0_u16), 4 => Just(NEXT), 4 => Just(NEXT | WRITABLE), 2 => Just(INDIRECT), 1 => any::<u16>()];
    (address, len, flags, 0..SIZE + 2)
        .prop_map(|(address, len, flags, next)| Buffer::raw(address, len, flags, next))
}

proptest! {
    /// Whatever the rings hold, nothing panics, and what is yielded lies in
    /// guest memory and adds up.
    #[test]
    fn survives_any_ring(
        table in prop::collection::vec(any_buffer(), SIZE as usize),
        indirect in prop::collection::vec(any_buffer(), 32),
        heads in prop::collection::vec(0..SIZE + 1, 1..40),
    ) {
        let mut ring = Ring::new(memory());
        ring.descriptors(&table);
        ring.table(0x8000, &indirect);
        let guard = ring.memory.memory();
        let within = |piece: &libc::iovec| {
            let first = piece.iov_base as usize;
            [0, HIGH].into_iter().any(|region| {
                let start = guard.get_host_address(GuestAddress(region)).unwrap() as usize;
                first >= start && first + piece.iov_len <= start + MEMORY_BYTES as usize
            })
        };
        for head in heads {
            ring.publish(head);
            match ring.device.pop() {
                Ok(Some(chain)) => {
                    let readable = chain.readable_iovecs(0, usize::MAX);
                    let writable = chain.writable_iovecs(0, usize::MAX);
                    prop_assert!(readable.iter().chain(&writable).all(within));
                    let sum = |pieces: &[libc::iovec]| pieces.iter().map(|p| p.iov_len).sum::<usize>();
                    prop_assert_eq!(sum(&readable), chain.readable_len());
                    prop_assert_eq!(sum(&writable), chain.writable_len());
                    prop_assert!(readable.len() + writable.len() <= CHAIN_SEGMENTS_MAX);
                    let half = chain.readable_len() / 2;
                    prop_assert_eq!(sum(&chain.readable_iovecs(half, 10)), 10.min(chain.readable_len() - half));
                    ring.device.add_used(chain.head(), 0).unwrap();
                    ring.device.signal().unwrap();
                    ring.device.begin();
                }
                Ok(None) => {}
                Err(_) => break,
            }
        }
    }
}
