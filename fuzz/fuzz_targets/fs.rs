//! virtio-fs: both the driver and the file server at the other end of the
//! vhost-user socket are hostile.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use arbitrary::Arbitrary;
use husk_fuzz::driver::{Act, drive};
use husk_virtio::fs::Fs;
use libfuzzer_sys::fuzz_target;

/// What the file server says to one request.
#[derive(Arbitrary, Clone, Debug)]
enum Answer {
    /// As the protocol wants it.
    Good(u8, u64),
    /// Header and payload of its own.
    Odd {
        request: u32,
        flags: u32,
        size: u32,
        payload: Vec<u8>,
    },
}

#[derive(Arbitrary, Debug)]
struct Input {
    /// Features and queues that it claims; all if not.
    features: Option<(u64, u64, u64)>,
    answers: Vec<Answer>,
    acts: Vec<Act<()>>,
}

const REPLY: u32 = 1 | 1 << 2;

fn say(server: &mut UnixStream, request: u32, flags: u32, size: u32, payload: &[u8]) {
    let header = [request, flags, size].map(u32::to_le_bytes).concat();
    let _ = server.write_all(&[&header, payload].concat());
}

fuzz_target!(init: husk_fuzz::start(), |input: Input| {
    let (near, mut server) = UnixStream::pair().expect("a pair");
    server.set_nonblocking(true).expect("a socket");
    let (features, protocol, queues) = input.features.unwrap_or((
        1 << 32 | 1 << 30 | 1 << 29 | 1 << 28,
        1 << 0 | 1 << 3,
        2,
    ));
    for (request, value) in [(1, features), (15, protocol), (17, queues)] {
        say(&mut server, request, REPLY, 8, &value.to_le_bytes());
    }
    for answer in input.answers.iter().take(256) {
        match answer {
            Answer::Good(request, value) => {
                say(&mut server, (*request).into(), REPLY, 8, &value.to_le_bytes());
            }
            Answer::Odd {
                request,
                flags,
                size,
                payload,
            } => say(&mut server, *request, *flags, *size, payload),
        }
    }
    // Nobody waits for more.
    let _ = server.shutdown(Shutdown::Write);
    if let Ok(device) = Fs::new(near.into(), "fuzzed", Duration::from_secs(1)) {
        drive(device, input.acts, |_, ()| {});
    }
});
