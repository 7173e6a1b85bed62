//! The file server: one process a pod, which shows the shared tree to the guest
//! and sees nothing else.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::time::timeout;

use crate::child::Child;
use crate::process::Process;
use crate::vm_process::VmError;

/// How long the server may take to end after the machine has.
const PATIENCE: Duration = Duration::from_millis(500);

/// A running file server. It ends when the machine does.
#[derive(Debug)]
pub struct FileServer {
    child: Child,
}

impl FileServer {
    /// Starts the program under `uid` on the tree at `source`; the socket is for
    /// the VMM. What it has to say goes to `complaints`.
    ///
    /// # Errors
    /// The program is not there or cannot be executed.
    pub async fn spawn(
        path: &PathBuf,
        uid: u32,
        source: &Path,
        complaints: OwnedFd,
    ) -> Result<(Self, OwnedFd), VmError> {
        let fail = |source: io::Error| VmError::Open {
            what: "file server",
            path: path.clone(),
            source,
        };
        let (near, far) = UnixStream::pair().map_err(fail)?;
        let mut command = Command::new(path);
        command
            .args(["--socket-fd", "3", "--source"])
            .arg(source)
            .args(["--uid", &uid.to_string(), "--gid", &uid.to_string()])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(complaints);
        let child = Child::spawn(command, near.into()).await.map_err(fail)?;
        Ok((Self { child }, far.into()))
    }

    /// The process on the node.
    pub fn process(&self) -> Process {
        self.child.process()
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        self.child.wait().await;
    }

    /// Sees to it that it has ended, once the machine has.
    pub async fn end(self) {
        if timeout(PATIENCE, self.child.wait()).await.is_err() {
            self.child.kill();
            self.child.wait().await;
        }
    }
}
