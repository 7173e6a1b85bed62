//! The real file server behind a shadow.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{self, JoinHandle};

use husk_fs::abi::{
    CreateIn, EntryOut, InHeader, InitIn, InitOut, Opcode, OpenOut, OutHeader, ReadIn, WriteIn,
    WriteOut,
};
use husk_fs::server::{Resources, Server};
use rustix::fs::{Mode, OFlags};
use vm_memory::ByteValued;

use crate::fs::{Fs, PATIENCE, Shadow};
use crate::testing::{Buffer, Driver, DriverQueue, HIGH, wait_until};

const PAGE: usize = 4096;
/// What Linux sends at once to a queue of 128 entries.
const PIECE: usize = 124 * PAGE;
const FILE: usize = 16 * PIECE + 1234;
/// Where answers go.
const ANSWERS: u64 = HIGH;

struct Guest {
    driver: Driver,
    queues: Vec<DriverQueue>,
    unique: u64,
}

/// Serves a directory on a thread of its own.
fn serve(socket: UnixStream, top: &Path) -> JoinHandle<()> {
    let top = top.to_owned();
    thread::spawn(move || {
        // SAFETY: the thread gets a working directory and an umask of its own.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_FS) }, 0);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |path: &Path| rustix::fs::open(path, flags, Mode::empty()).unwrap();
        let mut server = Server::new(Resources {
            top: open(&top),
            proc_self_fd: open(Path::new("/proc/self/fd")),
            mountinfo: None,
            reference_budget: 100,
        })
        .unwrap();
        // What the program may not do, the thread may not do either.
        husk_fs::seccomp::install().unwrap();
        husk_fs::vhost_user::serve(socket, &mut server).unwrap();
    })
}

fn object<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut object = T::default();
    let size = size_of::<T>();
    object.as_mut_slice().copy_from_slice(&bytes[..size]);
    object
}

impl Guest {
    /// Makes a request available: a header, arguments and pages, as Linux does.
    fn send(&mut self, opcode: Opcode, node: u64, parts: &[&[u8]], answer: &[Buffer]) -> u32 {
        self.unique += 1;
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let header = InHeader {
            len: (size_of::<InHeader>() + bytes) as u32,
            opcode: opcode as u32,
            unique: self.unique,
            nodeid: node,
            ..InHeader::default()
        };
        let mut chain = vec![self.driver.allocate_with(header.as_slice())];
        for part in parts.iter().flat_map(|part| part.chunks(PAGE)) {
            chain.push(self.driver.allocate_with(part));
        }
        chain.extend(answer);
        let head = self.queues[1].add(&chain);
        self.driver.notify(1);
        head.into()
    }

    fn returned(&mut self) -> (u32, u32) {
        let mut used = None;
        wait_until("an answer", || {
            used = used.or_else(|| self.queues[1].pop_used());
            used.is_some()
        });
        used.unwrap()
    }

    /// Sends a request and gives the answer's body.
    fn ask(&mut self, opcode: Opcode, node: u64, parts: &[&[u8]]) -> Vec<u8> {
        self.driver.forget_buffers();
        let head = self.send(opcode, node, parts, &[Buffer::writable(ANSWERS, 4096)]);
        let (used, written) = self.returned();
        assert_eq!(used, head);
        let answer = self.driver.read(ANSWERS, written as usize);
        let out: OutHeader = object(&answer);
        assert_eq!((out.error, out.len), (0, written), "{opcode:?}");
        assert_eq!(out.unique, self.unique);
        answer[size_of::<OutHeader>()..].to_vec()
    }
}

#[test]
fn large_files_are_written_and_read() {
    // SAFETY: touches no memory.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: only root can run the file server");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("web/rootfs");
    std::fs::create_dir_all(&own).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = serve(theirs, dir.path());
    let device = Fs::new(ours.into(), "husk", PATIENCE).unwrap();
    let mut driver = Driver::new(device.through(Shadow::new().unwrap()));
    let queues = driver.start(u64::MAX);
    let mut guest = Guest {
        driver,
        queues,
        unique: 0,
    };
    let init = InitIn {
        major: 7,
        minor: 45,
        flags: u32::MAX,
        flags2: u32::MAX,
        ..InitIn::default()
    };
    let init: InitOut = object(&guest.ask(Opcode::Init, 0, &[init.as_slice()]));
    assert_eq!(init.max_write, 1 << 20);
    let mut node = 1;
    for name in [&b"web\0"[..], b"rootfs\0"] {
        let entry: EntryOut = object(&guest.ask(Opcode::Lookup, node, &[name]));
        node = entry.nodeid;
    }
    let create = CreateIn {
        flags: libc::O_RDWR as u32,
        mode: 0o644,
        ..CreateIn::default()
    };
    let created = guest.ask(Opcode::Create, node, &[create.as_slice(), b"large\0"]);
    let entry: EntryOut = object(&created);
    let fh = object::<OpenOut>(&created[size_of::<EntryOut>()..]).fh;

    let data: Vec<u8> = (0..FILE).map(|i| (i / 3 % 251) as u8).collect();
    for (number, piece) in data.chunks(PIECE).enumerate() {
        let write = WriteIn {
            fh,
            offset: (number * PIECE) as u64,
            size: piece.len() as u32,
            ..WriteIn::default()
        };
        let parts = [write.as_slice(), piece];
        let out: WriteOut = object(&guest.ask(Opcode::Write, entry.nodeid, &parts));
        assert_eq!(out.size as usize, piece.len());
    }
    let written = std::fs::read(own.join("large")).unwrap();
    assert!(written == data, "what was written is another");

    // Several at a time, a pause in between, and past the end.
    let room = (PIECE + size_of::<OutHeader>()) as u32;
    let mut read = Vec::new();
    for round in 0..3 {
        guest.driver.forget_buffers();
        let place = |at: usize| ANSWERS + at as u64 * 0x8_0000;
        let heads: Vec<_> = (0..7)
            .map(|at| {
                let ask = ReadIn {
                    fh,
                    offset: ((round * 7 + at) * PIECE) as u64,
                    size: PIECE as u32,
                    ..ReadIn::default()
                };
                let answer = [
                    Buffer::writable(place(at), 16),
                    Buffer::writable(place(at) + 16, room - 16),
                ];
                guest.send(Opcode::Read, entry.nodeid, &[ask.as_slice()], &answer)
            })
            .collect();
        if round == 1 {
            let handle = guest.driver.event_loop.handle();
            handle.pause().unwrap();
            handle.resume().unwrap();
        }
        for (at, head) in heads.into_iter().enumerate() {
            let (used, written) = guest.returned();
            assert_eq!(used, head);
            let answer = guest.driver.read(place(at), written as usize);
            assert_eq!(object::<OutHeader>(&answer).error, 0);
            read.extend_from_slice(&answer[16..]);
        }
    }
    assert!(read == data, "what was read is another");
    drop(guest);
    server.join().unwrap();
}
