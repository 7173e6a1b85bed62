//! Descriptors of types that do not lend theirs.

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// Lends the descriptor of `event`.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and cannot close it while it is lent.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
