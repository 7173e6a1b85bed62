//! Volumes of huge pages: one file system for all containers of the pod, which
//! holds what they leave there until the pod ends.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use husk_protocol::agent::{HugePagesStorage, Storage};
use rustix::fs::statfs;

use super::{Kind, Mounted, Source, StorageError};
use crate::container::cgroup::huge_pages::allow_volume;
use crate::error::Doing;
use crate::lock::lock;

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const MAGIC: i64 = 0x9584_58f6;

/// Two containers may come at once.
static MOUNTING: Mutex<()> = Mutex::new(());

/// Its options.
pub(super) fn data(pages: &HugePagesStorage) -> Vec<(String, String)> {
    let mut data = vec![
        ("pagesize".to_owned(), pages.page_bytes.to_string()),
        ("uid".to_owned(), pages.uid.to_string()),
        ("gid".to_owned(), pages.gid.to_string()),
    ];
    if pages.size_bytes != 0 {
        data.push(("size".to_owned(), pages.size_bytes.to_string()));
    }
    data
}

/// Mounts it, unless an earlier container has.
pub(super) fn attach(
    source: Source,
    mount_point: PathBuf,
    storage: &Storage,
) -> Result<Mounted, StorageError> {
    let _mounting = lock(&MOUNTING);
    if is_mounted(&mount_point) {
        return Ok(Mounted::kept(mount_point));
    }
    let mounted = source.attach(mount_point, &storage.options)?;
    // Its option for that knows no set-group-id bit, by which files get the
    // group of a volume.
    let mode = Permissions::from_mode(storage.huge_pages().mode & 0o7777);
    if let Err(error) = fs::set_permissions(&mounted.mount_point, mode) {
        mounted.undo();
        return Err(error).doing("change the mode of", mounted.mount_point.display())?;
    }
    let pages = storage.huge_pages();
    allow_volume(&mounted.mount_point, pages.page_bytes, pages.size_bytes);
    Ok(Mounted::kept(mounted.mount_point))
}

fn is_mounted(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.f_type == MAGIC)
}

impl Mounted {
    fn kept(mount_point: PathBuf) -> Self {
        Self {
            mount_point,
            kind: Kind::Kept,
            directories: Vec::new(),
        }
    }
}
