//! virtio-blk on a file, with and without io_uring.
#![no_main]

use std::fs::File;

use arbitrary::Arbitrary;
use husk_fuzz::driver::{Act, drive};
use husk_virtio::block::{Block, Engine};
use libfuzzer_sys::fuzz_target;
use rustix::fs::MemfdFlags;

const BYTES: u64 = 64 << 10;

#[derive(Arbitrary, Debug)]
struct Input {
    read_only: bool,
    waiting: bool,
    acts: Vec<Act<()>>,
}

fuzz_target!(init: husk_fuzz::start(), |input: Input| {
    let file: File = rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC)
        .expect("a memfd")
        .into();
    file.set_len(BYTES).expect("memory");
    let engine = if input.waiting { Engine::Waiting } else { Engine::new() };
    let share = file.try_clone().expect("a descriptor");
    let device = Block::new(share, input.read_only, "fuzzed", engine).expect("a disk");
    drive(device, input.acts, |_, ()| {});
    assert_eq!(file.metadata().expect("a file").len(), BYTES);
});
