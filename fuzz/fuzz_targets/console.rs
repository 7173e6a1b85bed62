//! virtio-console. The host reads what it says, or does not.
#![no_main]

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use husk_fuzz::driver::{Act, drive};
use husk_virtio::console::Console;
use libfuzzer_sys::fuzz_target;
use rustix::pipe::{PipeFlags, pipe_with};

fuzz_target!(init: husk_fuzz::start(), |acts: Vec<Act<u16>>| {
    let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).expect("a pipe");
    let mut reader = Some(File::from(reader));
    let device = Console::new(writer, Arc::default()).expect("a pipe is good");
    drive(device, acts, |_, bytes| match bytes {
        0 => reader = None,
        _ => {
            if let Some(reader) = &mut reader {
                let _ = reader.read(&mut vec![0; bytes.into()]);
            }
        }
    });
});
