//! virtio-mem.
#![no_main]

use husk_fuzz::driver::{Act, drive};
use husk_fuzz::memory::PLUGGABLE;
use husk_virtio::VirtioDevice;
use husk_virtio::mem::{Mem, Resize};
use libfuzzer_sys::fuzz_target;

/// Where the configuration space says how long the region is (virtio 1.2, 5.15.4).
const REGION_SIZE: u64 = 24;

fuzz_target!(init: husk_fuzz::start(), |acts: Vec<Act<u64>>| {
    let device = Mem::new(PLUGGABLE);
    let mut size = [0; 8];
    device.read_config(REGION_SIZE, &mut size);
    assert_ne!(u64::from_le_bytes(size), 0, "there are blocks to plug");
    drive(device, acts, |function, bytes| {
        let _ = function.control(Box::new(Resize(bytes)));
    });
});
