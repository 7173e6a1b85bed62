//! Data between a socket and guest memory, without a copy of ours in between and
//! without waiting.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::queue::Chain;

const SEND_FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// Sends `len` bytes of a chain's readable buffers from `offset` on; returns how
/// many went.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    chain: &Chain,
    offset: usize,
    len: usize,
) -> io::Result<usize> {
    let mut pieces = chain.readable_iovecs(offset, len);
    let message = message(&mut pieces);
    // SAFETY: `message` names `pieces`, which lie in guest memory that the chain
    // keeps mapped; there are at most UIO_MAXIOV of them.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &message, SEND_FLAGS) })
}

/// Sends bytes of our own; returns how many went. By the same system call, so that
/// the thread needs no other.
pub(super) fn send_bytes(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let mut pieces = [libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }];
    let message = message(&mut pieces);
    // SAFETY: `message` names `bytes`, which the call only reads.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &message, SEND_FLAGS) })
}

/// Receives at most `len` bytes into a chain's writable buffers from `offset` on;
/// returns how many came, 0 at the end.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    chain: &Chain,
    offset: usize,
    len: usize,
) -> io::Result<usize> {
    let mut pieces = chain.writable_iovecs(offset, len);
    let mut message = message(&mut pieces);
    // SAFETY: as above; the guest expects this memory to change, and no Rust
    // reference to it exists.
    retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
}

fn message(pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a valid msghdr: null pointers and zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len() as _;
    message
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
