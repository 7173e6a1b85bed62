//! The file server: one FUSE request in, one answer out, no matter how they
//! travel.
//!
//! The guest is not trusted: whatever it sends costs it at most an error. The
//! tree cannot be left, since every path given to the host is one checked
//! component in a directory that was reached the same way.

mod attribute;
mod entry;
mod file;
mod listing;
mod xattr;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;
use vm_memory::ByteValued;

use crate::abi::{self, InHeader, InitIn, InitOut, Opcode, OutHeader, init};
use crate::area::Area;
use crate::buffers::Buffers;
use crate::credentials::Credentials;
use crate::handle::HandleTable;
use crate::host::ProcSelfFd;
use crate::mount_table::MountTable;
use crate::node::NodeTable;

/// Most data of one READ or WRITE.
pub const DATA_BYTES: u32 = 1 << 20;

/// Most arguments of a request other than WRITE: an xattr with its name.
const ARGUMENT_BYTES: usize = (64 << 10) + 4096;

/// Requests that the guest sends in the background at a time (readahead).
const BACKGROUND: u16 = 64;

/// Page size of the guest.
const PAGE_BYTES: u32 = 4096;

/// What is offered to the guest. Not offered, and why: writeback caching (host
/// changes would be overwritten), locks (those of the guest's kernel hold
/// within the pod; a blocking lock would block the server), ALLOW_IDMAP (it
/// takes the caller's ids out of requests, which network file systems need).
const FEATURES: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::SUBMOUNTS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT
    | init::DIRECT_IO_ALLOW_MMAP;

/// What the server needs of its surroundings.
#[derive(Debug)]
pub struct Resources {
    /// The top directory of what is served.
    pub top: OwnedFd,
    /// `/proc/self/fd`.
    pub proc_self_fd: OwnedFd,
    /// `/proc/self/mountinfo`, to let go of what is unmounted.
    pub mountinfo: Option<OwnedFd>,
    /// References to files held open at a time; beyond, they are reopened.
    pub reference_budget: usize,
}

/// The file server.
#[derive(Debug)]
pub struct Server {
    proc_self_fd: ProcSelfFd,
    credentials: Credentials,
    nodes: NodeTable,
    handles: HandleTable,
    mounts: Option<MountTable>,
    session: Option<Session>,
    /// Whether a device's files are made up by the kernel, see `file`.
    synthetic: HashMap<(u32, u32), bool>,
    /// The arguments of the request that is served.
    arguments: Vec<u8>,
    /// The answer to the request that is served, without its header.
    out: Vec<u8>,
}

/// What was agreed upon with the guest.
#[derive(Clone, Copy, Debug)]
struct Session {
    features: u64,
}

/// A request under way.
struct Request<'m> {
    header: InHeader,
    /// What follows the header.
    body: Buffers<'m>,
    /// Where the answer goes, without its header.
    room: Buffers<'m>,
}

/// How an operation has answered.
enum Answer {
    /// The answer is in `Server::out`.
    Out,
    /// That many bytes were put into `Request::room`.
    Room(usize),
    /// The guest expects nothing.
    Silence,
}

impl Server {
    /// A server for the calling thread, whose credentials and working
    /// directory it takes over (see [`Credentials::prepare`]).
    pub fn new(resources: Resources) -> Result<Self, Errno> {
        Ok(Self {
            nodes: NodeTable::new(resources.top, resources.reference_budget)?,
            proc_self_fd: ProcSelfFd::enter(resources.proc_self_fd)?,
            credentials: Credentials::prepare()?,
            handles: HandleTable::default(),
            mounts: resources.mountinfo.map(MountTable::new),
            session: None,
            synthetic: HashMap::new(),
            arguments: Vec::new(),
            out: Vec::new(),
        })
    }

    /// Lets the guest know so many files and no more.
    pub fn know_at_most(&mut self, count: usize) {
        self.nodes.know_at_most(count);
    }

    /// Nodes known, references and files open.
    pub fn counts(&self) -> (usize, usize, usize) {
        (
            self.nodes.count(),
            self.nodes.opened(),
            self.handles.count(),
        )
    }

    /// Polled for `POLLPRI`, tells when to call [`Self::mounts_changed`].
    pub fn mount_table(&self) -> Option<&MountTable> {
        self.mounts.as_ref()
    }

    /// Closes everything that lies in mounts which are no more.
    pub fn mounts_changed(&mut self) {
        // Without the table nothing is let go of, which costs only memory.
        if let Some(Ok(mounts)) = self.mounts.as_ref().map(MountTable::mounts) {
            let gone = self.nodes.revoke(|mount| mounts.contains(&mount));
            self.handles.revoke(&gone);
            // Another file system may get the number of one that is gone.
            self.synthetic.clear();
        }
    }

    /// Serves one request and returns how many bytes of `reply` are filled.
    pub fn handle(&mut self, mut request: Buffers<'_>, mut reply: Buffers<'_>) -> usize {
        let Ok(header) = request.read_object::<InHeader>() else {
            return 0;
        };
        let room = {
            let mut room = reply.clone();
            room.skip(size_of::<OutHeader>());
            room
        };
        let capacity = room.len();
        let mut request = Request {
            header,
            body: request,
            room,
        };
        self.out.clear();
        let answer = self.body_of(&mut request).and_then(|opcode| {
            let silent = matches!(
                opcode,
                Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt
            );
            if !silent && reply.len() < size_of::<OutHeader>() {
                return Err(Errno::IO);
            }
            self.dispatch(opcode, &mut request)
        });
        let (error, bytes) = match answer {
            Ok(Answer::Silence) => return 0,
            Ok(Answer::Room(bytes)) => (0, bytes),
            Ok(Answer::Out) if self.out.len() <= capacity => (0, self.out.len()),
            Ok(Answer::Out) => (-Errno::IO.raw_os_error(), 0),
            Err(error) => (-error.raw_os_error(), 0),
        };
        if error != 0 {
            self.out.clear();
        }
        let total = size_of::<OutHeader>() + bytes;
        let head = OutHeader {
            len: u32::try_from(total).unwrap_or(u32::MAX),
            error,
            unique: header.unique,
        };
        if reply.write(head.as_slice()).is_err() || reply.write(&self.out).is_err() {
            return 0;
        }
        total
    }

    /// Checks the header and cuts the body to what it says.
    fn body_of(&self, request: &mut Request<'_>) -> Result<Opcode, Errno> {
        let body = usize::try_from(request.header.len)
            .ok()
            .and_then(|len| len.checked_sub(size_of::<InHeader>()))
            .filter(|body| *body <= request.body.len())
            .ok_or(Errno::INVAL)?;
        request.body.truncate(body);
        Opcode::new(request.header.opcode).ok_or(Errno::NOSYS)
    }

    fn dispatch(&mut self, opcode: Opcode, request: &mut Request<'_>) -> Result<Answer, Errno> {
        if self.session.is_none() && opcode != Opcode::Init {
            return Err(Errno::IO);
        }
        self.credentials
            .assume(request.header.uid, request.header.gid);
        match opcode {
            Opcode::Init => self.init(request),
            Opcode::Destroy => self.destroy(),
            Opcode::Interrupt => Ok(Answer::Silence),
            Opcode::Forget => self.forget(request),
            Opcode::BatchForget => self.batch_forget(request),

            Opcode::Lookup => self.lookup(request),
            Opcode::Readlink => self.readlink(request),
            Opcode::Symlink => self.symlink(request),
            Opcode::Mknod => self.mknod(request),
            Opcode::Mkdir => self.mkdir(request),
            Opcode::Unlink => self.unlink(request),
            Opcode::Rmdir => self.rmdir(request),
            Opcode::Rename => self.rename(request),
            Opcode::Rename2 => self.rename2(request),
            Opcode::Link => self.link(request),

            Opcode::Getattr => self.getattr(request),
            Opcode::Setattr => self.setattr(request),
            Opcode::Statx => self.statx(request),
            Opcode::Statfs => self.statfs(request),
            Opcode::Setxattr => self.setxattr(request),
            Opcode::Getxattr => self.getxattr(request),
            Opcode::Listxattr => self.listxattr(request),
            Opcode::Removexattr => self.removexattr(request),

            Opcode::Open => self.open(request),
            Opcode::Create => self.create(request),
            Opcode::Tmpfile => self.tmpfile(request),
            Opcode::Read => self.read(request),
            Opcode::Write => self.write(request),
            Opcode::Flush => self.flush(request),
            Opcode::Release => self.release(request),
            Opcode::Fsync => self.fsync(request),
            Opcode::Fallocate => self.fallocate(request),
            Opcode::Lseek => self.lseek(request),
            Opcode::CopyFileRange => self.copy_file_range(request),
            Opcode::Ioctl => Err(Errno::NOTTY),

            Opcode::Opendir => self.opendir(request),
            Opcode::Readdir => self.readdir(request),
            Opcode::Readdirplus => self.readdirplus(request),
            Opcode::Releasedir => self.releasedir(request),
            Opcode::Fsyncdir => self.fsyncdir(request),
            Opcode::Syncfs => self.syncfs(request),
        }
    }

    /// Begins a session; one that was left over ends.
    fn init(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let asked: InitIn = request.body.read_object()?;
        self.end_session();
        let mut out = InitOut {
            major: abi::MAJOR,
            minor: abi::MINOR,
            ..InitOut::default()
        };
        if asked.major > abi::MAJOR {
            // The guest tries again with our version.
            return self.answer(&out);
        }
        if asked.major < abi::MAJOR || asked.minor < abi::OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let offered = u64::from(asked.flags) | (u64::from(asked.flags2) << 32);
        let features = offered & FEATURES;
        out.max_readahead = asked.max_readahead;
        [out.flags, out.flags2] = [features as u32, (features >> 32) as u32];
        out.max_background = BACKGROUND;
        out.congestion_threshold = BACKGROUND / 4 * 3;
        out.max_write = DATA_BYTES;
        out.time_gran = 1;
        out.max_pages = (DATA_BYTES / PAGE_BYTES) as u16;
        self.session = Some(Session { features });
        self.answer(&out)
    }

    fn destroy(&mut self) -> Result<Answer, Errno> {
        self.end_session();
        Ok(Answer::Out)
    }

    fn end_session(&mut self) {
        self.session = None;
        self.handles.clear();
        self.nodes.clear();
    }

    /// Whether a feature was agreed upon.
    fn agreed(&self, feature: u64) -> bool {
        self.session.is_some_and(|s| s.features & feature != 0)
    }

    fn answer<T: ByteValued>(&mut self, out: &T) -> Result<Answer, Errno> {
        self.out.extend_from_slice(out.as_slice());
        Ok(Answer::Out)
    }

    /// Copies the rest of the body, so that the guest cannot change it between
    /// check and use. Give it back to `arguments` to spare an allocation.
    fn take_arguments(&mut self, request: &mut Request<'_>) -> Result<Vec<u8>, Errno> {
        let bytes = request.body.len();
        if bytes > ARGUMENT_BYTES {
            return Err(Errno::TOOBIG);
        }
        let mut arguments = std::mem::take(&mut self.arguments);
        arguments.resize(bytes, 0);
        request.body.read(&mut arguments)?;
        Ok(arguments)
    }

    /// Runs an operation on the arguments of a request.
    fn with_arguments<T>(
        &mut self,
        request: &mut Request<'_>,
        operation: impl FnOnce(&mut Self, &InHeader, &mut &[u8]) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let arguments = self.take_arguments(request)?;
        let result = operation(self, &request.header, &mut arguments.as_slice());
        self.arguments = arguments;
        result
    }

    /// A reference to the node; makes room for it if there is none.
    fn reference(&mut self, id: u64) -> Result<Rc<OwnedFd>, Errno> {
        with_room(&mut self.nodes, |nodes| nodes.reference(id))
    }

    /// The same of what the guest may change: its attributes, and the names in it.
    fn changeable(&mut self, id: u64) -> Result<Rc<OwnedFd>, Errno> {
        match self.nodes.get(id)?.area {
            Area::Layers => Err(Errno::ROFS),
            _ => self.reference(id),
        }
    }
}

/// Runs an operation that opens a descriptor; when the table is full, closes
/// references and tries once more. The guest's own limit is never the cause,
/// so what it is told is that the system is out of files.
fn with_room<T>(
    nodes: &mut NodeTable,
    mut operation: impl FnMut(&mut NodeTable) -> Result<T, Errno>,
) -> Result<T, Errno> {
    match operation(nodes) {
        Err(Errno::MFILE) => {
            nodes.make_room();
            match operation(nodes) {
                Err(Errno::MFILE) => Err(Errno::NFILE),
                other => other,
            }
        }
        other => other,
    }
}

/// A duration in FUSE's two fields.
fn seconds(duration: Duration) -> (u64, u32) {
    (duration.as_secs(), duration.subsec_nanos())
}
