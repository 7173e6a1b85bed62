//! A network namespace, and running something inside.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use husk_node::state::NetnsId;
use nix::sched::{CloneFlags, setns};

use super::NetworkError;

/// A network namespace. It is held open, since a path by a pid leads to another
/// once that is another's.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<File>,
    path: PathBuf,
}

impl Netns {
    /// That at `path`.
    ///
    /// # Errors
    /// It is not there, or it is the node's, whose interfaces stay on the node.
    pub fn open(path: &Path) -> Result<Self, NetworkError> {
        let file = File::open(path).map_err(|source| NetworkError::Namespace {
            path: path.to_owned(),
            source,
        })?;
        let held = format!("/proc/self/fd/{}", file.as_raw_fd());
        if NetnsId::of(Path::new(&held)) == NetnsId::of(Path::new("/proc/self/ns/net")) {
            return Err(NetworkError::OfNode);
        }
        Ok(Self {
            file: Arc::new(file),
            path: path.to_owned(),
        })
    }

    /// Runs `work` on a thread of its own that has entered the namespace, since a
    /// namespace belongs to a thread and the caller's must not change.
    ///
    /// # Errors
    /// The namespace cannot be entered, or what `work` says.
    pub(super) fn enter<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, NetworkError> + Send,
    ) -> Result<T, NetworkError> {
        thread::scope(|scope| {
            thread::Builder::new()
                .name("netns".into())
                .spawn_scoped(scope, || {
                    setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|errno| {
                        NetworkError::Namespace {
                            path: self.path.clone(),
                            source: errno.into(),
                        }
                    })?;
                    work()
                })
                .map_err(NetworkError::Thread)?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_node_is_refused() {
        let refused = Netns::open(Path::new("/proc/self/ns/net"));
        assert!(matches!(refused, Err(NetworkError::OfNode)));
        let missing = Netns::open(Path::new("/nowhere"));
        assert!(matches!(missing, Err(NetworkError::Namespace { .. })));
    }

    #[test]
    fn stays_the_same_when_its_path_leads_elsewhere() {
        let mut holder = match std::process::Command::new("unshare")
            .args(["--net", "sleep", "100"])
            .spawn()
        {
            Ok(holder) => holder,
            Err(error) => return println!("SKIPPED: unshare: {error}"),
        };
        let path = format!("/proc/{}/ns/net", holder.id());
        let path = Path::new(&path);
        let opened = (0..100).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            Netns::open(path).ok()
        });
        let id = NetnsId::of(path);
        holder.kill().unwrap();
        holder.wait().unwrap();
        let Some(netns) = opened else {
            return println!("SKIPPED: no network namespace can be made");
        };
        assert!(Netns::open(path).is_err());
        let inside = || Ok(NetnsId::of(Path::new("/proc/thread-self/ns/net")));
        assert_eq!(netns.enter(inside).unwrap(), id);
    }
}
