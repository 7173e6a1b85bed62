//! Whether guest memory is pinned for devices of the node. Taking memory from the
//! guest would leave such a device with pages that are the guest's no more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many have memory pinned.
#[derive(Clone, Debug, Default)]
pub struct Pins(Arc<Mutex<usize>>);

impl Pins {
    /// Somebody is about to pin memory. Nobody takes any when this returns.
    pub fn add(&self) {
        *self.lock() += 1;
    }

    /// Somebody pins none any more.
    pub fn remove(&self) {
        let mut pins = self.lock();
        *pins = pins.saturating_sub(1);
    }

    /// Takes memory from the guest, unless some is pinned; nobody pins any meanwhile.
    pub(crate) fn unless_any(&self, take: impl FnOnce()) {
        let pins = self.lock();
        if *pins == 0 {
            take();
        }
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
