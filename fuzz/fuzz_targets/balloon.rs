//! virtio-balloon, which takes reports of free pages.
#![no_main]

use husk_fuzz::driver::{Act, drive};
use husk_virtio::balloon::Balloon;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: husk_fuzz::start(), |acts: Vec<Act<()>>| drive(Balloon::default(), acts, |_, ()| {}));
