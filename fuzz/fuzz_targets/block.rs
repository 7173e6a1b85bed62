//! virtio-blk on a file, with and without io_uring, and with limits.
#![no_main]

use std::fs::File;

use arbitrary::Arbitrary;
use husk_fuzz::driver::{Act, drive};
use husk_virtio::block::{Block, Engine};
use husk_virtio::rate::{Limits, Rate};
use libfuzzer_sys::fuzz_target;
use rustix::fs::MemfdFlags;

const BYTES: u64 = 64 << 10;

#[derive(Arbitrary, Debug)]
struct Input {
    read_only: bool,
    /// Bits, from the lowest: the engine waits, the disk is limited.
    how: u8,
    acts: Vec<Act<()>>,
}

fuzz_target!(init: husk_fuzz::start(), |input: Input| {
    let file: File = rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC)
        .expect("a memfd")
        .into();
    file.set_len(BYTES).expect("memory");
    let engine = if input.how & 1 != 0 { Engine::Waiting } else { Engine::new() };
    let share = file.try_clone().expect("a descriptor");
    let mut device = Block::new(share, input.read_only, "fuzzed", engine).expect("a disk");
    if input.how & 2 != 0 {
        // One request, and the next ones within the same input: a larger burst is
        // never used up, since the driver waits for most of what it asks.
        let limits = Limits {
            bytes: Rate::new(1 << 20, 512).ok(),
            operations: Rate::new(10_000, 1).ok(),
        };
        device.limit(limits).expect("a timer");
    }
    drive(device, input.acts, |_, ()| {});
    assert_eq!(file.metadata().expect("a file").len(), BYTES);
});
