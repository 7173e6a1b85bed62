//! The tree that a pod shares with its guest: a tmpfs into which root file
//! systems and volumes are bound, one directory a container. The file server
//! shows it and nothing else.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_protocol::path;

use crate::host_mount::HostMount;
use crate::id::Id;

/// Name of a container's root in its directory.
pub const ROOTFS: &str = "rootfs";

/// Name of the directory of a container's volumes.
pub const MOUNTS: &str = "mounts";

/// The tree of a pod. Unmounted when the last of its users is dropped.
#[derive(Clone, Debug)]
pub struct SharedTree {
    mount: Arc<HostMount>,
}

/// A container's directory in the tree. Gone, with all that was mounted there,
/// when dropped.
#[derive(Debug)]
pub struct ContainerTree {
    dir: PathBuf,
    guest_dir: String,
    mounts: Vec<HostMount>,
    /// It lies in this, which must stay as long.
    _tree: SharedTree,
}

/// The tree could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[error("pod's shared tree {path}")]
pub struct SharedTreeError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn error(path: &Path) -> impl FnOnce(io::Error) -> SharedTreeError {
    let path = path.to_owned();
    |source| SharedTreeError { path, source }
}

impl SharedTree {
    /// Mounts an empty tree at `path`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn create(path: &Path) -> Result<Self, SharedTreeError> {
        fs::create_dir_all(path).map_err(error(path))?;
        let mount = HostMount::shared_tmpfs(path).map_err(error(path))?;
        Ok(Self {
            mount: Arc::new(mount),
        })
    }

    /// A directory as if it was the mount.
    #[cfg(test)]
    pub fn pretended(path: &Path) -> Self {
        Self {
            mount: Arc::new(HostMount::attached(path)),
        }
    }

    /// Where it is on the node.
    pub fn path(&self) -> &Path {
        self.mount.target()
    }
}

impl ContainerTree {
    /// Makes the directory of `container` in `tree`.
    ///
    /// # Errors
    /// It is there, or the tree is full.
    pub fn create(tree: &SharedTree, container: &Id) -> Result<Self, SharedTreeError> {
        let dir = tree.path().join(container.as_str());
        fs::create_dir(&dir).map_err(error(&dir))?;
        Ok(Self {
            dir,
            guest_dir: format!("{}/{container}", path::SHARED),
            mounts: Vec::new(),
            _tree: tree.clone(),
        })
    }

    /// Makes an empty directory `name`; its paths on the node and in the guest.
    ///
    /// # Errors
    /// The tree is full.
    pub fn add_dir(&self, name: &str) -> Result<(PathBuf, String), SharedTreeError> {
        let path = self.dir.join(name);
        fs::create_dir_all(&path).map_err(error(&path))?;
        Ok((path, format!("{}/{name}", self.guest_dir)))
    }

    /// Makes an empty file `name`; its paths on the node and in the guest.
    ///
    /// # Errors
    /// The tree is full.
    pub fn add_file(&self, name: &str) -> Result<(PathBuf, String), SharedTreeError> {
        let path = self.dir.join(name);
        fs::write(&path, "").map_err(error(&path))?;
        Ok((path, format!("{}/{name}", self.guest_dir)))
    }

    /// Keeps `mount`, which is in this directory.
    pub fn keep(&mut self, mount: HostMount) {
        self.mounts.push(mount);
    }
}

impl Drop for ContainerTree {
    fn drop(&mut self) {
        // The last one mounted may lie in an earlier one.
        while self.mounts.pop().is_some() {}
        if let Err(error) = remove_skeleton(&self.dir) {
            tracing::warn!(path = %self.dir.display(), %error, "container's tree stays");
        }
    }
}

/// Removes the directories and files that this module's callers make, and only
/// them: `rootfs`, `mounts` and what is directly in it. Not recursively, so that
/// a mount that stayed can never lose its content.
fn remove_skeleton(dir: &Path) -> io::Result<()> {
    let (rootfs, mounts) = (dir.join(ROOTFS), dir.join(MOUNTS));
    if rootfs.exists() {
        fs::remove_dir(rootfs)?;
    }
    if mounts.exists() {
        for entry in fs::read_dir(&mounts)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                fs::remove_dir(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        fs::remove_dir(mounts)?;
    }
    fs::remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_what_it_made_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let id = Id::new("container", "c").unwrap();
        let tree = ContainerTree::create(&SharedTree::pretended(dir.path()), &id).unwrap();
        let (_, guest) = tree.add_dir("rootfs").unwrap();
        assert_eq!(guest, "/run/husk/shared/c/rootfs");
        tree.add_dir("mounts").unwrap();
        tree.add_dir("mounts/0").unwrap();
        tree.add_file("mounts/1").unwrap();
        drop(tree);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

        let tree = ContainerTree::create(&SharedTree::pretended(dir.path()), &id).unwrap();
        let (kept, _) = tree.add_dir("mounts/0").unwrap();
        fs::write(kept.join("file"), "precious").unwrap();
        drop(tree);
        assert_eq!(fs::read(kept.join("file")).unwrap(), b"precious");
    }
}
