//! Interrupt vectors that lead nowhere.

use std::io;
use std::sync::Arc;

use husk_virtio::pci::{MsiMessage, MsiVectors};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Counts interrupts and forgets messages.
pub struct Vectors(Vec<Arc<EventFd>>);

impl Vectors {
    /// So many.
    pub fn new(count: usize) -> Self {
        let event = || Arc::new(EventFd::new(EFD_NONBLOCK).expect("an event descriptor"));
        Self((0..count).map(|_| event()).collect())
    }
}

impl MsiVectors for Vectors {
    fn events(&self) -> &[Arc<EventFd>] {
        &self.0
    }

    fn connect(&mut self, vector: u16, _message: MsiMessage) -> io::Result<()> {
        assert!(usize::from(vector) < self.0.len());
        Ok(())
    }

    fn disconnect(&mut self, vector: u16) -> io::Result<()> {
        assert!(usize::from(vector) < self.0.len());
        Ok(())
    }
}
