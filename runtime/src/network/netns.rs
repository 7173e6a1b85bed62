//! Running something inside a network namespace.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use super::NetworkError;

/// What tells a namespace from all others as long as it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

impl NetnsId {
    /// That of the namespace at `path`, if there is one.
    pub fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

/// Runs `work` on a thread of its own that has entered the namespace at `path`,
/// since a namespace belongs to a thread and the caller's must not change.
///
/// # Errors
/// The namespace cannot be entered, or what `work` says.
pub(super) fn in_netns<T: Send>(
    path: &Path,
    work: impl FnOnce() -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    let fail = |source| NetworkError::Namespace {
        path: path.to_owned(),
        source,
    };
    let namespace = File::open(path).map_err(fail)?;
    thread::scope(|scope| {
        thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
                    .map_err(|errno| fail(errno.into()))?;
                work()
            })
            .map_err(NetworkError::Thread)?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
