//! Waits until something in a directory changes.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The kubelet writes files into a new directory and then swaps the link that
/// all others go through, so the directory itself is enough to watch.
#[derive(Debug)]
pub struct Watch {
    inotify: AsyncFd<OwnedFd>,
}

impl Watch {
    /// Watches `directory` from here on.
    ///
    /// # Errors
    /// It is none, or there are too many watches.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let changes = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::ATTRIB
            | WatchFlags::ONLYDIR;
        inotify::add_watch(&inotify, directory, changes)?;
        // SAFETY: an OwnedFd is the same open descriptor until it is dropped.
        let inotify = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE)? };
        Ok(Self { inotify })
    }

    /// Returns when something has changed; false when the directory is gone.
    pub async fn changed(&mut self) -> bool {
        let Ok(mut ready) = self.inotify.readable().await else {
            return false;
        };
        let goes_on = drain(ready.get_inner());
        ready.clear_ready();
        goes_on
    }
}

/// Takes what has been told; false when there will be no more.
fn drain(inotify: &OwnedFd) -> bool {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(inotify, &mut buffer);
    loop {
        match events.next() {
            Ok(event) if event.events().contains(ReadFlags::IGNORED) => return false,
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return true,
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn tells_of_changes_and_of_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("watched");
        std::fs::create_dir(&place).unwrap();
        let mut watch = Watch::new(&place).unwrap();
        let short = Duration::from_millis(50);
        assert!(timeout(short, watch.changed()).await.is_err());
        std::os::unix::fs::symlink("a", place.join("b")).unwrap();
        std::fs::rename(place.join("b"), place.join("c")).unwrap();
        let long = Duration::from_secs(5);
        assert!(timeout(long, watch.changed()).await.unwrap());
        assert!(timeout(short, watch.changed()).await.is_err());
        std::fs::remove_dir_all(&place).unwrap();
        while timeout(long, watch.changed()).await.unwrap() {}
        assert!(Watch::new(&place).is_err());
    }
}
