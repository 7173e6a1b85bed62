//! The device thread: what the devices' working halves do with the host.

use super::{Allowed, any, only};

/// linux/fs.h.
const BLKDISCARD: u64 = 0x1277;

/// linux/if_tun.h.
const TUNSETOFFLOAD: u64 = 0x4004_54d0;

pub(super) const ALLOWED: &[Allowed] = &[
    // Waits for queues and the devices' own descriptors; a new set when one of
    // those was closed while somebody else holds it.
    any(libc::SYS_epoll_wait),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_epoll_create1),
    // Console pipe, tap, vsock streams, disks: from and to guest memory.
    any(libc::SYS_readv),
    any(libc::SYS_writev),
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev2),
    // The driver chooses a tap's offloads.
    only(libc::SYS_ioctl, 1, &[TUNSETOFFLOAD]),
    // vsock streams: without SIGPIPE, and one direction's end.
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    any(libc::SYS_shutdown),
    // A shared file system's server is told to stop and to go on.
    any(libc::SYS_recvfrom),
    any(libc::SYS_ppoll),
    // Disks: flush, discard, write zeroes.
    any(libc::SYS_fdatasync),
    any(libc::SYS_fallocate),
    only(libc::SYS_ioctl, 1, &[BLKDISCARD]),
    // A limit: wakes when there are tokens again.
    any(libc::SYS_timerfd_settime),
    // Disks: requests in flight.
    any(libc::SYS_io_uring_enter),
];
