//! The file server's front end, which is the VMM, is hostile: messages of any
//! kind with any descriptors, and FUSE requests in rings of its making.
#![no_main]

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use husk_fs::vhost_user;
use husk_fuzz::file_server::FileServer;
use husk_fuzz::fuse::{self, Request};
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Descriptor {
    Memory,
    Event,
    Socket,
    Directory,
}

#[derive(Arbitrary, Debug)]
enum Act {
    /// Anything.
    Message {
        request: u8,
        flags: u8,
        words: Vec<u64>,
        size: Option<u32>,
        descriptors: Vec<Descriptor>,
    },
    /// As the VMM does it: memory and one queue.
    SetUp { queue: u8, base: u16 },
    /// Into guest memory, where rings are.
    Bytes(u16, Vec<u8>),
    /// A request as a good driver makes it.
    Fuse { request: Request, room: u16 },
    /// Waits until the server has read what was sent.
    Wait,
}

const MEMORY_BYTES: u64 = 1 << 20;
const FRONT_END: u64 = 0x7000_0000;
const SIZE: u16 = 16;
/// Descriptors, available ring, used ring, buffers.
const RINGS: [u64; 3] = [0, 0x1000, 0x2000];
const BUFFERS: u64 = 0x4000;

const GET_FEATURES: u32 = 1;

struct FrontEnd {
    socket: UnixStream,
    memory: File,
    kick: OwnedFd,
    event: OwnedFd,
    root: OwnedFd,
    available: u16,
}

impl FrontEnd {
    fn new(socket: UnixStream) -> Self {
        let memory: File = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC)
            .expect("a memfd")
            .into();
        memory.set_len(MEMORY_BYTES).expect("memory");
        let event = || eventfd(0, EventfdFlags::NONBLOCK).expect("an event descriptor");
        let (flags, mode) = (rustix::fs::OFlags::PATH, rustix::fs::Mode::empty());
        Self {
            socket,
            memory,
            kick: event(),
            event: event(),
            root: rustix::fs::open("/", flags, mode).expect("the root"),
            available: 0,
        }
    }

    fn send(&self, request: u32, flags: u32, size: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = [request, flags, size].map(u32::to_le_bytes).concat();
        let parts = [IoSlice::new(&header), IoSlice::new(payload)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let _ = sendmsg(&self.socket, &parts, &mut ancillary, flags);
    }

    fn say(&self, request: u32, words: &[u64], fds: &[BorrowedFd<'_>]) {
        let payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.send(request, 1, payload.len() as u32, &payload, fds);
    }

    fn set_up(&mut self, queue: u8, base: u16) {
        let index = u64::from(queue % 12);
        self.available = base;
        let _ = self.memory.write_all_at(&base.to_le_bytes(), RINGS[1] + 2);
        self.say(3, &[], &[]);
        self.say(16, &[1 | 1 << 3], &[]);
        self.say(2, &[1 << 32 | 1 << 30], &[]);
        let table = [1, 0, MEMORY_BYTES, FRONT_END, 0];
        self.say(5, &table, &[self.memory.as_fd()]);
        self.say(8, &[index | u64::from(SIZE) << 32], &[]);
        let [descriptors, available, used] = RINGS.map(|at| FRONT_END + at);
        self.say(9, &[index, descriptors, used, available, 0], &[]);
        self.say(10, &[index | u64::from(base) << 32], &[]);
        self.say(13, &[index], &[self.event.as_fd()]);
        self.say(12, &[index], &[self.kick.as_fd()]);
        self.say(18, &[index | 1 << 32], &[]);
    }

    fn fuse(&mut self, request: &[u8], room: u16) {
        let reply = BUFFERS + 0x8000;
        let request = &request[..request.len().min(0x8000)];
        let _ = self.memory.write_all_at(request, BUFFERS);
        let write = |at: u64, bytes: &[u8]| self.memory.write_all_at(bytes, at);
        for (index, (at, len, flags)) in [(BUFFERS, request.len(), 1), (reply, room.into(), 2)]
            .into_iter()
            .enumerate()
        {
            let mut descriptor = at.to_le_bytes().to_vec();
            descriptor.extend((len as u32).to_le_bytes());
            descriptor.extend((flags as u16).to_le_bytes());
            descriptor.extend(1_u16.to_le_bytes());
            let _ = write(RINGS[0] + index as u64 * 16, &descriptor);
        }
        let slot = RINGS[1] + 4 + u64::from(self.available % SIZE) * 2;
        let _ = write(slot, &0_u16.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        let _ = write(RINGS[1] + 2, &self.available.to_le_bytes());
        let _ = rustix::io::write(&self.kick, &1_u64.to_ne_bytes());
    }

    /// The server answers in order, unless it has hung up. Whatever it answered
    /// before is taken, so that it never waits for us.
    fn wait(&self) {
        self.say(GET_FEATURES, &[], &[]);
        let patience = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 2_000_000,
        };
        let readable = rustix::event::PollFlags::IN;
        let mut fds = [rustix::event::PollFd::new(&self.socket, readable)];
        let _ = rustix::event::poll(&mut fds, Some(&patience));
        let flags = rustix::net::RecvFlags::DONTWAIT;
        let _ = rustix::net::recv(&self.socket, &mut [0; 4096][..], flags);
    }
}

static SERVER: LazyLock<FileServer> = LazyLock::new(FileServer::start);

fn attack(socket: UnixStream, acts: Vec<Act>) {
    let mut front_end = FrontEnd::new(socket);
    front_end.set_up(1, 0);
    front_end.fuse(&fuse::init(), 4096);
    for (act, unique) in acts.into_iter().take(64).zip(2..) {
        match act {
            Act::Message {
                request,
                flags,
                words,
                size,
                descriptors,
            } => {
                let payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                let fds = descriptors
                    .iter()
                    .take(16)
                    .map(|descriptor| match descriptor {
                        Descriptor::Memory => front_end.memory.as_fd(),
                        Descriptor::Event => front_end.event.as_fd(),
                        Descriptor::Socket => front_end.socket.as_fd(),
                        Descriptor::Directory => front_end.root.as_fd(),
                    });
                let fds: Vec<_> = fds.collect();
                let size = size.unwrap_or(payload.len() as u32);
                let request = u32::from(request % 48);
                front_end.send(request, u32::from(flags) | 1, size, &payload, &fds);
            }
            Act::SetUp { queue, base } => front_end.set_up(queue, base),
            Act::Bytes(at, bytes) => {
                let bytes = &bytes[..bytes.len().min(4096)];
                let _ = front_end.memory.write_all_at(bytes, u64::from(at) % 0x4000);
            }
            Act::Fuse { request, room } => {
                front_end.fuse(&request.bytes(unique), room);
                front_end.wait();
            }
            Act::Wait => front_end.wait(),
        }
    }
    front_end.wait();
}

fuzz_target!(init: husk_fuzz::start(), |acts: Vec<Act>| {
    let (front_end, back_end) = UnixStream::pair().expect("a pair");
    let attacker = std::thread::spawn(move || attack(front_end, acts));
    SERVER.run(move |server| {
        // Ends when the attacker hangs up, or sooner.
        let _ = vhost_user::serve(back_end, server);
    });
    attacker.join().expect("it ends");
});
