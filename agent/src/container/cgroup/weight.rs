//! Weights of I/O. Unless a disk is told to count it, its kernel only notes what a
//! cgroup weighs.

use std::path::Path;

use crate::kernel_file;

/// Of the root cgroup alone (cgroup-v2.rst, "IO Interface Files").
const FILE: &str = "io.cost.qos";

/// Has these disks share what they can do by weight, when they cannot do all that is
/// asked of them.
pub fn count(root: &Path, disks: &[u64]) {
    for disk in disks {
        let (major, minor) = (rustix::fs::major(*disk), rustix::fs::minor(*disk));
        let value = format!("{major}:{minor} enable=1");
        if let Err(error) = kernel_file::write(root.join(FILE), value) {
            log::warn!("weights of I/O to {major}:{minor}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_told() {
        let root = std::env::temp_dir().join(format!("husk-weight-{}", std::process::id()));
        std::fs::create_dir(&root).unwrap();
        let file = root.join(FILE);
        std::fs::write(&file, "").unwrap();
        count(&root, &[]);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "");
        count(&root, &[rustix::fs::makedev(254, 16)]);
        let told = std::fs::read_to_string(&file).unwrap();
        assert_eq!(told, "254:16 enable=1");
        std::fs::remove_dir_all(&root).unwrap();
        // Without the controller the rest goes on.
        count(&root, &[rustix::fs::makedev(254, 16)]);
    }
}
