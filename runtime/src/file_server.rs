//! The file server: one process a pod, which shows the shared tree to the guest
//! and sees nothing else.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::child::{AFTER_KILL, Child, Program};
use crate::config::Patience;
use crate::process::Process;
use crate::vm_process::VmError;

/// How long the server may take to end after the machine has.
const PATIENCE: Duration = Duration::from_millis(500);

/// A running file server. It ends when the machine does.
#[derive(Debug)]
pub struct FileServer {
    child: Child,
    /// It did not end, though it was killed.
    is_stuck: AtomicBool,
}

/// How many files a guest may know: its kernel keeps over 1 KiB for each, the server
/// less than half of that, which a guest that lies makes it keep and has nothing itself.
fn nodes(memory_mib: u32) -> u32 {
    const BY_MIB: u32 = 1024;
    // All ones is no number for the server.
    memory_mib
        .saturating_mul(BY_MIB)
        .clamp(BY_MIB, u32::MAX - 1)
}

impl FileServer {
    /// Starts the program on the tree at `source`, for a guest that has at most so
    /// much memory; the socket is for the VMM.
    ///
    /// # Errors
    /// The program is not there or cannot be executed.
    pub async fn spawn(
        program: Program<'_>,
        source: &Path,
        memory_mib: u32,
    ) -> Result<(Self, OwnedFd), VmError> {
        let path = program.path;
        let fail = |source: io::Error| VmError::Open {
            what: "file server",
            path: path.to_owned(),
            source,
        };
        let (near, far) = UnixStream::pair().map_err(fail)?;
        let nodes = nodes(memory_mib).to_string();
        let arguments = [
            OsStr::new("--socket-fd"),
            OsStr::new("3"),
            OsStr::new("--source"),
            source.as_os_str(),
            OsStr::new("--nodes"),
            OsStr::new(&nodes),
        ];
        let child = Child::spawn(program, &arguments, near.into())
            .await
            .map_err(fail)?;
        let server = Self {
            child,
            is_stuck: AtomicBool::new(false),
        };
        Ok((server, far.into()))
    }

    /// The process on the node.
    pub fn process(&self) -> Process {
        self.child.process()
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        self.child.wait().await;
    }

    /// Sees to it that it ends, once the machine has. Nobody waits long a second time for
    /// one that did not.
    pub async fn end(&self, patience: Patience) {
        let after_kill = match self.is_stuck.load(Ordering::Relaxed) {
            true => Duration::ZERO,
            false => patience.of(AFTER_KILL),
        };
        let has_ended = self.child.end(PATIENCE, after_kill).await;
        self.is_stuck.store(!has_ended, Ordering::Relaxed);
    }
}
