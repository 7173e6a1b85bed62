//! On which devices of the node a disk of the machine stands: what somebody says of
//! I/O to `sda` is meant for the partition, the volume and the image on it as well.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{major, makedev, minor};

/// Where the kernel has a folder for each block device, by its number.
pub(super) const SYS: &str = "/sys/dev/block";

/// Most devices of one disk: a volume may stand on many.
const MOST: usize = 16;

/// The device of this number, and those that it stands on. None: it is none, as that
/// of a file system in memory.
pub(super) fn devices(sys: &Path, number: u64) -> Vec<(u32, u32)> {
    let (mut found, mut waiting) = (BTreeSet::new(), vec![number]);
    while let Some(number) = waiting.pop() {
        let place = sys.join(format!("{}:{}", major(number), minor(number)));
        if found.len() < MOST && place.exists() && found.insert(number) {
            waiting.extend(below(&place));
        }
    }
    let found = found.into_iter();
    found.map(|number| (major(number), minor(number))).collect()
}

/// What the device of a folder stands on directly.
fn below(place: &Path) -> Vec<u64> {
    let mut numbers = Vec::new();
    // A partition's folder is in that of the whole disk.
    if place.join("partition").exists()
        && let Ok(real) = place.canonicalize()
    {
        numbers.extend(real.parent().and_then(number_in));
    }
    for slave in fs::read_dir(place.join("slaves")).into_iter().flatten() {
        numbers.extend(slave.ok().and_then(|slave| number_in(&slave.path())));
    }
    if let Ok(file) = fs::read_to_string(place.join("loop/backing_file")) {
        numbers.extend(number_of(Path::new(file.trim_end_matches('\n'))));
    }
    numbers
}

fn number_in(place: &Path) -> Option<u64> {
    let text = fs::read_to_string(place.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Of the device that it is or that it is on.
fn number_of(path: &Path) -> Option<u64> {
    let metadata = fs::metadata(path).ok()?;
    Some(match metadata.file_type().is_block_device() {
        true => metadata.rdev(),
        false => metadata.dev(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    /// A folder like the kernel's.
    struct Sys(tempfile::TempDir);

    impl Sys {
        fn add(&self, number: &str, folder: &str) -> PathBuf {
            let place = self.0.path().join("devices").join(folder);
            fs::create_dir_all(&place).unwrap();
            fs::write(place.join("dev"), format!("{number}\n")).unwrap();
            symlink(&place, self.0.path().join(number)).unwrap();
            place
        }

        fn of(&self, major: u32, minor: u32) -> Vec<(u32, u32)> {
            devices(self.0.path(), makedev(major, minor))
        }
    }

    #[test]
    fn partitions_volumes_and_loops_stand_on_disks() {
        let sys = Sys(tempfile::tempdir().unwrap());
        let disk = sys.add("8:0", "sda");
        let partition = sys.add("8:2", "sda/sda2");
        fs::write(partition.join("partition"), "2\n").unwrap();
        let other = sys.add("8:16", "sdb");
        let volume = sys.add("253:1", "dm-1");
        for slave in [&partition, &other] {
            let slaves = volume.join("slaves");
            fs::create_dir_all(&slaves).unwrap();
            symlink(slave, slaves.join(slave.file_name().unwrap())).unwrap();
        }
        assert_eq!(sys.of(8, 0), [(8, 0)]);
        assert_eq!(sys.of(8, 2), [(8, 0), (8, 2)]);
        assert_eq!(sys.of(253, 1), [(8, 0), (8, 2), (8, 16), (253, 1)]);
        // A disk's own folder is in no disk's.
        assert!(below(&disk).is_empty());
        // A file system in memory is on none.
        assert!(sys.of(0, 42).is_empty());

        let image = sys.0.path().join("image");
        fs::write(&image, "").unwrap();
        let on = fs::metadata(&image).unwrap().dev();
        let number = format!("{}:{}", major(on), minor(on));
        sys.add(&number, "below-the-image");
        let looped = sys.add("7:3", "loop3");
        fs::create_dir(looped.join("loop")).unwrap();
        let text = format!("{}\n", image.display());
        fs::write(looped.join("loop/backing_file"), text).unwrap();
        let found = sys.of(7, 3);
        assert!(found.contains(&(7, 3)) && found.contains(&(major(on), minor(on))));
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn there_are_not_more_than_one_disk_may_have() {
        let sys = Sys(tempfile::tempdir().unwrap());
        let volume = sys.add("253:0", "dm-0");
        fs::create_dir(volume.join("slaves")).unwrap();
        for minor in 0..40 {
            let slave = sys.add(&format!("8:{minor}"), &format!("sd{minor}"));
            symlink(slave, volume.join(format!("slaves/sd{minor}"))).unwrap();
        }
        // In a circle, which the kernel does not make.
        let first = sys.0.path().join("devices/sd0/slaves");
        fs::create_dir(&first).unwrap();
        symlink(&volume, first.join("dm-0")).unwrap();
        assert_eq!(sys.of(253, 0).len(), MOST);
        assert_eq!(sys.of(8, 0).len(), MOST);
    }
}
