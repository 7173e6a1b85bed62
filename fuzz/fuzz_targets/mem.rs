//! virtio-mem.
#![no_main]

use husk_fuzz::driver::{Act, drive};
use husk_fuzz::memory::{HIGH, REGION_BYTES};
use husk_virtio::mem::{Mem, Resize};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: husk_fuzz::start(), |acts: Vec<Act<u64>>| {
    let device = Mem::new(HIGH..HIGH + REGION_BYTES);
    drive(device, acts, |function, bytes| {
        let _ = function.control(Box::new(Resize(bytes)));
    });
});
