//! The serial port and the ports that reset, with the console's pipe behind.
#![no_main]

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use arbitrary::Arbitrary;
use husk_vmm::console::ConsoleOutput;
use husk_vmm::exit::ExitLatch;
use husk_vmm::legacy::Legacy;
use libfuzzer_sys::fuzz_target;
use rustix::pipe::{PipeFlags, pipe_with};

#[derive(Arbitrary, Debug)]
enum Act {
    Write(u8, Vec<u8>),
    Read(u8, u8),
    WriteAny(u16, Vec<u8>),
    ReadAny(u16, u8),
    /// The host reads what was said.
    Drain(u16),
    Close,
}

fuzz_target!(init: husk_fuzz::start(), |acts: Vec<Act>| {
    let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).expect("a pipe");
    let mut reader = Some(File::from(reader));
    let console = ConsoleOutput::new(Some(writer));
    let exit = Arc::new(ExitLatch::new().expect("an event descriptor"));
    let legacy = Legacy::new(console, exit);
    for act in acts {
        match act {
            Act::Write(port, data) => legacy.write(0x3f8 + u16::from(port % 8), &data),
            Act::Read(port, len) => {
                legacy.read(0x3f8 + u16::from(port % 8), &mut vec![0; len.into()]);
            }
            Act::WriteAny(port, data) => legacy.write(port, &data),
            Act::ReadAny(port, len) => legacy.read(port, &mut vec![0; len.into()]),
            Act::Drain(bytes) => {
                if let Some(reader) = &mut reader {
                    let _ = reader.read(&mut vec![0; bytes.into()]);
                }
            }
            Act::Close => reader = None,
        }
    }
});
