//! A VMM and a guest in one: starts the real `husk-fs`, sets its device up as
//! a VMM does, and puts requests into its queues as a guest does.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use husk_fs::abi::{InHeader, InitIn, InitOut, Opcode, OutHeader, init};
use rustix::process::{Resource, Rlimit, setrlimit};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Size of each queue.
pub const QUEUE_SIZE: u16 = 128;
/// Where guest memory starts: not at 0, so that no address is right by chance.
pub const BASE: u64 = 0x1_0000_0000;
/// Bytes of guest memory.
pub const MEMORY_BYTES: u64 = 4 << 20;
/// More files than any test has.
const NODES: u32 = 1 << 20;
/// Who the server is.
pub const UID: u32 = 64_125;
/// Its group.
pub const GID: u32 = 64_126;
/// Where messages are put together.
pub const SCRATCH: u64 = BASE + 0x10_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// The descriptor holds a table of descriptors.
pub const INDIRECT: u16 = 4;

/// A queue as its driver sees it.
struct Queue {
    descriptors: u64,
    available: u64,
    used: u64,
    next: u16,
    kick: EventFd,
    call: EventFd,
}

/// A running server with its device set up.
pub struct Guest {
    /// The server.
    pub child: Child,
    /// The VMM's end.
    pub front_end: Frontend,
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    queues: Vec<Queue>,
    unique: u64,
    /// User and group that requests come from.
    pub ids: (u32, u32),
}

/// A descriptor of a chain.
#[derive(Clone, Copy)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
}

impl Descriptor {
    /// Read by the device.
    pub fn readable(address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            flags: 0,
        }
    }

    /// Written by the device.
    pub fn writable(address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            flags: WRITE,
        }
    }
}

impl Guest {
    /// Starts the server for a tree and negotiates everything.
    pub fn start(source: &Path) -> Self {
        Self::start_as(source, NODES, |_| {})
    }

    /// The same for one that may know so many files.
    pub fn start_with_nodes(source: &Path, nodes: u32) -> Self {
        Self::start_as(source, nodes, |_| {})
    }

    /// The same for a server that may have so many descriptors.
    pub fn start_with_descriptors(source: &Path, most: u64) -> Self {
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        let set = move || Ok(setrlimit(Resource::Nofile, limit)?);
        // SAFETY: setrlimit is a system call and no more.
        Self::start_as(source, NODES, |command| unsafe {
            command.pre_exec(set);
        })
    }

    fn start_as(source: &Path, nodes: u32, prepare: impl FnOnce(&mut Command)) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk-fs"));
        command
            .arg("--socket-fd")
            .arg(theirs.as_raw_fd().to_string())
            .arg("--source")
            .arg(source)
            .args(["--uid", &UID.to_string(), "--gid", &GID.to_string()])
            .args(["--nodes", &nodes.to_string()])
            .stdin(Stdio::null());
        prepare(&mut command);
        let spawn = move || {
            // As the shim does it: the first process of a PID namespace.
            let namespace = rustix::thread::UnshareFlags::NEWPID;
            // SAFETY: descriptors stay shared.
            unsafe { rustix::thread::unshare_unsafe(namespace) }.unwrap();
            command.spawn().unwrap()
        };
        let child = std::thread::spawn(spawn).join().unwrap();
        drop(theirs);

        let memfd = rustix::fs::memfd_create(c"guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, MEMORY_BYTES).unwrap();
        let range = (
            GuestAddress(BASE),
            MEMORY_BYTES as usize,
            Some(FileOffset::new(File::from(memfd), 0)),
        );
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();

        let mut front_end = Frontend::from_stream(ours, 2);
        front_end.set_owner().unwrap();
        let features = front_end.get_features().unwrap();
        assert_ne!(features & (1 << 32), 0, "VERSION_1");
        front_end.set_features(features).unwrap();
        let protocol = front_end.get_protocol_features().unwrap();
        front_end.set_protocol_features(protocol).unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(front_end.get_queue_num().unwrap() >= 2);
        let region = memory.iter().next().unwrap();
        let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        front_end.set_mem_table(&[region]).unwrap();

        let mut guest = Self {
            child,
            front_end,
            memory,
            queues: Vec::new(),
            unique: 0,
            ids: (0, 0),
        };
        for index in 0..2 {
            let at = BASE + 0x1_0000 * (index + 1);
            guest.queues.push(Queue {
                descriptors: at,
                available: at + 0x4000,
                used: at + 0x8000,
                next: 0,
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
                call: EventFd::new(EFD_NONBLOCK).unwrap(),
            });
            guest.start_queue(index as usize, 0);
        }
        guest
    }

    /// Starts a queue at a position.
    pub fn start_queue(&mut self, index: usize, base: u16) {
        let queue = &mut self.queues[index];
        queue.next = base;
        let host = |address| {
            let region = self.memory.find_region(GuestAddress(address)).unwrap();
            region.as_ptr() as u64 + (address - region.start_addr().0)
        };
        let front_end = &mut self.front_end;
        front_end.set_vring_num(index, QUEUE_SIZE).unwrap();
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: host(queue.descriptors),
            used_ring_addr: host(queue.used),
            avail_ring_addr: host(queue.available),
            log_addr: None,
        };
        front_end.set_vring_addr(index, &config).unwrap();
        front_end.set_vring_base(index, base).unwrap();
        front_end.set_vring_call(index, &queue.call).unwrap();
        front_end.set_vring_kick(index, &queue.kick).unwrap();
        front_end.set_vring_enable(index, true).unwrap();
    }

    /// Puts descriptors at a place and links them.
    pub fn write_table(&self, at: u64, chain: &[Descriptor]) {
        for (index, descriptor) in chain.iter().enumerate() {
            let at = at + 16 * index as u64;
            let more = index + 1 < chain.len();
            let flags = descriptor.flags | if more { NEXT } else { 0 };
            self.put(at, descriptor.address);
            self.put(at + 8, descriptor.length);
            self.put(at + 12, flags);
            self.put(at + 14, index as u16 + 1);
        }
    }

    /// Writes an object to guest memory.
    pub fn put<T: ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Makes a chain available, kicks and waits for its end; the bytes used,
    /// or nothing if none came in time.
    pub fn submit(&mut self, index: usize, chain: &[Descriptor]) -> Option<u32> {
        self.write_table(self.queues[index].descriptors, chain);
        self.submit_head(index, 0)
    }

    /// As `submit`, of descriptors that are there already.
    pub fn submit_head(&mut self, index: usize, head: u16) -> Option<u32> {
        let queue = &self.queues[index];
        let before: u16 = self.get(queue.used + 2);
        let slot = u64::from(queue.next % QUEUE_SIZE);
        self.put(queue.available + 4 + 2 * slot, head);
        // used_event: tell of the very next one. Before the request is there: a
        // server that still looks at the queue needs no kick.
        self.put(queue.available + 4 + 2 * u64::from(QUEUE_SIZE), before);
        let next = queue.next.wrapping_add(1);
        self.put(queue.available + 2, next);
        queue.kick.write(1).unwrap();
        self.queues[index].next = next;
        let queue = &self.queues[index];
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.get::<u16>(queue.used + 2) == before {
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        // The interrupt comes right after.
        while queue.call.read().is_err() {
            assert!(Instant::now() < deadline, "no interrupt");
        }
        let slot = u64::from(before % QUEUE_SIZE);
        Some(self.get(queue.used + 4 + 8 * slot + 4))
    }

    /// Sends a request and returns the answer's body, or its error number.
    pub fn ask(&mut self, opcode: Opcode, node: u64, parts: &[&[u8]]) -> Result<Vec<u8>, i32> {
        self.ask_room(opcode, node, parts, 0x1_0000)
    }

    /// As `ask`, with that much room for the answer.
    pub fn ask_room(
        &mut self,
        opcode: Opcode,
        node: u64,
        parts: &[&[u8]],
        room: u32,
    ) -> Result<Vec<u8>, i32> {
        self.unique += 1;
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let header = InHeader {
            len: (size_of::<InHeader>() + bytes) as u32,
            opcode: opcode as u32,
            unique: self.unique,
            nodeid: node,
            uid: self.ids.0,
            gid: self.ids.1,
            ..InHeader::default()
        };
        let mut chain = Vec::new();
        let mut at = SCRATCH;
        for part in [&[header.as_slice()], parts].concat() {
            self.memory.write_slice(part, GuestAddress(at)).unwrap();
            chain.push(Descriptor::readable(at, part.len() as u32));
            at += part.len() as u64 + 3;
        }
        // The answer in uneven pieces.
        let answer = SCRATCH + 0x10_0000;
        let head = size_of::<OutHeader>() as u32;
        chain.push(Descriptor::writable(answer, 5));
        chain.push(Descriptor::writable(answer + 5, head - 5));
        if room > 0 {
            chain.push(Descriptor::writable(answer + u64::from(head), room));
        }
        let used = self.submit(1, &chain).expect("an answer");
        let out: OutHeader = self.get(answer);
        assert_eq!(used, out.len);
        assert_eq!(out.unique, self.unique);
        let mut body = vec![0; (used - head) as usize];
        self.memory
            .read_slice(&mut body, GuestAddress(answer + u64::from(head)))
            .unwrap();
        if out.error == 0 {
            Ok(body)
        } else {
            assert!(body.is_empty());
            Err(-out.error)
        }
    }

    /// Forgets one lookup of a file.
    pub fn forget(&mut self, node: u64) {
        let header = InHeader {
            len: 48,
            opcode: Opcode::Forget as u32,
            nodeid: node,
            ..InHeader::default()
        };
        self.put(SCRATCH, header);
        self.put(SCRATCH + 40, 1_u64);
        // It has no answer.
        let used = self.submit(0, &[Descriptor::readable(SCRATCH, 48)]);
        assert_eq!(used, Some(0));
    }

    /// Begins a session as a Linux guest does.
    pub fn init(&mut self) -> InitOut {
        let asked = InitIn {
            major: 7,
            minor: 45,
            max_readahead: 128 << 10,
            flags: u32::MAX,
            flags2: u32::MAX,
            ..InitIn::default()
        };
        let out = self.ask(Opcode::Init, 0, &[asked.as_slice()]).unwrap();
        let out: InitOut = object(&out);
        assert_ne!(u64::from(out.flags) & init::SUBMOUNTS, 0);
        out
    }

    /// Closes the connection and waits for the server's end.
    pub fn hang_up(self) -> ExitStatus {
        let Self {
            mut child,
            front_end,
            ..
        } = self;
        drop(front_end);
        wait(&mut child)
    }
}

/// Waits for the end of a process that is about to end.
pub fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the server did not end");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The structure at the start of an answer.
pub fn object<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut object = T::default();
    object
        .as_mut_slice()
        .copy_from_slice(&bytes[..size_of::<T>()]);
    object
}

/// Duplicates a descriptor, for tests that hand out odd ones.
pub fn event_fd(file: File) -> EventFd {
    use std::os::fd::IntoRawFd;
    // SAFETY: the descriptor is owned by nobody else.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}
