//! virtio-mem.
#![no_main]

use husk_fuzz::driver::{Act, drive};
use husk_fuzz::memory::PLUGGABLE;
use husk_virtio::mem::{Mem, Resize};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: husk_fuzz::start(), |acts: Vec<Act<u64>>| {
    let device = Mem::new(PLUGGABLE);
    drive(device, acts, |function, bytes| {
        let _ = function.control(Box::new(Resize(bytes)));
    });
});
