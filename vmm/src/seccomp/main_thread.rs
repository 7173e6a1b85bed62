//! The main thread: control socket, pausing, plugging.

use super::{Allowed, any, only};

pub(super) const ALLOWED: &[Allowed] = &[
    // Waits for requests and the machine's end.
    any(libc::SYS_ppoll),
    // Control packets.
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    // Kicks processors out of the guest.
    any(libc::SYS_tgkill),
    any(libc::SYS_getpid),
];

const _: fn(i64, u8, &'static [u64]) -> Allowed = only;
