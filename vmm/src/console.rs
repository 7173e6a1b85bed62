//! Where the guest's log goes: a pipe that may be slow, full or gone. The guest
//! is never held up by it.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The console's output, shared by all devices that speak on it.
pub struct ConsoleOutput {
    pipe: Option<OwnedFd>,
    dropped: Arc<AtomicU64>,
}

impl ConsoleOutput {
    /// Output to `pipe`; without one all is dropped.
    pub fn new(pipe: Option<OwnedFd>) -> Arc<Self> {
        Arc::new(Self {
            pipe,
            dropped: Arc::default(),
        })
    }

    /// Writes what the pipe takes at once and drops the rest.
    pub fn put(&self, mut bytes: &[u8]) {
        let Some(pipe) = &self.pipe else {
            return;
        };
        while !bytes.is_empty() {
            match rustix::io::write(pipe, bytes) {
                Ok(count @ 1..) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) | Err(_) => {
                    self.dropped
                        .fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    return;
                }
            }
        }
    }

    /// Another descriptor of the pipe.
    ///
    /// # Errors
    /// None is left.
    pub fn share_pipe(&self) -> io::Result<Option<OwnedFd>> {
        self.pipe.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// The counter of bytes that nobody read in time.
    pub fn share_dropped(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.dropped)
    }

    /// Bytes that nobody read in time.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// For vm-superio, which wants a writer of its own.
pub struct SharedOutput(pub Arc<ConsoleOutput>);

impl Write for SharedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
