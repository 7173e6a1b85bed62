//! virtio-fs of a machine whose memory is private: requests and answers pass through
//! a shadow. Both the driver and the file server, which may write all of the shadow,
//! are hostile.
#![no_main]

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use arbitrary::Arbitrary;
use husk_fuzz::driver::{Act, drive};
use husk_virtio::fs::{Fs, PATIENCE, Shadow};
use husk_virtio::pci::{PciFunction, VirtioPci};
use libfuzzer_sys::fuzz_target;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// What the server does.
#[derive(Arbitrary, Clone, Debug)]
enum Host {
    /// Returns requests of a ring as it should, at most so many.
    Serve(u8, u8),
    /// Says that it wrote so much to the next request.
    ServeLong(u8, u32),
    /// Writes into a ring.
    Ring(u8, u16, u16),
    /// Writes anywhere.
    Anywhere(u32, u16),
    /// Wakes the device.
    Call(u8),
    /// When it is stopped next, says that it has come so far.
    Lie(u16),
}

// Requests of vhost-user.
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ENABLE: u32 = 18;
const NEED_REPLY: u32 = 1 << 3;
const REPLY: u32 = 1 | 1 << 2;

/// VERSION_1, protocol features, rings with event indices and indirect tables.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;

/// Of the shadow's rings (`vmm/virtio/src/fs/shadow/ring.rs`).
const SIZE: u16 = 128;
const PAGE: u64 = 4096;
const AVAILABLE: u64 = 2048;
const USED: u64 = 2312;

/// Most for a device that works to start its queues again after a pause.
const MOMENT: Duration = Duration::from_millis(200);

/// Of the shadow.
const BYTES: u32 = 4 << 20;

#[derive(Default)]
struct Server {
    memory: Option<File>,
    calls: [Option<File>; 2],
    /// How far it has come in each ring.
    taken: [u16; 2],
    runs: [bool; 2],
    lie: Option<u16>,
    gone: bool,
}

impl Server {
    fn word(&self, at: u64) -> Option<u16> {
        let mut word = [0; 2];
        self.memory.as_ref()?.read_exact_at(&mut word, at).ok()?;
        Some(u16::from_le_bytes(word))
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        if let Some(memory) = &self.memory {
            // Past the end there is nothing.
            let _ = memory.write_all_at(bytes, at);
        }
    }

    fn call(&self, queue: u8) {
        if let Some(mut call) = self.calls[usize::from(queue % 2)].as_ref() {
            let _ = call.write(&1_u64.to_ne_bytes());
        }
    }

    fn serve(&mut self, queue: u8, most: u8, long: Option<u32>) -> Option<()> {
        let page = u64::from(queue % 2) * PAGE;
        let number = usize::from(queue % 2);
        let available = self.word(page + AVAILABLE + 2)?;
        for _ in 0..most {
            if self.taken[number] == available {
                break;
            }
            let slot = u64::from(self.taken[number] % SIZE);
            let head = self.word(page + AVAILABLE + 4 + 2 * slot)?;
            self.taken[number] = self.taken[number].wrapping_add(1);
            // What it writes to, if there is anything, comes second.
            let room = page + 16 * u64::from(head.wrapping_add(1) % SIZE) + 8;
            let room = u32::from(self.word(room)?) | u32::from(self.word(room + 2)?) << 16;
            let has_room = self.word(page + 16 * u64::from(head % SIZE) + 12)? & 1 != 0;
            let written = long.unwrap_or(if has_room { room } else { 0 });
            let used = self.word(page + USED + 2)?;
            let element = [u32::from(head), written].map(u32::to_le_bytes).concat();
            self.write(page + USED + 4 + 8 * u64::from(used % SIZE), &element);
            self.write(page + USED + 2, &used.wrapping_add(1).to_le_bytes());
        }
        self.call(queue);
        Some(())
    }

    /// The ring that an act serves.
    fn serves(act: &Host) -> Option<usize> {
        match act {
            Host::Serve(queue, _) | Host::ServeLong(queue, _) => Some(usize::from(queue % 2)),
            _ => None,
        }
    }

    fn act(&mut self, act: Host) {
        match act {
            Host::Serve(queue, most) => {
                let _ = self.serve(queue, most, None);
            }
            Host::ServeLong(queue, written) => {
                let _ = self.serve(queue, 1, Some(written));
            }
            Host::Ring(queue, at, value) => {
                let at = u64::from(queue % 2) * PAGE + u64::from(at) % PAGE;
                self.write(at, &value.to_le_bytes());
            }
            Host::Anywhere(at, value) => self.write((at % BYTES).into(), &value.to_le_bytes()),
            Host::Call(queue) => self.call(queue),
            Host::Lie(base) => self.lie = Some(base),
        }
    }

    /// Takes a message; the answer to it, if it wants one.
    fn take(
        &mut self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fd: Option<OwnedFd>,
    ) -> Option<u64> {
        let word = |at: usize| {
            let bytes = payload.get(at..at + 4).unwrap_or(&[0; 4]);
            u32::from_le_bytes(bytes.try_into().expect("four bytes"))
        };
        let (index, value) = (word(0), word(4));
        let queue = index as usize % 2;
        match request {
            1 => return Some(FEATURES),
            15 => return Some(1 << 0 | 1 << 3),
            17 => return Some(2),
            SET_MEM_TABLE => self.memory = fd.map(File::from),
            SET_VRING_BASE => self.taken[queue] = value as u16,
            SET_VRING_CALL => self.calls[queue] = fd.map(File::from),
            SET_VRING_ENABLE => self.runs[queue] = value != 0,
            GET_VRING_BASE => {
                self.runs[queue] = false;
                let base = self.lie.take().unwrap_or(self.taken[queue]);
                return Some(u64::from(index) | u64::from(base) << 32);
            }
            _ => {}
        }
        (flags & NEED_REPLY != 0).then_some(0)
    }
}

/// The server, and word of what has changed about it.
type Shared = Arc<(Mutex<Server>, Condvar)>;

/// Whether a device is at work, or will be when a pause is over.
fn works(function: &mut VirtioPci) -> bool {
    let mut status = [0];
    function.read_bar(0, 0x14, &mut status);
    // DRIVER_OK without NEEDS_RESET.
    status[0] & 0x44 == 4
}

/// Has the server do something; it serves a ring only while that runs.
fn act(shared: &Shared, function: &mut VirtioPci, act: Host) {
    let works = works(function);
    let (server, changed) = &**shared;
    let mut server = server.lock().expect("it lives");
    if let Some(queue) = Server::serves(&act) {
        let waits = |server: &mut Server| works && !server.gone && !server.runs[queue];
        let waited = changed.wait_timeout_while(server, MOMENT, waits);
        server = waited.expect("it lives").0;
        if !server.runs[queue] {
            return;
        }
    }
    server.act(act);
}

/// Until the device hangs up.
fn converse(mut socket: UnixStream, shared: &Shared) -> std::io::Result<()> {
    loop {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut header)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL,
        )?;
        if got.bytes < header.len() {
            return Ok(());
        }
        let fds = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let fd = fds.last();
        let [request, flags, size] =
            [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().expect("four")));
        let mut payload = vec![0; size as usize];
        socket.read_exact(&mut payload)?;
        let (server, changed) = &**shared;
        let mut server = server.lock().expect("it lives");
        let answer = server.take(request, flags, &payload, fd);
        drop(server);
        changed.notify_all();
        if let Some(answer) = answer {
            let header = [request, REPLY, 8].map(u32::to_le_bytes).concat();
            socket.write_all(&[&header[..], &answer.to_le_bytes()].concat())?;
        }
    }
}

fuzz_target!(init: husk_fuzz::start(), |acts: Vec<Act<Host>>| {
    let (near, far) = UnixStream::pair().expect("a pair");
    let shared = Shared::default();
    let theirs = Arc::clone(&shared);
    let talker = thread::spawn(move || {
        let ended = converse(far, &theirs);
        theirs.0.lock().expect("it lives").gone = true;
        theirs.1.notify_all();
        ended
    });
    let device = Fs::new(near.into(), "fuzzed", PATIENCE).expect("it answers");
    let device = device.through(Shadow::new().expect("memory"));
    drive(device, acts, |function, what| act(&shared, function, what));
    let _ = talker.join().expect("it does not panic");
});
