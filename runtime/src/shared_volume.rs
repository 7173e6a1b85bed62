//! The volumes in a pod's shared tree. Each source is mounted there once,
//! however many containers use it, as long as the same is mounted below it: the
//! guest then sees one file system, in which their fifos, sockets, locks and
//! mapped memory meet.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_protocol::path;

use crate::host_mount::HostMount;
use crate::id_map::IdMaps;
use crate::mount_copy::{CopyOptions, FileIdentity, MountCopy, ReadOnly};
use crate::mounts_below::mounts_below;
use crate::shared_tree::{SharedTreeError, error};

/// Name of their directory in the tree. No container has such a name.
pub const VOLUMES: &str = ".volumes";

/// All volumes of a pod.
#[derive(Debug)]
pub struct SharedVolumes {
    tree: PathBuf,
    dir: PathBuf,
    table: Mutex<Table>,
}

/// A container's use of a volume. Given up when dropped; the last one of a
/// volume unmounts it.
#[derive(Debug)]
pub struct VolumeUse {
    key: Key,
    export: Arc<Export>,
    volumes: Arc<SharedVolumes>,
    given_up: bool,
}

#[derive(Debug, Default)]
struct Table {
    /// Names are not used again: the guest may still know the old ones.
    next: u64,
    entries: BTreeMap<Key, Entry>,
}

/// What makes two volumes the same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    file: FileIdentity,
    below: u64,
    options: CopyOptions,
    id_maps: Option<IdMaps>,
    read_only: ReadOnly,
}

#[derive(Debug)]
struct Entry {
    users: usize,
    export: Arc<Export>,
}

/// A mounted volume: first the mount goes, then its mount point.
#[derive(Debug)]
struct Export {
    _mount: HostMount,
    point: MountPoint,
}

#[derive(Debug)]
struct MountPoint {
    name: u64,
    path: PathBuf,
    is_dir: bool,
}

impl SharedVolumes {
    /// Makes their directory in the tree at `tree`.
    ///
    /// # Errors
    /// The tree is full.
    pub fn create(tree: &Path) -> Result<Self, SharedTreeError> {
        let dir = tree.join(VOLUMES);
        fs::create_dir_all(&dir).map_err(error(&dir))?;
        Ok(Self {
            tree: tree.to_owned(),
            dir,
            table: Mutex::default(),
        })
    }

    /// A digest of what the node has mounted below `source`, where that becomes a
    /// part of the copy and stays as it is. Ask before the copy is made: it then
    /// holds at least that.
    ///
    /// # Errors
    /// The source is not there.
    pub fn mounts_below(&self, source: &Path, options: CopyOptions) -> io::Result<u64> {
        match options.recursive && !options.follows {
            // No copy has the tree itself.
            true => mounts_below(source, &self.tree),
            false => Ok(0),
        }
    }

    /// Shows `copy` to the guest, or what shows the same already, with the same
    /// mounted `below` it.
    ///
    /// A volume that may not be written to is held read-only here, since the
    /// guest's kernel may be hostile. Not so where the pod may write to the same
    /// source anyway: one container does already, or, with `of_pod`, the source
    /// exists for this pod alone. Being read-only is then between its containers
    /// and seen to by the guest's own flag, and they share one file system.
    ///
    /// # Errors
    /// The tree is full or the kernel refuses.
    pub fn share(
        self: &Arc<Self>,
        copy: MountCopy,
        below: u64,
        read_only: ReadOnly,
        of_pod: bool,
    ) -> Result<VolumeUse, SharedTreeError> {
        let fail = error(&self.dir);
        let (file, is_dir) = match (copy.identity(), copy.file_type()) {
            (Ok(file), Ok(kind)) => (file, kind.is_dir()),
            (Err(source), _) | (_, Err(source)) => return Err(fail(source)),
        };
        let writable = Key {
            file,
            below,
            options: copy.options(),
            id_maps: copy.id_maps().cloned(),
            read_only: ReadOnly::No,
        };
        // Nothing below waits for a disk: the source has been opened.
        let mut table = self.lock();
        let key = if of_pod || table.entries.contains_key(&writable) {
            writable
        } else {
            Key {
                read_only,
                ..writable
            }
        };
        let export = match table.entries.get_mut(&key) {
            Some(entry) => {
                entry.users += 1;
                Arc::clone(&entry.export)
            }
            None => {
                let name = table.next;
                table.next += 1;
                let point = MountPoint::create(&self.dir, name, is_dir)?;
                let mount = copy
                    .forbid_writing(key.read_only)
                    .and_then(|()| copy.attach(&point.path))
                    .map(|()| HostMount::attached(&point.path))
                    .map_err(error(&point.path))?;
                let export = Arc::new(Export {
                    _mount: mount,
                    point,
                });
                let entry = Entry {
                    users: 1,
                    export: Arc::clone(&export),
                };
                table.entries.insert(key.clone(), entry);
                export
            }
        };
        Ok(VolumeUse {
            key,
            export,
            volumes: Arc::clone(self),
            given_up: false,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VolumeUse {
    /// Where the guest sees it.
    pub fn guest_path(&self) -> String {
        self.export.guest_path()
    }

    /// Gives it up; the guest's path if this was the last use, in which case no
    /// later container gets this mount. It stays until this is dropped.
    pub fn give_up(&mut self) -> Option<String> {
        if self.given_up {
            return None;
        }
        self.given_up = true;
        let mut table = self.volumes.lock();
        match table.entries.get_mut(&self.key) {
            Some(entry) if entry.users > 1 => {
                entry.users -= 1;
                None
            }
            _ => {
                table.entries.remove(&self.key);
                Some(self.export.guest_path())
            }
        }
    }
}

impl Drop for VolumeUse {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl Export {
    fn guest_path(&self) -> String {
        format!("{}/{VOLUMES}/{}", path::SHARED, self.point.name)
    }
}

impl MountPoint {
    fn create(dir: &Path, name: u64, is_dir: bool) -> Result<Self, SharedTreeError> {
        let path = dir.join(name.to_string());
        let made = match is_dir {
            true => fs::create_dir(&path),
            false => fs::File::create_new(&path).map(drop),
        };
        made.map_err(error(&path))?;
        Ok(Self { name, path, is_dir })
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        // Not recursively: a mount that stayed must not lose its content.
        let removed: io::Result<()> = match self.is_dir {
            true => fs::remove_dir(&self.path),
            false => fs::remove_file(&self.path),
        };
        if let Err(error) = removed {
            tracing::warn!(path = %self.path.display(), %error, "volume's mount point stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_mount::own_namespace;
    use crate::shared_tree::SharedTree;

    const OPTIONS: CopyOptions = CopyOptions {
        recursive: true,
        follows: false,
    };

    struct Case {
        source: tempfile::TempDir,
        volumes: Arc<SharedVolumes>,
        _tree: SharedTree,
        dir: tempfile::TempDir,
    }

    impl Case {
        fn new() -> Option<Self> {
            if !own_namespace() {
                return None;
            }
            let dir = tempfile::tempdir().unwrap();
            let tree = SharedTree::create(&dir.path().join("pod/tree")).unwrap();
            Some(Self {
                source: tempfile::tempdir().unwrap(),
                volumes: Arc::clone(tree.volumes()),
                _tree: tree,
                dir,
            })
        }

        fn share(&self, read_only: ReadOnly, of_pod: bool) -> VolumeUse {
            self.share_other(self.source.path(), read_only, of_pod)
        }

        fn share_other(&self, source: &Path, read_only: ReadOnly, of_pod: bool) -> VolumeUse {
            let below = self.volumes.mounts_below(source, OPTIONS).unwrap();
            let copy = MountCopy::new(source, OPTIONS).unwrap();
            let shared = self.volumes.share(copy, below, read_only, of_pod);
            shared.unwrap()
        }

        fn on_node(&self, volume: &VolumeUse) -> PathBuf {
            let name = volume.guest_path();
            let name = name.strip_prefix("/run/husk/shared/").unwrap();
            self.dir.path().join("pod/tree").join(name)
        }

        fn writes(&self, volume: &VolumeUse) -> bool {
            fs::write(self.on_node(volume).join("file"), "text").is_ok()
        }
    }

    #[test]
    fn containers_share_a_source_until_the_last_has_gone() {
        let Some(case) = Case::new() else { return };
        let mut first = case.share(ReadOnly::No, false);
        let mut second = case.share(ReadOnly::No, false);
        assert_eq!(first.guest_path(), "/run/husk/shared/.volumes/0");
        assert_eq!(first.guest_path(), second.guest_path());
        assert!(case.writes(&first) && case.source.path().join("file").exists());

        assert_eq!(first.give_up(), None);
        drop(first);
        assert!(case.writes(&second));
        assert_eq!(second.give_up(), Some(second.guest_path()));
        assert_eq!(second.give_up(), None);
        // The guest is about to unmount that one.
        let third = case.share(ReadOnly::No, false);
        assert_ne!(third.guest_path(), second.guest_path());
        let was = case.on_node(&second);
        drop(second);
        assert!(!was.exists());
        assert!(case.writes(&third));
        drop(third);
        assert_eq!(
            fs::read_dir(case.dir.path().join("pod/tree").join(VOLUMES))
                .unwrap()
                .count(),
            0
        );
        assert!(case.source.path().join("file").exists());
    }

    #[test]
    fn the_node_keeps_read_only_what_nobody_in_the_pod_may_write_to() {
        let Some(case) = Case::new() else { return };
        let fixed = case.share(ReadOnly::Top, false);
        assert!(!case.writes(&fixed));
        let again = case.share(ReadOnly::Top, false);
        assert_eq!(fixed.guest_path(), again.guest_path());

        let writable = case.share(ReadOnly::No, false);
        assert!(case.writes(&writable) && !case.writes(&fixed));
        let third = case.share(ReadOnly::All, false);
        assert_eq!(third.guest_path(), writable.guest_path());
    }

    #[test]
    fn what_is_mounted_below_later_makes_another() {
        let Some(case) = Case::new() else { return };
        let below = case.source.path().join("be low");
        fs::create_dir(&below).unwrap();
        let before = case.share(ReadOnly::No, false);
        let _below = HostMount::new("tmpfs", "t".as_ref(), &below, &[]).unwrap();
        fs::write(below.join("file"), "").unwrap();
        let after = case.share(ReadOnly::No, false);
        assert_ne!(before.guest_path(), after.guest_path());
        assert!(case.on_node(&after).join("be low/file").exists());
        assert!(!case.on_node(&before).join("be low/file").exists());
        let again = case.share(ReadOnly::No, false);
        assert_eq!(after.guest_path(), again.guest_path());
    }

    #[test]
    fn a_source_above_the_tree_is_shared_without_it() {
        let Some(case) = Case::new() else { return };
        let count = || {
            let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            table.lines().count()
        };
        let above = case.dir.path();
        let first = case.share_other(above, ReadOnly::No, false);
        let _other = case.share(ReadOnly::No, false);
        let before = count();
        let second = case.share_other(above, ReadOnly::No, false);
        assert_eq!(first.guest_path(), second.guest_path());
        assert_eq!(count(), before);
        let pod = case.on_node(&first).join("pod");
        assert_eq!(fs::read_dir(pod).unwrap().count(), 1);
        assert!(!case.on_node(&first).join("pod/tree").join(VOLUMES).exists());
    }

    #[test]
    fn what_is_the_pods_own_is_one_for_all() {
        let Some(case) = Case::new() else { return };
        let fixed = case.share(ReadOnly::Top, true);
        let writable = case.share(ReadOnly::No, true);
        assert_eq!(fixed.guest_path(), writable.guest_path());
    }

    #[test]
    fn a_source_of_the_same_file_that_is_read_only_is_another() {
        let Some(case) = Case::new() else { return };
        let other = tempfile::tempdir().unwrap();
        let copy = MountCopy::new(case.source.path(), OPTIONS).unwrap();
        copy.forbid_writing(ReadOnly::Top).unwrap();
        copy.attach(other.path()).unwrap();
        let fixed = case.share_other(other.path(), ReadOnly::No, false);
        assert!(!case.writes(&fixed));
        assert!(case.writes(&case.share(ReadOnly::No, false)));
        rustix::mount::unmount(other.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}
