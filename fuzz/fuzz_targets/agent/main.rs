//! What an agent answers, as the shim reads it: frames of ttrpc with anything in
//! them, to calls of every kind.
#![no_main]
#![allow(dead_code, missing_docs)]

use std::os::unix::net::UnixStream;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

// The shim is a program, so its modules come as they are, by symbolic links.
mod agent_client;
mod clock;
mod pace;
mod config {
    use std::time::Duration;

    /// None: every deadline is short.
    #[derive(Clone, Copy)]
    pub struct Patience;

    impl Patience {
        pub fn of(self, _usual: Duration) -> Duration {
            Duration::from_millis(3)
        }
    }
}

use agent_client::Agent;

/// What the agent sends.
#[derive(Arbitrary, Clone, Debug)]
enum Said {
    /// A response to a stream that may be asked, with this in it.
    Response { stream: u8, payload: Payload },
    /// A frame with a header of its own.
    Frame {
        length: Option<u32>,
        stream: u32,
        kind: u8,
        flags: u8,
        payload: Vec<u8>,
    },
    /// No frame at all.
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Clone, Debug)]
enum Payload {
    /// Status and message of a ttrpc response.
    Answer {
        code: Option<(u8, Vec<u8>)>,
        message: Vec<u8>,
    },
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Input {
    calls: Vec<u8>,
    said: Vec<Said>,
    hangs_up: bool,
}

fn field(tag: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![tag << 3 | 2];
    let mut len = bytes.len();
    while len >= 0x80 {
        field.push(len as u8 | 0x80);
        len >>= 7;
    }
    field.push(len as u8);
    field.extend(bytes);
    field
}

fn frame(stream: u32, kind: u8, flags: u8, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(stream.to_be_bytes());
    frame.extend([kind, flags]);
    frame.extend(payload);
    frame
}

impl Said {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Response { stream, payload } => {
                let payload = match payload {
                    Payload::Bytes(bytes) => bytes.clone(),
                    Payload::Answer { code, message } => {
                        let status = code.as_ref().map(|(code, text)| {
                            field(1, &[&[8, code & 0x7f][..], &field(2, text)].concat())
                        });
                        [status.unwrap_or_default(), field(2, message)].concat()
                    }
                };
                let stream = u32::from(*stream % 16) * 2 + 1;
                frame(stream, 2, 0, payload.len() as u32, &payload)
            }
            Self::Frame {
                length,
                stream,
                kind,
                flags,
                payload,
            } => {
                let length = length.unwrap_or(payload.len() as u32);
                frame(*stream, *kind, *flags, length, payload)
            }
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

async fn ask(agent: &Agent, call: u8) {
    let short = Duration::from_millis(3);
    match call % 10 {
        0 => drop(agent.create_sandbox(&Default::default(), short).await),
        1 => drop(agent.create_container(&Default::default()).await),
        2 => drop(agent.start_container("c").await),
        3 => drop(tokio::time::timeout(short, agent.wait("c", "")).await),
        4 => drop(agent.stats("c").await),
        5 => drop(tokio::time::timeout(short, agent.next_event()).await),
        6 => drop(agent.signal("c", "e", 9, false).await),
        7 => drop(agent.delete_container("c", Vec::new()).await),
        8 => drop(agent.exec(&Default::default()).await),
        _ => drop(agent.rescan_devices().await),
    }
}

async fn lie(guest: UnixStream, said: Vec<Said>, hangs_up: bool) {
    guest.set_nonblocking(true).expect("a socket");
    let mut guest = tokio::net::UnixStream::from_std(guest).expect("a socket");
    let mut heard = [0; 4096];
    for said in said {
        // Answers come after questions, if there are any.
        let _ = tokio::time::timeout(Duration::from_millis(1), guest.read(&mut heard)).await;
        if guest.write_all(&said.bytes()).await.is_err() {
            return;
        }
    }
    if !hangs_up {
        while guest.read(&mut heard).await.is_ok_and(|len| len > 0) {}
    }
}

fuzz_target!(init: husk_fuzz::start(), |input: Input| {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (shim, guest) = UnixStream::pair().expect("a pair");
        let said = input.said.into_iter().take(16).collect();
        tokio::spawn(lie(guest, said, input.hangs_up));
        let agent = Agent::new(shim, config::Patience).expect("a client");
        for call in input.calls.into_iter().take(8) {
            ask(&agent, call).await;
        }
    });
});
