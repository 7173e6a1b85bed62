//! What a running VMM may hold: the written list of its descriptors, against
//! which those that are open are checked before the guest runs.
//!
//! Nothing on it leads to another file: a directory or a path would.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use husk_vmm_spec::CONTROL_FD;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, major, minor};
use rustix::net::AddressFamily;

/// A descriptor that is not on the list.
#[derive(Debug, thiserror::Error)]
#[error("descriptor {fd} is {what}, which no VMM may hold")]
pub struct Unlisted {
    fd: RawFd,
    what: String,
}

/// Character devices, by their numbers (Documentation/admin-guide/devices.txt).
const NULL: (u32, u32) = (1, 3);
const KVM: (u32, u32) = (10, 232);
const TUN: (u32, u32) = (10, 200);

/// More than are closed again while a machine starts.
const AT_ONCE: usize = 1024;

/// `O_PATH` of asm-generic/fcntl.h.
const O_PATH: i32 = 0o10_000_000;

/// Checks every descriptor below `most`.
///
/// # Errors
/// One is not on the list, or the kernel does not say what it is.
pub fn check(most: u64) -> io::Result<()> {
    let most = RawFd::try_from(most).map_err(io::Error::other)?;
    for fd in open(most)? {
        // SAFETY: open, and closed by nobody meanwhile: processors and devices
        // wait for the machine's start.
        let descriptor = unsafe { BorrowedFd::borrow_raw(fd) };
        if let Some(what) = objection(descriptor)? {
            return Err(io::Error::other(Unlisted { fd, what }));
        }
    }
    Ok(())
}

/// Those that are open, found with few calls: there is no /proc to look at. The
/// kernel gives the lowest number that is free, and the jail began with none but the
/// first four, so that none is open behind many that are not: they need not all be
/// asked for, which would be a tenth of the time that a restored machine has.
fn open(most: RawFd) -> io::Result<Vec<RawFd>> {
    let mut all = Vec::new();
    for start in (0..most).step_by(AT_ONCE) {
        let end = most.min(start.saturating_add(AT_ONCE as RawFd));
        let found = open_in(start..end)?;
        if found.is_empty() {
            break;
        }
        all.extend(found);
    }
    Ok(all)
}

fn open_in(numbers: Range<RawFd>) -> io::Result<Vec<RawFd>> {
    // SAFETY: the kernel says of each whether it is open.
    let borrowed = numbers
        .clone()
        .map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
    let mut fds: Vec<PollFd<'_>> = borrowed
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::empty()))
        .collect();
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&at_once))?;
    let is_open = |(_, fd): &(RawFd, &PollFd<'_>)| !fd.revents().contains(PollFlags::NVAL);
    let found = numbers.zip(&fds).filter(is_open);
    Ok(found.map(|(fd, _)| fd).collect())
}

/// What is wrong with a descriptor.
fn objection(fd: BorrowedFd<'_>) -> io::Result<Option<String>> {
    let stat = rustix::fs::fstat(fd)?;
    if rustix::fs::fcntl_getfl(fd)?.bits() as i32 & O_PATH != 0 {
        return Ok(Some("a path".into()));
    }
    let number = fd.as_raw_fd();
    let standard_stream = (0..CONTROL_FD).contains(&number);
    let device = (major(stat.st_rdev), minor(stat.st_rdev));
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice if standard_stream && device == NULL => None,
        _ if standard_stream => Some("a standard stream that leads somewhere".into()),
        // Control socket, vsock streams, a file system's server.
        FileType::Socket => match rustix::net::sockopt::socket_domain(fd)? {
            AddressFamily::UNIX => None,
            family => Some(format!("a socket of family {}", family.as_raw())),
        },
        _ if number == CONTROL_FD => Some("no control socket".into()),
        FileType::CharacterDevice if [KVM, TUN].contains(&device) => None,
        FileType::CharacterDevice => Some(format!("character device {}:{}", device.0, device.1)),
        // Guest memory, shadows and disks; the console, and what wakes a shadow.
        FileType::RegularFile | FileType::BlockDevice | FileType::Fifo => None,
        // Anonymous inodes have no type: the machine and its processors, events,
        // the loops' sets, the disks' rings and limits' timers.
        FileType::Unknown if stat.st_mode & libc::S_IFMT == 0 => None,
        kind => Some(format!("a {kind:?}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::net::TcpListener;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    /// Of a copy whose number is not the control socket's.
    fn of(fd: impl AsFd) -> Option<String> {
        let copy = rustix::io::fcntl_dupfd_cloexec(fd, CONTROL_FD + 1).unwrap();
        objection(copy.as_fd()).unwrap()
    }

    #[test]
    fn only_what_is_listed_passes() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        let (socket, _) = UnixStream::pair().unwrap();
        assert_eq!(of(reader), None);
        assert_eq!(of(writer), None);
        assert_eq!(of(event), None);
        assert_eq!(of(socket), None);
        assert_eq!(of(tempfile::tempfile().unwrap()), None);

        let path = |path| {
            let flags = rustix::fs::OFlags::PATH;
            rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap()
        };
        let said = |fd: &dyn AsFd| of(fd.as_fd()).unwrap_or_default();
        assert_eq!(said(&File::open("/").unwrap()), "a Directory");
        assert_eq!(said(&path("/")), "a path");
        assert_eq!(said(&path("/etc/passwd")), "a path");
        assert_eq!(
            said(&File::open("/dev/zero").unwrap()),
            "character device 1:5"
        );
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(said(&listener), "a socket of family 2");
    }

    #[test]
    fn finds_what_is_open() {
        let file = tempfile::tempfile().unwrap();
        let fd = file.as_raw_fd();
        assert!(open(4096).unwrap().contains(&fd));
        assert!(!open(fd).unwrap().contains(&fd));
        // In the second round as well, and no further than asked.
        let high = AT_ONCE as RawFd + 7;
        let copy = rustix::io::fcntl_dupfd_cloexec(&file, high).unwrap();
        let number = copy.as_raw_fd();
        assert!(open(4096).unwrap().contains(&number));
        assert!(!open(number).unwrap().contains(&number));
    }
}
