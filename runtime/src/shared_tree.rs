//! The tree that a pod shares with its guest: a tmpfs into which root file
//! systems, one directory a container, and volumes are mounted. The file server
//! shows it and nothing else.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_protocol::path;

use crate::host_mount::HostMount;
use crate::id::Id;
use crate::mirror::PodMirrors;
use crate::shared_volume::{SharedVolumes, VolumeUse};

/// Name of a container's root in its directory.
pub const ROOTFS: &str = "rootfs";

/// Name of the directory in which its root's overlay writes, when the guest
/// mounts that: the file server lets nothing be changed in it but what is in its
/// directories (`fs/src/area.rs`).
pub const LAYERS: &str = "layers";

/// The tree of a pod. Unmounted when the last of its users is dropped.
#[derive(Clone, Debug)]
pub struct SharedTree {
    mounts: Arc<Mounts>,
    volumes: Arc<SharedVolumes>,
    mirrors: Arc<PodMirrors>,
}

/// First the tree goes, then what it lies in.
#[derive(Debug)]
struct Mounts {
    tree: HostMount,
    /// Keeps the tree out of copies of what it lies in: it has copies in it.
    _around: Option<HostMount>,
}

/// What a container has in the tree. Gone when dropped, volumes unless others
/// use them.
#[derive(Debug)]
pub struct ContainerTree {
    dir: PathBuf,
    guest_dir: String,
    root: Option<HostMount>,
    volumes: Vec<VolumeUse>,
    /// It lies in this, which must stay as long.
    tree: SharedTree,
}

/// The tree could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[error("pod's shared tree {path}")]
pub struct SharedTreeError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Names the path.
pub fn error(path: &Path) -> impl FnOnce(io::Error) -> SharedTreeError {
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
        let around = path.parent().map(HostMount::unbindable).transpose();
        let mounts = Mounts {
            _around: around.map_err(error(path))?,
            tree: HostMount::shared_tmpfs(path).map_err(error(path))?,
        };
        Ok(Self {
            mounts: Arc::new(mounts),
            volumes: Arc::new(SharedVolumes::create(path)?),
            mirrors: Arc::default(),
        })
    }

    /// A directory as if it was the mount.
    #[cfg(test)]
    pub fn pretended(path: &Path) -> Self {
        let mounts = Mounts {
            tree: HostMount::attached(path),
            _around: None,
        };
        Self {
            mounts: Arc::new(mounts),
            volumes: Arc::new(SharedVolumes::create(path).unwrap()),
            mirrors: Arc::default(),
        }
    }

    /// The pod's volumes.
    pub fn volumes(&self) -> &Arc<SharedVolumes> {
        &self.volumes
    }

    /// The pod's volumes of which the guest has copies.
    pub fn mirrors(&self) -> &Arc<PodMirrors> {
        &self.mirrors
    }

    /// Where it is on the node.
    pub fn path(&self) -> &Path {
        self.mounts.tree.target()
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
            root: None,
            volumes: Vec::new(),
            tree: tree.clone(),
        })
    }

    /// Makes the directory on which the root is mounted: [`ROOTFS`] or
    /// [`LAYERS`].
    ///
    /// # Errors
    /// The tree is full.
    pub fn add_root(&self, name: &str) -> Result<PathBuf, SharedTreeError> {
        let path = self.dir.join(name);
        fs::create_dir(&path).map_err(error(&path))?;
        Ok(path)
    }

    /// Keeps the root, with all that is mounted in it; the guest's path.
    pub fn keep_root(&mut self, root: HostMount) -> String {
        let guest = self.guest_path(&root);
        self.root = Some(root);
        guest
    }

    fn guest_path(&self, root: &HostMount) -> String {
        let name = root
            .target()
            .strip_prefix(&self.dir)
            .unwrap_or(Path::new(ROOTFS));
        format!("{}/{}", self.guest_dir, name.display())
    }

    /// Keeps a volume.
    pub fn keep_volume(&mut self, volume: VolumeUse) {
        self.volumes.push(volume);
    }

    /// The tree that it lies in.
    pub fn tree(&self) -> &SharedTree {
        &self.tree
    }

    /// Gives up what it has; the guest's paths of that which nobody else uses.
    /// Ask once the guest is to let go of it, and let it before this is dropped.
    pub fn give_up(&mut self) -> Vec<String> {
        let root = self.root.as_ref().map(|root| self.guest_path(root));
        let volumes = self.volumes.iter_mut().filter_map(VolumeUse::give_up);
        root.into_iter().chain(volumes).collect()
    }
}

impl Drop for ContainerTree {
    fn drop(&mut self) {
        self.volumes.clear();
        self.root = None;
        // Not recursively: a mount that stayed must not lose its content.
        let made = [
            self.dir.join(ROOTFS),
            self.dir.join(LAYERS),
            self.dir.clone(),
        ];
        for dir in made {
            match fs::remove_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %dir.display(), %error, "container's tree stays");
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_what_it_made_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let id = Id::new("container", "c").unwrap();
        let shared = SharedTree::pretended(dir.path());
        let tree = ContainerTree::create(&shared, &id).unwrap();
        tree.add_root(ROOTFS).unwrap();
        tree.add_root(LAYERS).unwrap();
        drop(tree);
        assert!(!dir.path().join("c").exists());

        let mut tree = ContainerTree::create(&shared, &id).unwrap();
        assert!(tree.give_up().is_empty());
        let kept = tree.add_root(ROOTFS).unwrap();
        let guest = tree.keep_root(HostMount::attached(&kept));
        assert_eq!(guest, "/run/husk/shared/c/rootfs");
        assert_eq!(tree.give_up(), [guest]);
        fs::write(kept.join("file"), "precious").unwrap();
        drop(tree);
        assert_eq!(fs::read(kept.join("file")).unwrap(), b"precious");
    }
}
