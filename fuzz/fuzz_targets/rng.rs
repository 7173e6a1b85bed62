//! virtio-rng.
#![no_main]

use husk_fuzz::driver::{Act, drive};
use husk_virtio::rng::Rng;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: husk_fuzz::start(), |acts: Vec<Act<()>>| drive(Rng, acts, |_, ()| {}));
