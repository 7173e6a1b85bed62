//! The pod's cgroup on the host: shim, VMM and file server sit in it, so that
//! the node's accounting is true. cgroup v2 only.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, statfs};
use rustix::io::retry_on_intr;

use crate::bundle::{BlockIo, Unlimited};

mod hits;
mod stats;

pub use hits::LimitHits;

/// Where cgroup v2 is mounted on the nodes we know.
const MOUNT: &str = "/sys/fs/cgroup";

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const MAGIC: i64 = 0x6367_7270;

/// How long killed processes may take to leave a cgroup.
const EMPTY_WITHIN: Duration = Duration::from_secs(1);

/// Controllers whose counters we report.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];

/// The cgroup of a pod. It stays until [`PodCgroup::leave`] has been able to.
#[derive(Debug)]
pub struct PodCgroup {
    /// Below the mount point.
    path: PathBuf,
    dir: CgroupDir,
    /// Where this process came from.
    origin: PathBuf,
    /// Nobody else had made it.
    is_ours: bool,
}

/// A pod's cgroup, for those who begin in it.
#[derive(Clone, Debug)]
pub struct CgroupDir {
    path: PathBuf,
    descriptor: Arc<OwnedFd>,
    shim: Arc<Mutex<Shim>>,
}

/// Where this process is.
#[derive(Debug)]
enum Shim {
    Outside,
    Moving(JoinHandle<()>),
    Inside,
}

impl CgroupDir {
    fn open(path: PathBuf) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptor = rustix::fs::open(&path, flags, Mode::empty())?;
        Ok(Self {
            path,
            descriptor: Arc::new(descriptor),
            shim: Arc::new(Mutex::new(Shim::Outside)),
        })
    }

    /// Has this process move into it, for which nobody waits: it takes what RCU calls a
    /// grace period (for `cgroup_threadgroup_rwsem`), some 10 ms. Until then nobody can
    /// begin in any cgroup of the node; what the pod needs should have begun.
    pub fn move_in(&self) {
        let mut shim = self.shim();
        if let Shim::Outside = *shim {
            let procs = self.path.join("cgroup.procs");
            let mover = thread::Builder::new().name("cgroup".into());
            match mover.spawn(move || move_to(&procs)) {
                Ok(moving) => *shim = Shim::Moving(moving),
                Err(error) => tracing::warn!(%error, "the shim stays outside of the pod's cgroup"),
            }
        }
    }

    /// Nobody can begin in it.
    pub fn refused(&self, source: io::Error) -> CgroupError {
        let path = self.path.join("cgroup.procs");
        CgroupError::Io { path, source }
    }

    /// Whether this process has moved in, or may have.
    fn is_shim_inside(&self) -> bool {
        let mut shim = self.shim();
        if let Shim::Outside = *shim {
            return false;
        }
        if let Shim::Moving(moving) = mem::replace(&mut *shim, Shim::Inside) {
            // One that panicked has said so.
            let _ = moving.join();
        }
        true
    }

    fn shim(&self) -> MutexGuard<'_, Shim> {
        self.shim.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the kernel has ended a process in it for want of memory.
    pub fn has_run_out_of_memory(&self) -> bool {
        let events = fs::read_to_string(self.path.join("memory.events"));
        events.is_ok_and(|events| has_killed(&events))
    }
}

impl AsFd for CgroupDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// A cgroup that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A path that is none.
    #[error("linux.cgroupsPath {0:?} is neither a path nor of the form slice:prefix:name")]
    Path(String),
    /// The kernel refused.
    #[error("pod's cgroup {path}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl PodCgroup {
    /// Makes the cgroup that `cgroups_path` of the spec asks for, in which what the pod
    /// needs can begin and this process can move. None where the node has no cgroup v2.
    ///
    /// # Errors
    /// The path is none, or the kernel refuses.
    pub fn make(cgroups_path: &str) -> Result<Option<Self>, CgroupError> {
        let path = host_path(cgroups_path)?;
        if !is_v2() {
            tracing::info!("no cgroup v2 at {MOUNT}: the pod gets no cgroup of its own");
            return Ok(None);
        }
        let Some(origin) = own_path() else {
            return Ok(None);
        };
        let dir = under_mount(&path);
        let fail = |source| CgroupError::Io {
            path: dir.clone(),
            source,
        };
        let is_ours = make(&dir).map_err(fail)?;
        enable_controllers(&path);
        match CgroupDir::open(dir.clone()) {
            Ok(dir) => Ok(Some(Self {
                path,
                dir,
                origin,
                is_ours,
            })),
            Err(error) => {
                if is_ours {
                    let _ = fs::remove_dir(&dir);
                }
                Err(fail(error))
            }
        }
    }

    /// For those who begin in it.
    pub fn dir(&self) -> &CgroupDir {
        &self.dir
    }

    /// What [`own_path`](Self::own_path) will say of a cgroup that is not there yet,
    /// for a state file that is written before it is made.
    pub fn to_be_made(cgroups_path: &str) -> Option<PathBuf> {
        let path = host_path(cgroups_path).ok()?;
        (is_v2() && !under_mount(&path).exists()).then_some(path)
    }

    /// Below the mount point, for the state file: what `delete` may empty and
    /// remove. None when others may be in it.
    pub fn own_path(&self) -> Option<&Path> {
        self.is_ours.then_some(&self.path)
    }

    /// `cgroup.procs` of the cgroup that this process came from.
    pub fn procs_of_origin(&self) -> PathBuf {
        under_mount(&self.origin).join("cgroup.procs")
    }

    /// Moves this process back and removes the cgroup, if it was made for this
    /// pod; whether nothing of that is left to be done.
    pub fn leave(&self) -> bool {
        let left = match self.dir.is_shim_inside() {
            true => self.move_back(),
            false => Ok(()),
        };
        match left {
            Ok(()) => !self.is_ours || remove(&self.path),
            Err(error) => {
                let path = self.procs_of_origin();
                tracing::warn!(path = %path.display(), %error, "the shim stays in the pod's cgroup");
                false
            }
        }
    }

    /// Moves this process to where it came from, or as near to that as it is let.
    /// What it came from may be gone, or have controllers for cgroups below it by
    /// now, and then it takes no processes (cgroup-v2.rst, "No Internal Process
    /// Constraint"). The node's root takes all.
    fn move_back(&self) -> io::Result<()> {
        let this = std::process::id().to_string();
        let enter = |place: &Path| fs::write(under_mount(place).join("cgroup.procs"), &this);
        enter(&self.origin).or_else(|error| {
            let mut around = self.origin.ancestors().skip(1);
            match around.any(|place| enter(place).is_ok()) {
                true => Ok(()),
                false => Err(error),
            }
        })
    }

    /// Limits what the processes of the pod, which do all of its I/O, do to the
    /// node's disks.
    ///
    /// # Errors
    /// The kernel refuses: there is no such disk.
    pub fn limit_io(&self, limits: &BlockIo) -> Result<(), CgroupError> {
        let dir = &self.dir.path;
        let write = |file: &str, line: &str| {
            let path = dir.join(file);
            let mut options = OpenOptions::new();
            let opened = options.write(true).open(&path);
            opened
                .and_then(|mut file| file.write_all(line.as_bytes()))
                .map_err(|source| CgroupError::Io { path, source })
        };
        if let Some(weight) = limits.weight() {
            // Which of them there is, if any, is the node's I/O scheduler's matter.
            let line = format!("default {weight}");
            for file in ["io.weight", "io.bfq.weight"] {
                if let Err(error) = write(file, &line) {
                    tracing::debug!(%error, "I/O weight");
                }
            }
        }
        let mut throttles = limits.throttles().into_iter();
        throttles.try_for_each(|line| write("io.max", &line))
    }

    /// What the cgroup around it, which the kubelet makes for the pod, leaves
    /// without limit: the kubelet limits it only when all containers have limits.
    pub fn unlimited(&self) -> Unlimited {
        let dir = &self.dir.path;
        let around = dir.parent().unwrap_or(dir);
        unlimited(around)
    }

    /// Counters as `io.containerd.cgroups.v2.Metrics`.
    pub fn metrics(&self) -> containerd_shim_protos::cgroups_v2::metrics::Metrics {
        stats::read(&self.dir.path)
    }
}

/// Moves this process, which the pod's limits do not count until then.
fn move_to(procs: &Path) {
    if let Err(error) = fs::write(procs, std::process::id().to_string()) {
        tracing::warn!(path = %procs.display(), %error, "the shim stays outside of the pod's cgroup");
    }
}

/// Best effort: a controller that the node keeps elsewhere is not counted.
fn enable_controllers(path: &Path) {
    let mut dir = PathBuf::from(MOUNT);
    let parents = path.parent().into_iter().flat_map(Path::components);
    for component in std::iter::once(Component::CurDir).chain(parents) {
        if let Component::Normal(name) = component {
            dir.push(name);
        }
        for controller in CONTROLLERS {
            let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

fn unlimited(dir: &Path) -> Unlimited {
    // The root has no such files: nothing limits there.
    let is_open = |file: &str| {
        let text = fs::read_to_string(dir.join(file));
        text.map_or(true, |text| text.starts_with("max"))
    };
    Unlimited {
        memory: is_open("memory.max"),
        cpu: is_open("cpu.max"),
    }
}

fn is_v2() -> bool {
    statfs(MOUNT).is_ok_and(|fs| fs.f_type == MAGIC)
}

/// Makes the directory and its parents; whether it was not there before.
fn make(dir: &Path) -> io::Result<bool> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::create_dir(dir) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// cgroup-v2.rst, "memory.events".
fn has_killed(events: &str) -> bool {
    let count = events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "));
    count.is_some_and(|count| count != "0")
}

/// Ends what is left in a pod's cgroup, which was made for it, and removes it;
/// whether it is gone.
pub fn remove(path: &Path) -> bool {
    let dir = under_mount(path);
    let _ = fs::write(dir.join("cgroup.kill"), "1");
    let removed = await_empty(&dir).and_then(|()| fs::remove_dir(&dir));
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %dir.display(), %error, "pod's cgroup stays");
            false
        }
        _ => true,
    }
}

/// Waits until the last process has left, but not for long: the removal tells
/// whether one has stayed.
fn await_empty(dir: &Path) -> io::Result<()> {
    let mut events = File::open(dir.join("cgroup.events"))?;
    let began = Instant::now();
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        let left = EMPTY_WITHIN.saturating_sub(began.elapsed());
        if text.lines().any(|line| line == "populated 0") || left.is_zero() {
            return Ok(());
        }
        // cgroup-v2.rst, "cgroup.events": a change since it was read is told so.
        let mut told = [PollFd::new(&events, PollFlags::PRI)];
        let left = Timespec::try_from(left).ok();
        retry_on_intr(|| poll(&mut told, left.as_ref()))?;
    }
}

fn under_mount(path: &Path) -> PathBuf {
    Path::new(MOUNT).join(path.strip_prefix("/").unwrap_or(path))
}

/// This process's own cgroup below the mount point.
fn own_path() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("0::"))
        .map(PathBuf::from)
}

/// `/a/b` as it is; systemd's `slice:prefix:name` as systemd would lay it out.
fn host_path(text: &str) -> Result<PathBuf, CgroupError> {
    let fail = || CgroupError::Path(text.chars().take(256).collect());
    let path = match text.split(':').collect::<Vec<_>>()[..] {
        [path] => PathBuf::from(path),
        [slice, prefix, name] => {
            let slice = if slice.is_empty() {
                "system.slice"
            } else {
                slice
            };
            let scope = if name.ends_with(".slice") {
                name.to_owned()
            } else {
                format!("{prefix}-{name}.scope")
            };
            expand_slice(slice).ok_or_else(fail)?.join(scope)
        }
        _ => return Err(fail()),
    };
    let mut absolute = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => absolute.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(fail()),
        }
    }
    if absolute == Path::new("/") {
        return Err(fail());
    }
    Ok(absolute)
}

/// `a-b.slice` is `a.slice/a-b.slice`.
fn expand_slice(slice: &str) -> Option<PathBuf> {
    let stem = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    if stem == "-" {
        return Some(path);
    }
    let mut so_far = String::new();
    for part in stem.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        so_far.push_str(part);
        path.push(format!("{so_far}.slice"));
        so_far.push('-');
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_what_was_there_before() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = dir.path().join("a/b");
        assert!(make(&cgroup).unwrap());
        assert!(!make(&cgroup).unwrap());
        assert!(make(&dir.path().join("a/c")).unwrap());
    }

    /// On the node's own cgroup v2, where there is one.
    #[test]
    fn leaves_what_others_made() {
        let path = format!("/husk-test-{}", std::process::id());
        let dir = under_mount(Path::new(&path));
        let to_be_made = PodCgroup::to_be_made(&path);
        if !is_v2() || fs::create_dir(&dir).is_err() {
            println!("SKIPPED: no cgroup v2 can be made");
            return;
        }
        assert_eq!(to_be_made.as_deref(), Some(Path::new(&path)));
        assert_eq!(PodCgroup::to_be_made(&path), None);
        let mut bystander = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        fs::write(dir.join("cgroup.procs"), bystander.id().to_string()).unwrap();
        let entered = PodCgroup::make(&path);
        if let Ok(Some(cgroup)) = entered {
            cgroup.dir().move_in();
            assert_eq!(cgroup.own_path(), None);
            cgroup.leave();
        }
        std::thread::sleep(Duration::from_millis(50));
        assert!(bystander.try_wait().unwrap().is_none());
        assert!(dir.exists());
        bystander.kill().unwrap();
        bystander.wait().unwrap();
        remove(Path::new(&path));
        assert!(!dir.exists());
    }

    #[test]
    fn knows_what_nothing_limits() {
        let dir = tempfile::tempdir().unwrap();
        let all = Unlimited {
            memory: true,
            cpu: true,
        };
        assert_eq!(unlimited(dir.path()), all);
        fs::write(dir.path().join("memory.max"), "max\n").unwrap();
        fs::write(dir.path().join("cpu.max"), "50000 100000\n").unwrap();
        assert_eq!(unlimited(dir.path()), Unlimited { cpu: false, ..all });
    }

    #[test]
    fn knows_who_was_killed_for_want_of_memory() {
        assert!(has_killed("oom 3\noom_kill 1\noom_group_kill 0\n"));
        assert!(!has_killed("oom 3\noom_kill 0\noom_group_kill 1\n"));
        assert!(!has_killed(""));
    }

    #[test]
    fn lays_paths_out() {
        for (text, expected) in [
            ("/default/t1", "/default/t1"),
            ("kubepods/pod1/c", "/kubepods/pod1/c"),
            (
                "kubepods-besteffort-podx.slice:cri-containerd:abc",
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podx.slice/cri-containerd-abc.scope",
            ),
            (":docker:abc", "/system.slice/docker-abc.scope"),
            ("-.slice:docker:abc", "/docker-abc.scope"),
        ] {
            assert_eq!(host_path(text).unwrap(), Path::new(expected), "{text}");
        }
    }

    #[test]
    fn refuses_what_leaves_the_tree() {
        for text in [
            "",
            "/",
            "/a/../../b",
            "a:b",
            "x:y:z",
            "a/b.slice:p:n",
            "a:b:c:d",
        ] {
            assert!(host_path(text).is_err(), "{text}");
        }
    }
}
