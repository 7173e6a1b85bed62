//! Waiting for something to change below the state directory, or for a process
//! of a pod to end. What it was is for the caller to see: nothing gets lost when
//! the kernel drops notices.

use std::collections::BTreeMap;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, setrlimit};

use husk_node::process::Process;

use crate::pods::{Pod, Status};

/// How often is looked where a process cannot be watched.
const FALLBACK: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// A watch over a state directory, which need not be there.
pub struct Watch {
    state_dir: PathBuf,
    notices: OwnedFd,
    /// What is noticed of a directory.
    of_entries: WatchFlags,
    /// Descriptors that are readable when a process has ended.
    processes: BTreeMap<(u32, u64), OwnedFd>,
}

impl Watch {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// This user has too many such watches.
    pub fn new(state_dir: PathBuf) -> anyhow::Result<Self> {
        // Two descriptors a pod; where that is refused, `wait` does with fewer.
        let mut files = getrlimit(Resource::Nofile);
        files.current = files.maximum;
        let _ = setrlimit(Resource::Nofile, files);
        let flags = CreateFlags::CLOEXEC | CreateFlags::NONBLOCK;
        let notices = inotify::init(flags)
            .context("inotify (the sysctl fs.inotify.max_user_instances limits it)")?;
        Ok(Self {
            state_dir,
            notices,
            of_entries: WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE,
            processes: BTreeMap::new(),
        })
    }

    /// What is written to files that are there is noticed, too.
    pub fn with_writes(mut self) -> Self {
        self.of_entries |= WatchFlags::MODIFY;
        self
    }

    /// From now on changes are noticed; for directories that have come since, it
    /// is to be called again.
    ///
    /// # Errors
    /// A directory cannot be watched.
    pub fn arm(&self) -> anyhow::Result<()> {
        while !self.add(&self.state_dir)? {
            // It is made when the first pod starts, and goes with the last.
            if self.arm_above()? {
                return Ok(());
            }
        }
        for namespace in directories(&self.state_dir) {
            if self.add(&namespace)? {
                for pod in directories(&namespace) {
                    self.add(&pod)?;
                }
            }
        }
        Ok(())
    }

    /// Watches the nearest directory above; false: the next has come meanwhile.
    fn arm_above(&self) -> anyhow::Result<bool> {
        let mut missing = self.state_dir.as_path();
        while let Some(parent) = missing.parent() {
            if self.add(parent)? {
                return Ok(!missing.is_dir());
            }
            missing = parent;
        }
        Ok(true)
    }

    /// Watches a directory; false: there is none.
    fn add(&self, dir: &Path) -> anyhow::Result<bool> {
        let flags = self.of_entries | WatchFlags::DELETE_SELF | WatchFlags::ONLYDIR;
        match inotify::add_watch(&self.notices, dir, flags) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
            Err(Errno::NOSPC) => Err(Errno::NOSPC)
                .context("inotify (the sysctl fs.inotify.max_user_watches limits it)"),
            Err(error) => Err(error).with_context(|| dir.display().to_string()),
        }
    }

    /// Waits until something may have changed since `pods` were looked at, or
    /// `other` is ready, if there is one; tells how that is.
    ///
    /// # Errors
    /// Waiting fails.
    pub fn wait<'a>(
        &mut self,
        pods: impl Iterator<Item = &'a Pod>,
        other: Option<(BorrowedFd<'_>, PollFlags)>,
    ) -> anyhow::Result<PollFlags> {
        let mut before = std::mem::take(&mut self.processes);
        let mut timeout = None;
        for process in pods.flat_map(living) {
            let key = (process.pid, process.start_ticks);
            match before.remove(&key).or_else(|| process.open()) {
                Some(descriptor) => {
                    self.processes.insert(key, descriptor);
                }
                // It has ended since.
                None if !process.is_alive() => return Ok(PollFlags::empty()),
                None => timeout = Some(FALLBACK),
            }
        }
        drop(before);
        let mut all = vec![PollFd::new(&self.notices, PollFlags::IN)];
        let processes = self.processes.values();
        all.extend(processes.map(|process| PollFd::new(process, PollFlags::IN)));
        // Behind them, where there is one.
        let watched = all.len();
        all.extend(other.map(|(other, readiness)| PollFd::from_borrowed_fd(other, readiness)));
        match poll(&mut all, timeout.as_ref()) {
            Err(Errno::INTR) | Ok(_) => {}
            Err(error) => return Err(error).context("waiting for events"),
        }
        let other = all.get(watched).map(PollFd::revents);
        let other = other.unwrap_or(PollFlags::empty());
        drop(all);
        self.forget_notices()?;
        Ok(other)
    }

    fn forget_notices(&self) -> anyhow::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut notices = inotify::Reader::new(self.notices.as_fd(), &mut buffer);
        loop {
            match notices.next() {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error).context("inotify"),
            }
        }
    }
}

/// The processes whose end changes how a pod is.
fn living(pod: &Pod) -> impl Iterator<Item = Process> {
    let (shim, vmm) = match pod.status {
        Status::Starting | Status::Running => (pod.state.shim, pod.state.vmm),
        Status::Ended => (pod.state.shim, None),
        Status::Abandoned => (None, None),
    };
    shim.into_iter().chain(vmm)
}

/// The directories in one, as far as they can be seen.
fn directories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    let entries = entries.filter_map(Result::ok).filter(is_dir);
    entries.map(|entry| entry.path()).collect()
}
