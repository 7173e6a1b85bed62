//! Why the machine ends: the first reason that anybody gives.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use husk_vmm_spec::{ExitReason, Failure};
use rustix::event::EventfdFlags;

/// Set once, by whichever thread sees the end first; wakes the main thread.
pub struct ExitLatch {
    reason: Mutex<Option<ExitReason>>,
    event: std::os::fd::OwnedFd,
}

impl ExitLatch {
    /// Makes a latch that nobody has set.
    ///
    /// # Errors
    /// No event descriptor to be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            reason: Mutex::new(None),
            event: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Ends the machine for `reason`, unless it is ending already.
    pub fn set(&self, reason: ExitReason) {
        let mut slot = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert(reason);
        // The counter can't overflow: it's written once a set, and read as a flag.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// The reason, once there is one.
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl AsFd for ExitLatch {
    /// Readable once there is a reason.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// An error and its causes as one sentence for the operator.
pub fn describe(error: &dyn std::error::Error) -> Failure {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message.push_str(": ");
        message.push_str(&error.to_string());
        cause = error.source();
    }
    Failure { message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let latch = ExitLatch::new().unwrap();
        assert_eq!(latch.reason(), None);
        latch.set(ExitReason::Panic);
        latch.set(ExitReason::Reset);
        assert_eq!(latch.reason(), Some(ExitReason::Panic));
    }
}
