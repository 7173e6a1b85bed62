//! Tells when something in a directory changes.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// All that a pod watches. One inotify instance, since the node's root has few
/// of them (128, `fs.inotify.max_user_instances`) and others need some.
#[derive(Debug)]
pub struct Watches {
    shared: Arc<Shared>,
    task: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    inotify: AsyncFd<OwnedFd>,
    /// By watch descriptor; a directory known by two names has one.
    watched: Mutex<HashMap<i32, Vec<Arc<Signal>>>>,
}

#[derive(Debug, Default)]
struct Signal {
    changed: Notify,
    is_gone: AtomicBool,
}

/// A directory that is watched until this is dropped.
#[derive(Debug)]
pub struct Watch {
    number: i32,
    signal: Arc<Signal>,
    shared: Arc<Shared>,
}

impl Watches {
    /// None yet. To be called in the runtime.
    ///
    /// # Errors
    /// The node has no instance left.
    pub fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // SAFETY: an OwnedFd is the same open descriptor until it is dropped.
        let inotify = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE)? };
        let shared = Arc::new(Shared {
            inotify,
            watched: Mutex::default(),
        });
        let task = tokio::spawn(Arc::clone(&shared).pass_on()).abort_handle();
        Ok(Self { shared, task })
    }

    /// Watches `directory` from here on. The kubelet writes files into a new
    /// directory and then swaps the link that all others go through, so the
    /// directory itself is enough.
    ///
    /// # Errors
    /// It is none, or the node has no watch left.
    pub fn add(&self, directory: &Path) -> io::Result<Watch> {
        let changes = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::ATTRIB
            | WatchFlags::ONLYDIR;
        // Held until it is known who is to be told.
        let mut watched = self.shared.lock();
        let number = inotify::add_watch(self.shared.inotify.get_ref(), directory, changes)?;
        let signal = Arc::new(Signal::default());
        watched.entry(number).or_default().push(Arc::clone(&signal));
        Ok(Watch {
            number,
            signal,
            shared: Arc::clone(&self.shared),
        })
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// Returns when something has changed since the last time; false when the
    /// directory is gone.
    pub async fn changed(&self) -> bool {
        self.signal.changed.notified().await;
        !self.signal.is_gone.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.shared.lock();
        let Some(signals) = watched.get_mut(&self.number) else {
            return;
        };
        signals.retain(|signal| !Arc::ptr_eq(signal, &self.signal));
        if signals.is_empty() {
            watched.remove(&self.number);
            // The directory may be gone, and the watch with it.
            let _ = inotify::remove_watch(self.shared.inotify.get_ref(), self.number);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Vec<Arc<Signal>>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn pass_on(self: Arc<Self>) {
        while let Ok(mut ready) = self.inotify.readable().await {
            let goes_on = self.drain();
            ready.clear_ready();
            if !goes_on {
                return;
            }
        }
    }

    /// Passes on what has been told; false when there will be no more.
    fn drain(&self) -> bool {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(self.inotify.get_ref(), &mut buffer);
        loop {
            match events.next() {
                Ok(event) => self.tell(event.wd(), event.events()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return true,
                Err(_) => return false,
            }
        }
    }

    fn tell(&self, number: i32, events: ReadFlags) {
        let watched = self.lock();
        // With more at once than the kernel keeps, it is unknown for whom.
        let everybody = events.contains(ReadFlags::QUEUE_OVERFLOW);
        for (of, signals) in watched.iter() {
            if *of != number && !everybody {
                continue;
            }
            for signal in signals {
                if events.contains(ReadFlags::IGNORED) {
                    signal.is_gone.store(true, Ordering::Relaxed);
                }
                signal.changed.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn tells_of_changes_and_of_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (place, other) = (dir.path().join("watched"), dir.path().join("other"));
        std::fs::create_dir(&place).unwrap();
        std::fs::create_dir(&other).unwrap();
        let watches = Watches::new().unwrap();
        let watch = watches.add(&place).unwrap();
        let quiet = watches.add(&other).unwrap();
        assert!(timeout(SHORT, watch.changed()).await.is_err());
        std::os::unix::fs::symlink("a", place.join("b")).unwrap();
        std::fs::rename(place.join("b"), place.join("c")).unwrap();
        assert!(timeout(LONG, watch.changed()).await.unwrap());
        while timeout(SHORT, watch.changed()).await.is_ok() {}
        assert!(timeout(SHORT, quiet.changed()).await.is_err());
        std::fs::remove_dir_all(&place).unwrap();
        while timeout(LONG, watch.changed()).await.unwrap() {}
        assert!(watches.add(&place).is_err());
    }

    #[tokio::test]
    async fn a_directory_has_several_watchers() {
        let dir = tempfile::tempdir().unwrap();
        let watches = Watches::new().unwrap();
        let first = watches.add(dir.path()).unwrap();
        let second = watches.add(dir.path()).unwrap();
        drop(first);
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(timeout(LONG, second.changed()).await.unwrap());
        drop(second);
        assert!(watches.shared.lock().is_empty());
    }
}
