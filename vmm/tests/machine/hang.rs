//! A file of the node that does not answer who reads it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use husk_fs::abi::{Attr, AttrOut, EntryOut, InHeader, InitOut, Opcode, OpenOut, OutHeader};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use vm_memory::ByteValued;

const BYTES: u64 = 1 << 20;
const ROOT: u64 = 1;

/// What the kernel does not find here, it does without.
const ENOSYS: i32 = 38;

/// A file system with one file. Who reads it waits until [`Hang::answer`].
pub struct Hang {
    dir: tempfile::TempDir,
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    asked: bool,
    answers: bool,
}

impl Hang {
    /// None where FUSE cannot be had.
    pub fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mut options = File::options();
        let fuse = options.read(true).write(true).open("/dev/fuse").ok()?;
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            fuse.as_raw_fd()
        );
        let data = std::ffi::CString::new(data).unwrap();
        mount("hang", dir.path(), "fuse", MountFlags::empty(), &*data).ok()?;
        let state = Arc::default();
        let this = Self {
            dir,
            state: Arc::clone(&state),
        };
        thread::spawn(move || serve(fuse, &state));
        Some(this)
    }

    /// The file.
    pub fn file(&self) -> File {
        let mut options = File::options();
        let opened = options.read(true).write(true);
        opened.open(self.dir.path().join("file")).unwrap()
    }

    /// Waits until it is read.
    pub fn await_reader(&self) {
        let (state, changed) = &*self.state;
        let state = state.lock().unwrap();
        let limit = Duration::from_secs(60);
        let waited = changed.wait_timeout_while(state, limit, |state| !state.asked);
        assert!(waited.unwrap().0.asked, "nobody reads it");
    }

    /// All who read it get zeroes.
    pub fn answer(&self) {
        let (state, changed) = &*self.state;
        state.lock().unwrap().answers = true;
        changed.notify_all();
    }
}

impl Drop for Hang {
    fn drop(&mut self) {
        self.answer();
        let _ = unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

fn serve(mut fuse: File, state: &Arc<(Mutex<State>, Condvar)>) {
    let mut buffer = vec![0; 1 << 18];
    while let Ok(count) = fuse.read(&mut buffer) {
        let head = size_of::<InHeader>();
        let request = InHeader::from_slice(&buffer[..head]).copied().unwrap();
        let body = &buffer[head..count];
        let is = |opcode: Opcode| request.opcode == opcode as u32;
        if is(Opcode::Forget) {
            continue;
        }
        if is(Opcode::Read) {
            let mut fuse = fuse.try_clone().unwrap();
            let state = Arc::clone(state);
            // Its length stands behind handle and position.
            let bytes = u32::from_ne_bytes(body[16..20].try_into().unwrap());
            thread::spawn(move || {
                let (state, changed) = &*state;
                let mut asked = state.lock().unwrap();
                asked.asked = true;
                changed.notify_all();
                drop(changed.wait_while(asked, |state| !state.answers).unwrap());
                answer(&mut fuse, request, Ok(&vec![0; bytes as usize]));
            });
            continue;
        }
        let mode = if request.nodeid == ROOT && !is(Opcode::Lookup) {
            0o040_700
        } else {
            0o100_600
        };
        let attr = Attr {
            ino: 2,
            size: BYTES,
            mode,
            nlink: 1,
            ..Attr::default()
        };
        if is(Opcode::Init) {
            let init = InitOut {
                major: 7,
                minor: 31,
                // Else whoever asks not to wait would wait for what is read ahead.
                flags: husk_fs::abi::init::ASYNC_READ as u32,
                max_write: 1 << 16,
                ..InitOut::default()
            };
            answer(&mut fuse, request, Ok(init.as_slice()));
        } else if is(Opcode::Lookup) {
            let entry = EntryOut {
                nodeid: 2,
                attr,
                ..EntryOut::default()
            };
            answer(&mut fuse, request, Ok(entry.as_slice()));
        } else if is(Opcode::Getattr) {
            let found = AttrOut {
                attr,
                ..AttrOut::default()
            };
            answer(&mut fuse, request, Ok(found.as_slice()));
        } else if is(Opcode::Open) {
            // Through the page cache, in which reads are not waited for if asked so.
            let open = OpenOut::default();
            answer(&mut fuse, request, Ok(open.as_slice()));
        } else {
            answer(&mut fuse, request, Err(ENOSYS));
        }
    }
}

fn answer(fuse: &mut File, request: InHeader, answer: Result<&[u8], i32>) {
    let body = answer.unwrap_or_default();
    let header = OutHeader {
        len: (size_of::<OutHeader>() + body.len()) as u32,
        error: answer.err().map_or(0, |errno| -errno),
        unique: request.unique,
    };
    // Whoever asked may have given up.
    let _ = fuse.write_all(&[header.as_slice(), body].concat());
}
