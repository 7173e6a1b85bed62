//! What the loop waits for, whatever the engine.

use super::*;

#[test]
fn discards_of_a_device_are_waited_for_a_few_at_a_time() {
    for engine in engines() {
        let file = tempfile().unwrap();
        file.set_len(BYTES as u64).unwrap();
        let mut block = Block::new(file, false, "x", engine).unwrap();
        // The kernel refuses, but is asked.
        block.disk.is_block_device = true;
        let memory = test_driver::memory(0x10_0000);
        let mut queue = test_driver::DriverQueue::new(&memory, 0x1000, QUEUE_SIZE, 0);
        let interrupt = test_driver::TestInterrupt::new(1);
        let mut worker = test_driver::activate(&mut block, &memory, &[&queue], 0, &interrupt);
        let guest = memory.memory();
        let (header, status) = (0x8000, 0xa000);
        guest.write_obj(DISCARD, GuestAddress(header)).unwrap();
        let sectors = GuestAddress(header + HEADER as u64 + 8);
        guest.write_obj(8_u32, sectors).unwrap();
        for _ in 0..20 {
            queue.add(&[(header, HEADER as u32 + 16, false), (status, 1, true)]);
        }
        for expected in [8, 8, 4] {
            worker.process(Event::Queue(0)).unwrap();
            let done = std::iter::from_fn(|| queue.used_chain()).count();
            assert_eq!(done, expected);
            assert_eq!(interrupt.queues[0].read().unwrap(), 1);
            // It has told itself of the others.
            assert_eq!(queue.notify.read().is_ok(), expected == 8);
            let answer: u8 = guest.read_obj(GuestAddress(status)).unwrap();
            assert_ne!(answer, OK);
        }
    }
}
