//! The mounts of this process's namespace, and their changes.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// An open `/proc/self/mountinfo`. Polled for `POLLPRI` it tells of changes.
#[derive(Debug)]
pub struct MountTable(OwnedFd);

impl MountTable {
    /// Takes the open file.
    pub fn new(mountinfo: OwnedFd) -> Self {
        Self(mountinfo)
    }

    /// The ids of all mounts.
    pub fn mounts(&self) -> Result<HashSet<u64>, Errno> {
        rustix::fs::seek(&self.0, SeekFrom::Start(0))?;
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match rustix::io::read(&self.0, &mut chunk) {
                Ok(0) => return Ok(parse(&text)),
                Ok(count) => text.extend_from_slice(chunk.get(..count).unwrap_or_default()),
                Err(Errno::INTR) => (),
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for MountTable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The first field of each line (proc(5)).
fn parse(text: &[u8]) -> HashSet<u64> {
    text.split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').next())
        .filter_map(|id| std::str::from_utf8(id).ok()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host;

    #[test]
    fn ids_are_those_of_statx() {
        let open = |path| OwnedFd::from(std::fs::File::open(path).unwrap());
        let mounts = MountTable::new(open("/proc/self/mountinfo"))
            .mounts()
            .unwrap();
        for path in ["/", "/proc"] {
            let stat = host::stat(open(path).as_fd()).unwrap();
            assert!(mounts.contains(&stat.stx_mnt_id), "{path}");
        }
        assert!(!mounts.contains(&0));
    }

    #[test]
    fn odd_lines_are_passed_over() {
        let text = b"22 1 0:21 / /proc rw\n\nx y\n99999999999999999999 1\n7";
        assert_eq!(parse(text), HashSet::from([22, 7]));
    }
}
