//! The device thread.

use super::{Allowed, any};

pub(super) const ALLOWED: &[Allowed] = &[
    // Waits for queues and the devices' own descriptors.
    any(libc::SYS_epoll_wait),
    any(libc::SYS_epoll_ctl),
];
