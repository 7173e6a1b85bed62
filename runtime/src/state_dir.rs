//! A pod's directory on the node, with the small file from which `delete`
//! cleans up after a shim that was killed.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use husk_node::shell;
use husk_node::state::FILE;
pub use husk_node::state::State;
use husk_node::trace;

use crate::id::Id;

/// What [`FILE`] is before it is complete.
const NEW_FILE: &str = "state.new";

/// Where the pod's shared tree is mounted.
const SHARED: &str = "shared";

/// The directory of a pod. It stays until [`StateDir::remove`].
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

/// The directory could not be used.
#[derive(Debug, thiserror::Error)]
#[error("pod's directory {path}")]
pub struct StateDirError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl StateDir {
    /// The directory of a pod, made or not.
    pub fn new(root: &Path, namespace: &Id, pod: &Id) -> Self {
        Self {
            path: root.join(namespace.as_str()).join(pod.as_str()),
        }
    }

    /// Makes it.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn create(&self) -> Result<(), StateDirError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o711);
        let made = match builder.create(&self.path) {
            // Another shim has just removed the parents, which were empty.
            Err(error) if error.kind() == io::ErrorKind::NotFound => builder.create(&self.path),
            made => made,
        };
        made.and_then(|()| fs::set_permissions(&self.path, Permissions::from_mode(0o700)))
            .map_err(|source| self.error(source))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the pod's shared tree is mounted.
    pub fn shared(&self) -> PathBuf {
        self.path.join(SHARED)
    }

    /// Replaces the state in one step.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn write(&self, state: &State) -> Result<(), StateDirError> {
        let new = self.path.join(NEW_FILE);
        serde_json::to_vec(state)
            .map_err(io::Error::from)
            .and_then(|text| fs::write(&new, text))
            .and_then(|()| fs::rename(&new, self.path.join(FILE)))
            .map_err(|source| self.error(source))
    }

    /// What was last written; none without the directory.
    pub fn read(&self) -> Option<State> {
        State::read(&self.path).ok()
    }

    /// Removes it, and the namespace's when it was the last. Only what is ours
    /// and empty goes, never recursively: if something is still mounted below,
    /// that is somebody's volume, and the directory stays.
    pub fn remove(&self) {
        let removals = [
            fs::remove_file(self.path.join(NEW_FILE)),
            fs::remove_file(self.path.join(FILE)),
            fs::remove_file(self.path.join(shell::SOCKET)),
            fs::remove_file(self.path.join(trace::NEW_FILE)),
            fs::remove_file(self.path.join(trace::FILE)),
            fs::remove_dir(self.shared()),
            fs::remove_dir(&self.path),
        ];
        for error in removals.into_iter().filter_map(Result::err) {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %self.path.display(), %error, "pod's directory stays");
            }
        }
        // The namespace's and the one of all; it fails while there are other
        // pods, as it should.
        for dir in self.path.ancestors().skip(1).take(2) {
            let _ = fs::remove_dir(dir);
        }
    }

    fn error(&self, source: io::Error) -> StateDirError {
        StateDirError {
            path: self.path.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_mount::{HostMount, own_namespace};

    #[test]
    fn keeps_state_until_removed() {
        let root = tempfile::tempdir().unwrap();
        let id = Id::new("id", "p").unwrap();
        let dir = StateDir::new(root.path(), &id, &id);
        assert_eq!(dir.read(), None);
        dir.create().unwrap();
        let state = State {
            cgroup: Some("/a/b".into()),
            ..State::default()
        };
        dir.write(&state).unwrap();
        assert_eq!(dir.read(), Some(state));
        dir.remove();
        assert!(!root.path().exists());
    }

    #[test]
    fn leaves_what_is_mounted_below_alone() {
        if !own_namespace() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let volume = tempfile::tempdir().unwrap();
        fs::write(volume.path().join("file"), "precious").unwrap();
        let id = Id::new("id", "p").unwrap();
        let dir = StateDir::new(root.path(), &id, &id);
        dir.create().unwrap();
        fs::create_dir(dir.shared()).unwrap();
        let tree = HostMount::shared_tmpfs(&dir.shared()).unwrap();
        let target = dir.shared().join("volume");
        fs::create_dir(&target).unwrap();
        let bound = HostMount::new("bind", volume.path(), &target, &[]).unwrap();
        dir.remove();
        assert_eq!(fs::read(target.join("file")).unwrap(), b"precious");
        drop((bound, tree));
        dir.remove();
        assert!(!root.path().exists());
    }
}
