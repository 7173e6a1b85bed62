//! Volumes of huge pages, as the kubelet mounts them for an emptyDir of medium
//! `HugePages`. Such pages are memory, and a machine's is its own: the guest mounts
//! a file system like the node's, one for all containers of the pod.

use husk_protocol::agent::{HugePagesStorage, Storage};
use husk_protocol::path;
use rustix::fs::{Stat, StatFs};

use crate::id_map::IdMaps;

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const MAGIC: i64 = 0x9584_58f6;

/// What the guest mounts instead of a directory of the node; none: it is on no such
/// file system. Its files are shown with the owners that `maps` make of the node's.
pub fn storage(file_system: &StatFs, directory: &Stat, maps: Option<&IdMaps>) -> Option<Storage> {
    if file_system.f_type != MAGIC {
        return None;
    }
    let page_bytes = u64::try_from(file_system.f_bsize).ok()?;
    // Zero or minus one where the mount has no bound.
    let pages = i64::try_from(file_system.f_blocks).unwrap_or(0);
    let (uid, gid) = (directory.st_uid, directory.st_gid);
    let (uid, gid) = maps.map_or((uid, gid), |maps| maps.outside(uid, gid));
    let mut storage = Storage {
        mount_point: format!(
            "{}/huge-pages/{:x}-{:x}",
            path::SANDBOX,
            directory.st_dev,
            directory.st_ino
        ),
        options: ["nosuid", "nodev"].map(str::to_owned).to_vec(),
        ..Storage::default()
    };
    storage.set_huge_pages(HugePagesStorage {
        page_bytes,
        size_bytes: pages.unsigned_abs().saturating_mul(page_bytes),
        uid,
        gid,
        mode: directory.st_mode & 0o7777,
        ..HugePagesStorage::default()
    });
    Some(storage)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::host_mount::own_namespace;
    use crate::id_map::IdRange;
    use rustix::fs::{AtFlags, CWD, Gid, Uid};
    use rustix::fs::{Mode, chmodat, chownat, stat, statfs};
    use std::path::Path;

    fn of(path: &Path, maps: Option<&IdMaps>) -> Option<Storage> {
        storage(&statfs(path).unwrap(), &stat(path).unwrap(), maps)
    }

    /// Mounts one, if this kernel has any.
    pub fn mount(path: &Path, options: &str) -> bool {
        let mut command = std::process::Command::new("mount");
        let command = command.args(["-t", "hugetlbfs", "-o", options, "none"]);
        command
            .arg(path)
            .status()
            .is_ok_and(|status| status.success())
    }

    #[test]
    fn the_guests_is_like_the_nodes() {
        if !own_namespace() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of(dir.path(), None), None);
        if !mount(dir.path(), "pagesize=2M,size=6M") {
            println!("SKIPPED: no huge pages here");
            return;
        }
        let (uid, gid) = (Uid::from_raw(5), Gid::from_raw(7));
        chownat(CWD, dir.path(), Some(uid), Some(gid), AtFlags::empty()).unwrap();
        chmodat(
            CWD,
            dir.path(),
            Mode::from_raw_mode(0o2775),
            AtFlags::empty(),
        )
        .unwrap();
        let found = of(dir.path(), None).unwrap();
        let pages = found.huge_pages();
        assert_eq!((pages.page_bytes, pages.size_bytes), (2 << 20, 6 << 20));
        assert_eq!((pages.uid, pages.gid, pages.mode), (5, 7, 0o2775));
        // Another directory of it is another volume, the same one the same.
        assert_eq!(of(dir.path(), None).unwrap(), found);
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        let sub = of(&dir.path().join("sub"), None).unwrap();
        assert_ne!(sub.mount_point, found.mount_point);
        let ids = [IdRange {
            inside: 0,
            outside: 100_000,
            size: 65_536,
        }];
        let maps = IdMaps::new(&ids, &ids).unwrap();
        let mapped = of(dir.path(), Some(&maps)).unwrap();
        let mapped = mapped.huge_pages();
        assert_eq!((mapped.uid, mapped.gid), (100_005, 100_007));
    }

    #[test]
    fn one_without_bound_has_none_in_the_guest() {
        if !own_namespace() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        if !mount(dir.path(), "pagesize=2M") {
            println!("SKIPPED: no huge pages here");
            return;
        }
        assert_eq!(of(dir.path(), None).unwrap().huge_pages().size_bytes, 0);
    }
}
