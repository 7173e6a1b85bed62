//! Huge pages for containers that may use some. On a node the administrator has
//! set them aside; here the kernel makes them when they are asked for.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::kernel_file;
use crate::lock::lock;
use crate::oci::HugepageLimit;

/// A folder for each size that the processor has.
const SIZES: &str = "/sys/kernel/mm/hugepages";

/// More pages than any machine has.
const NO_BOUND: &str = "4294967295";

/// Pages of the sizes that have to be set aside, by the cgroup or volume that may use
/// them.
#[derive(Debug)]
struct SetAside(BTreeMap<(PathBuf, u64), u64>);

static SET_ASIDE: Mutex<SetAside> = Mutex::new(SetAside(BTreeMap::new()));

impl SetAside {
    /// Notes the pages of a cgroup or volume; those of all that are there.
    fn sum_with(&mut self, user: &Path, kib: u64, pages: u64) -> u64 {
        self.0.retain(|(user, _), _| user.exists());
        self.0.insert((user.to_owned(), kib), pages);
        let same = self.0.iter().filter(|((_, of), _)| *of == kib);
        same.fold(0, |sum, (_, pages)| sum.saturating_add(*pages))
    }
}

/// Lets the kernel make pages for each limit of a cgroup, as far as there is
/// memory. What a container may use is its cgroup's matter.
pub fn allow(cgroup: &Path, limits: &[HugepageLimit]) {
    for limit in limits {
        let finite = !matches!(limit.limit, 0 | u64::MAX);
        if let Some(kib) = kib_of(&limit.page_size).filter(|_| finite) {
            allow_pages(cgroup, kib, limit.limit.div_ceil(kib << 10));
        }
    }
}

/// The same for a volume: containerd, as it comes, tells of no limits in pods, and
/// the volume has a bound of its own.
pub fn allow_volume(mount_point: &Path, page_bytes: u64, size_bytes: u64) {
    if page_bytes > 0 {
        allow_pages(
            mount_point,
            page_bytes >> 10,
            size_bytes.div_ceil(page_bytes),
        );
    }
}

/// What is at `user` may use so many.
fn allow_pages(user: &Path, kib: u64, pages: u64) {
    let folder = Path::new(SIZES).join(format!("hugepages-{kib}kB"));
    // The kubelet names every size of its node; the guest may lack some.
    if folder.exists()
        && let Err(error) = allow_size(&folder, || lock(&SET_ASIDE).sum_with(user, kib, pages))
    {
        log::warn!("huge pages of {kib} KiB: {error}");
    }
}

fn allow_size(folder: &Path, pages: impl FnOnce() -> u64) -> std::io::Result<()> {
    let raise = |file: &str| {
        let (file, pages) = (folder.join(file), pages());
        let now: u64 = fs::read_to_string(&file)?.trim().parse().unwrap_or(0);
        match now < pages {
            true => kernel_file::write(&file, pages.to_string()),
            false => Ok(()),
        }
    };
    let any = kernel_file::write(folder.join("nr_overcommit_hugepages"), NO_BOUND);
    // The largest, which the buddy allocator has not, can only be set aside.
    any.or_else(|_| raise("nr_hugepages"))
}

/// `2MB` as the kernel's folders count.
fn kib_of(size: &str) -> Option<u64> {
    let (number, unit) = size.split_at(size.len().checked_sub(2)?);
    let kib = match unit {
        "KB" => 1,
        "MB" => 1 << 10,
        "GB" => 1 << 20,
        _ => return None,
    };
    let number: u64 = number.parse().ok().filter(|number| *number > 0)?;
    number.checked_mul(kib).filter(|kib| *kib <= 1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(kib_of("2MB"), Some(2048));
        assert_eq!(kib_of("1GB"), Some(1 << 20));
        assert_eq!(kib_of("64KB"), Some(64));
        for text in ["", "B", "MB", "0MB", "-1MB", "2mb", "99999999999999GB"] {
            assert_eq!(kib_of(text), None, "{text}");
        }
    }

    #[test]
    fn pages_are_set_aside_for_all() {
        let there = [std::env::temp_dir(), "/".into()];
        let mut aside = SetAside(BTreeMap::new());
        assert_eq!(aside.sum_with(&there[0], 1 << 20, 1), 1);
        assert_eq!(aside.sum_with(Path::new("/not/there"), 1 << 20, 9), 10);
        assert_eq!(aside.sum_with(&there[1], 1 << 20, 2), 3);
        // An update is no other's.
        assert_eq!(aside.sum_with(&there[0], 1 << 20, 4), 6);
        assert_eq!(aside.sum_with(&there[0], 2048, 5), 5);
    }

    #[test]
    fn pages_have_no_bound_or_are_only_added() {
        let folder = std::env::temp_dir().join(format!("husk-huge-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let any = folder.join("nr_overcommit_hugepages");
        fs::write(&any, "4\n").unwrap();
        allow_size(&folder, || 3).unwrap();
        assert_eq!(fs::read_to_string(&any).unwrap().trim(), NO_BOUND);
        fs::remove_file(&any).unwrap();
        let file = folder.join("nr_hugepages");
        fs::write(&file, "4\n").unwrap();
        allow_size(&folder, || 3).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "4\n");
        allow_size(&folder, || 9).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap().trim(), "9");
        fs::remove_dir_all(&folder).unwrap();
    }
}
