//! Running something inside a network namespace.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};

use super::NetworkError;

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
