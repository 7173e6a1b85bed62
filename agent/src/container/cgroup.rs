//! The cgroup of a container.

pub mod huge_pages;
mod weight;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use super::device_filter::{self, DeviceFilter};
use super::limits::{self, LimitError};
use crate::error::{Doing, OsError};
use crate::kernel_file;
use crate::lock::lock;
use crate::oci::{DeviceRule, Resources};
use crate::watch::FileWatch;

/// Our part of the tree: container ids must not meet the kernel's file names.
const PARENT: &str = "husk";

/// How long the kernel may take to freeze or to kill.
const DEADLINE: Duration = Duration::from_secs(10);

/// When to kill again.
const AGAIN: Duration = Duration::from_millis(10);

/// What can go wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error("cannot set {file} to {value:?}")]
    Set {
        file: String,
        value: String,
        #[source]
        source: io::Error,
    },
    #[error("cgroup {path} did not become {wanted} within {seconds} s")]
    Deadline {
        path: String,
        wanted: &'static str,
        seconds: u64,
    },
    #[error(transparent)]
    Os(#[from] OsError),
}

/// Makes the parent of all containers' cgroups, with every controller the
/// machine has. `root` is the mount point of cgroup v2.
pub fn prepare(root: &Path) -> Result<(), OsError> {
    enable_controllers(root)?;
    let parent = root.join(PARENT);
    match fs::create_dir(&parent) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made.doing("make", parent.display())?,
    }
    enable_controllers(&parent)
}

fn enable_controllers(path: &Path) -> Result<(), OsError> {
    let list = path.join("cgroup.controllers");
    let controllers = fs::read_to_string(&list).doing("read", list.display())?;
    let file = path.join("cgroup.subtree_control");
    let enable = |names: &[&str]| {
        let words: Vec<String> = names.iter().map(|name| format!("+{name}")).collect();
        kernel_file::write(&file, words.join(" "))
    };
    let names: Vec<&str> = controllers.split_ascii_whitespace().collect();
    if names.is_empty() || enable(&names).is_ok() {
        return Ok(());
    }
    for name in names {
        // What one refuses is no reason to lack the others.
        if let Err(error) = enable(&[name]) {
            log::warn!("cgroup controller {name}: {error}");
        }
    }
    Ok(())
}

/// One container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    filter: Mutex<Option<DeviceFilter>>,
}

impl Cgroup {
    /// Makes it. What stands in its place is an error: ids are never reused
    /// before their container is deleted.
    pub fn create(root: &Path, id: &str) -> Result<Self, OsError> {
        let path = root.join(PARENT).join(id);
        fs::create_dir(&path).doing("make", path.display())?;
        Ok(Self {
            path,
            filter: Mutex::default(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file through which processes join.
    pub fn procs_file(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Sets limits; `disks` are those that hold something of the container's. May
    /// wait for the kernel to take memory back.
    pub fn limit(&self, resources: &Resources, disks: &[u64]) -> Result<(), CgroupError> {
        limits::check_memory(&resources.memory, machine_bytes())?;
        huge_pages::allow(&self.path, &resources.hugepage_limits);
        for limit in limits::writes(resources, disks)? {
            let written = kernel_file::write(self.path.join(&limit.file), &limit.value);
            match written {
                Err(error) if limit.optional && error.kind() == io::ErrorKind::NotFound => {}
                written => written.map_err(|source| CgroupError::Set {
                    file: limit.file,
                    value: limit.value,
                    source,
                })?,
            }
        }
        if resources.block_io.weight.is_some_and(|weight| weight != 0)
            && let Some(root) = self.path.ancestors().nth(2)
        {
            weight::count(root, disks);
        }
        Ok(())
    }

    /// Sets which devices may be used: by these rules, and the container's own.
    pub fn filter_devices(&self, rules: &[DeviceRule], devices: &[u64]) -> Result<(), OsError> {
        // Held to the end: the next one has to replace this one's.
        let mut filter = lock(&self.filter);
        *filter = device_filter::apply(&self.path, rules, devices, filter.as_ref())?;
        Ok(())
    }

    /// Every process in it and below.
    pub fn processes(&self) -> Result<Vec<i32>, OsError> {
        let mut pids = Vec::new();
        for directory in self.tree()? {
            let file = directory.join("cgroup.procs");
            match fs::read_to_string(&file) {
                Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
                // A threaded one answers EOPNOTSUPP; its parent lists its processes.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).doing("read", file.display()),
            }
        }
        Ok(pids)
    }

    /// Sends SIGKILL to all, also to what they are forking now.
    pub fn kill(&self) -> Result<(), OsError> {
        let file = self.path.join("cgroup.kill");
        kernel_file::write(&file, "1").doing("write", file.display())
    }

    /// Stops or continues all processes; returns when they are.
    pub async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let file = self.path.join("cgroup.freeze");
        let (value, wanted) = if frozen {
            ("1", "frozen")
        } else {
            ("0", "thawed")
        };
        kernel_file::write(&file, value).doing("write", file.display())?;
        self.wait_for("frozen", frozen, wanted).await
    }

    /// Kills what is left and removes it.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        let removing = async {
            while self.path.exists() {
                self.kill()?;
                self.wait_for("populated", false, "empty").await?;
                match self.remove_empty() {
                    // A process that was being made has joined it meanwhile.
                    Err(error) if error.is(libc::EBUSY) => tokio::time::sleep(AGAIN).await,
                    removed => removed?,
                }
            }
            Ok(())
        };
        match tokio::time::timeout(DEADLINE, removing).await {
            Ok(removed) => removed,
            Err(_) => Err(self.deadline("empty")),
        }
    }

    fn remove_empty(&self) -> Result<(), OsError> {
        for directory in self.tree()?.iter().rev() {
            match fs::remove_dir(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.doing("remove", directory.display())?,
            }
        }
        Ok(())
    }

    /// How many processes the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("memory.events"));
        text.map_or(0, |text| oom_kills_in(&text))
    }

    /// Watches for such kills; `None` without a memory controller.
    pub fn watch_oom(&self) -> Option<FileWatch> {
        FileWatch::open(&self.path.join("memory.events")).ok()
    }

    async fn wait_for(
        &self,
        key: &str,
        value: bool,
        wanted: &'static str,
    ) -> Result<(), CgroupError> {
        let file = self.path.join("cgroup.events");
        let watch = FileWatch::open(&file).doing("watch", file.display())?;
        let reached = async {
            loop {
                let text = watch.read().doing("read", file.display())?;
                if value_of(&text, key) == Some(value.into()) {
                    return Ok(());
                }
                watch.changed().await.doing("watch", file.display())?;
            }
        };
        match tokio::time::timeout(DEADLINE, reached).await {
            Ok(result) => result,
            Err(_) => Err(self.deadline(wanted)),
        }
    }

    fn deadline(&self, wanted: &'static str) -> CgroupError {
        CgroupError::Deadline {
            path: self.path.display().to_string(),
            wanted,
            seconds: DEADLINE.as_secs(),
        }
    }

    /// Itself and everything below, parents first.
    fn tree(&self) -> Result<Vec<PathBuf>, OsError> {
        let mut tree = vec![self.path.clone()];
        let mut next = 0;
        while let Some(directory) = tree.get(next).cloned() {
            next += 1;
            let entries = match fs::read_dir(&directory) {
                // Its owner may remove it while we look.
                Err(error) if error.kind() == io::ErrorKind::NotFound && next > 1 => continue,
                entries => entries.doing("list", directory.display())?,
            };
            for entry in entries.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    tree.push(entry.path());
                }
            }
        }
        Ok(tree)
    }
}

/// What the machine may grow to, bytes, where it may.
static GROWS_TO: OnceLock<u64> = OnceLock::new();

/// The machine's memory may grow to so many bytes.
pub fn machine_grows_to(bytes: u64) {
    // There is one sandbox, which says so once.
    let _ = GROWS_TO.set(bytes);
}

fn machine_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    let now = info.totalram.saturating_mul(info.mem_unit.into());
    now.max(GROWS_TO.get().copied().unwrap_or(0))
}

/// How many processes `memory.events` says the kernel has killed.
pub fn oom_kills_in(text: &str) -> u64 {
    value_of(text, "oom_kill").unwrap_or(0)
}

/// The number beside a key in a flat keyed file.
pub fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}
