//! virtio-vsock, with host ports whose other ends write, read, shut down and go.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use husk_fuzz::driver::{Act, drive};
use husk_virtio::VirtioDevice;
use husk_virtio::vsock::{AddHostPorts, RemoveHostPorts, Vsock};
use libfuzzer_sys::fuzz_target;

/// What the shim does.
#[derive(Arbitrary, Clone, Debug)]
enum Shim {
    Write(u8, Vec<u8>),
    Read(u8, u16),
    ShutDown(u8, bool),
    Close(u8),
    AddPort(u8),
    RemovePort(u8),
}

/// Streams that the shim keeps.
const STREAMS: usize = 16;

fuzz_target!(init: husk_fuzz::start(), |input: (bool, Vec<Act<Shim>>)| {
    let (restored, acts) = input;
    let mut streams = Vec::new();
    let pair = || {
        let (near, far) = UnixStream::pair().expect("a pair");
        near.set_nonblocking(true).expect("a socket");
        (near, far)
    };
    let ports = (1..4).map(|port| {
        let (near, far) = pair();
        streams.push(near);
        (port, far.into())
    });
    let mut device = Vsock::new(3, ports.collect());
    if restored {
        device.restored();
    }
    drive(device, acts, |function, act| match act {
        Shim::Write(stream, bytes) => {
            if let Some(mut stream) = streams.get(usize::from(stream)) {
                let _ = stream.write(&bytes);
            }
        }
        Shim::Read(stream, bytes) => {
            if let Some(mut stream) = streams.get(usize::from(stream)) {
                let _ = stream.read(&mut vec![0; bytes.into()]);
            }
        }
        Shim::ShutDown(stream, write) => {
            if let Some(stream) = streams.get(usize::from(stream)) {
                let how = if write { Shutdown::Write } else { Shutdown::Read };
                let _ = stream.shutdown(how);
            }
        }
        Shim::Close(stream) => {
            if usize::from(stream) < streams.len() {
                streams.swap_remove(stream.into());
            }
        }
        Shim::AddPort(port) => {
            if streams.len() < STREAMS {
                let (near, far) = pair();
                streams.push(near);
                let ports = vec![((port % 8).into(), far.into())];
                let _ = function.control(Box::new(AddHostPorts(ports)));
            }
        }
        Shim::RemovePort(port) => {
            let _ = function.control(Box::new(RemoveHostPorts(vec![(port % 8).into()])));
        }
    });
});
