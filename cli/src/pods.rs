//! The pods of this node, by what their shims keep in the state directory.

use std::collections::BTreeMap;
use std::fs::{self, DirEntry, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;
use serde_json::Value;

use husk_node::config::Sources;
use husk_node::process::Process;
use husk_node::state::State;

use crate::answer::NoPod;
use crate::memory::Memory;

/// Most that is read of a bundle's specification, bytes.
const SPEC: u64 = 8 << 20;

/// Annotations by which containerd and CRI-O tell a pod's name and namespace.
const NAMES: [[&str; 2]; 2] = [
    [
        "io.kubernetes.cri.sandbox-namespace",
        "io.kubernetes.cri.sandbox-name",
    ],
    ["io.kubernetes.pod.namespace", "io.kubernetes.pod.name"],
];

/// A pod.
#[derive(Clone, Debug)]
pub struct Pod {
    /// containerd's namespace.
    pub namespace: String,
    /// Its id in there.
    pub id: String,
    /// NAMESPACE/NAME in Kubernetes.
    pub name: Option<String>,
    /// Its state directory.
    pub dir: PathBuf,
    /// What its shim says.
    pub state: State,
    /// How it is.
    pub status: Status,
}

/// How a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Its machine is being made, or boots.
    Starting,
    /// Its machine runs.
    Running,
    /// Its machine has ended; the shim waits for containerd to delete it.
    Ended,
    /// Its shim is gone, and containerd has not cleaned up after it.
    Abandoned,
}

impl Status {
    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Ended => "ended",
            Self::Abandoned => "abandoned",
        }
    }

    fn of(state: &State) -> Self {
        let is_alive = |process: Option<Process>| process.is_some_and(Process::is_alive);
        if !is_alive(state.shim) {
            Self::Abandoned
        } else if state.vmm.is_none() {
            Self::Starting
        } else if state.end.is_some() || !is_alive(state.vmm) {
            Self::Ended
        } else if state.timeline.guest_entered_ns > 0 && state.machine.is_some() {
            Self::Running
        } else {
            Self::Starting
        }
    }
}

impl Pod {
    /// How long its shim has been there.
    pub fn age(&self) -> Option<Duration> {
        let shim = self.state.shim.filter(|shim| shim.is_alive())?;
        let now = clock_gettime(ClockId::Boottime);
        let now = Duration::new(
            u64::try_from(now.tv_sec).ok()?,
            u32::try_from(now.tv_nsec).ok()?,
        );
        let hertz = rustix::param::clock_ticks_per_second().max(1);
        let began = Duration::from_secs(shim.start_ticks / hertz)
            + Duration::from_secs(shim.start_ticks % hertz) / u32::try_from(hertz).ok()?;
        now.checked_sub(began)
    }

    /// Why its machine is gone, where nobody asked for that.
    pub fn failure(&self) -> Option<&str> {
        let end = self.state.end.as_ref().filter(|end| !end.was_asked)?;
        Some(&end.reason)
    }

    /// What all commands tell of it in JSON, and `more`.
    pub fn described(&self, mut more: Value) -> Value {
        more["namespace"] = self.namespace.as_str().into();
        more["id"] = self.id.as_str().into();
        more["name"] = self.name.as_deref().into();
        more["status"] = self.status.word().into();
        more["age_seconds"] = self.age().map(|age| age.as_secs()).into();
        more
    }

    /// `text` is its id or the beginning of it, or its name.
    pub fn answers_to(&self, text: &str) -> bool {
        self.is(text) || (!text.is_empty() && self.id.starts_with(text))
    }

    /// `text` is its whole id, or its name.
    fn is(&self, text: &str) -> bool {
        self.id == text
            || self.name.as_deref() == Some(text)
            || text.split_once('/') == Some((&self.namespace, &self.id))
    }

    /// What it is called to whoever looks for it.
    pub fn title(&self) -> String {
        self.name
            .clone()
            .unwrap_or_else(|| format!("{}/{}", self.namespace, self.id))
    }
}

/// All of this node, with the memory that they really use.
///
/// # Errors
/// They are not for this user.
pub fn with_memory() -> anyhow::Result<Vec<(Pod, Option<Memory>)>> {
    let with = |pod: Pod| {
        let memory = Memory::of(&pod.state);
        (pod, memory)
    };
    Ok(all(&state_dir()?)?.into_iter().map(with).collect())
}

/// The state directory of this node.
///
/// # Errors
/// The configuration is wrong.
pub fn state_dir() -> anyhow::Result<PathBuf> {
    Ok(Sources::of_node().load()?.config.state_dir)
}

/// All of them, in the order of namespaces and ids.
///
/// # Errors
/// The directory is not for this user.
pub fn all(state_dir: &Path) -> anyhow::Result<Vec<Pod>> {
    all_named(state_dir, |_, state| name_of(state))
}

/// The same, with the names that `name` has for directories and states.
///
/// # Errors
/// The directory is not for this user.
pub fn all_named(
    state_dir: &Path,
    name: impl Fn(&Path, &State) -> Option<String>,
) -> anyhow::Result<Vec<Pod>> {
    let mut pods = Vec::new();
    for namespace in directories(state_dir)? {
        for dir in directories(&namespace.path())? {
            // Without a state yet, or not any more.
            let Ok(state) = State::read(&dir.path()) else {
                continue;
            };
            pods.push(Pod {
                namespace: namespace.file_name().to_string_lossy().into_owned(),
                id: dir.file_name().to_string_lossy().into_owned(),
                name: name(&dir.path(), &state),
                dir: dir.path(),
                status: Status::of(&state),
                state,
            });
        }
    }
    Ok(pods)
}

/// The one that is meant by `text`: its id, the beginning of its id, or
/// NAMESPACE/NAME.
///
/// # Errors
/// There is none, or several.
pub fn find(state_dir: &Path, text: &str) -> anyhow::Result<Pod> {
    let pods = all(state_dir)?;
    let mut found: Vec<&Pod> = pods.iter().filter(|pod| pod.is(text)).collect();
    if found.is_empty() {
        found = pods.iter().filter(|pod| pod.answers_to(text)).collect();
    }
    match found[..] {
        [pod] => Ok(pod.clone()),
        [] => {
            let what = format!(
                "no pod {text:?} runs under Husk on this node; see `husk ps`, or \
                 `husk logs` for one that is gone"
            );
            Err(NoPod(what).into())
        }
        _ => {
            let ids: Vec<_> = found
                .iter()
                .take(8)
                .map(|pod| format!("{}/{}", pod.namespace, pod.id))
                .collect();
            let what = format!("{text:?} may be {}", ids.join(", "));
            Err(NoPod(what).into())
        }
    }
}

/// The directories in one, which may have gone meanwhile.
fn directories(dir: &Path) -> anyhow::Result<Vec<DirEntry>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            let what = match error.kind() {
                io::ErrorKind::PermissionDenied => " (only root may see the pods)",
                _ => "",
            };
            return Err(error).with_context(|| format!("pods below {}{what}", dir.display()));
        }
    };
    let mut dirs: Vec<_> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .collect();
    dirs.sort_by_key(DirEntry::file_name);
    Ok(dirs)
}

#[derive(Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// The name in Kubernetes of the pod with this state.
pub fn name_of(state: &State) -> Option<String> {
    state.shim.and_then(name_by)
}

/// The name in Kubernetes of the pod whose shim this is: it works in the pod's
/// bundle.
fn name_by(shim: Process) -> Option<String> {
    // Another process may have its number, and anything in its directory.
    if !shim.is_alive() {
        return None;
    }
    let path = format!("/proc/{}/cwd/config.json", shim.pid);
    let how = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, how, Mode::empty()).ok()?);
    // It may have ended meanwhile.
    if !shim.is_alive() || !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    file.take(SPEC).read_to_end(&mut text).ok()?;
    let spec: Annotated = serde_json::from_slice(&text).ok()?;
    NAMES.iter().find_map(|[namespace, name]| {
        let (namespace, name) = (
            spec.annotations.get(*namespace)?,
            spec.annotations.get(*name)?,
        );
        Some(format!("{namespace}/{name}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_node::state::{EndFacts, FILE, MachineFacts};
    use std::process::{Child, Command};

    /// A process that works in a pod's bundle, as a shim does.
    struct Shim(Child);

    impl Shim {
        fn start(bundle: &Path) -> Self {
            let mut command = Command::new("sleep");
            Self(command.arg("100").current_dir(bundle).spawn().unwrap())
        }

        fn process(&self) -> Option<Process> {
            Process::find(self.0.id())
        }
    }

    impl Drop for Shim {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn write(root: &Path, id: &str, state: &State) {
        let dir = root.join("k8s.io").join(id);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(FILE), serde_json::to_vec(state).unwrap()).unwrap();
    }

    #[test]
    fn a_pipe_in_place_of_a_specification_holds_nobody_up() {
        let bundle = tempfile::tempdir().unwrap();
        let pipe = bundle.path().join("config.json");
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, mode).unwrap();
        let shim = Shim::start(bundle.path());
        assert_eq!(shim.process().and_then(name_by), None);
        fs::remove_file(&pipe).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &pipe).unwrap();
        assert_eq!(shim.process().and_then(name_by), None);
    }

    #[test]
    fn tells_how_each_pod_is() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("none");
        assert!(all(&missing).unwrap().is_empty());
        let bundle = tempfile::tempdir().unwrap();
        let spec = r#"{"annotations": {"io.kubernetes.cri.sandbox-name": "web",
            "io.kubernetes.cri.sandbox-namespace": "shop"}, "ociVersion": "1"}"#;
        fs::write(bundle.path().join("config.json"), spec).unwrap();
        let (shim, vmm) = (Shim::start(bundle.path()), Shim::start(bundle.path()));
        let gone = Process {
            pid: 1,
            start_ticks: 1,
        };
        let mut state = State {
            shim: shim.process(),
            ..State::default()
        };
        write(root.path(), "a1", &state);
        state.vmm = vmm.process();
        write(root.path(), "a2", &state);
        state.machine = Some(MachineFacts::default());
        state.timeline.guest_entered_ns = 1;
        write(root.path(), "b", &state);
        // Its VMM does not go.
        state.end = Some(EndFacts::default());
        write(root.path(), "b2", &state);
        state.end = None;
        state.vmm = Some(gone);
        write(root.path(), "c", &state);
        state.shim = Some(gone);
        write(root.path(), "d", &state);
        fs::create_dir(root.path().join("k8s.io/no-state")).unwrap();
        let pods = all(root.path()).unwrap();
        let seen: Vec<_> = pods
            .iter()
            .map(|pod| (pod.id.as_str(), pod.status))
            .collect();
        let expected = [
            ("a1", Status::Starting),
            ("a2", Status::Starting),
            ("b", Status::Running),
            ("b2", Status::Ended),
            ("c", Status::Ended),
            ("d", Status::Abandoned),
        ];
        assert_eq!(seen, expected);
        assert_eq!(pods[0].name.as_deref(), Some("shop/web"));
        assert!(pods[0].age().unwrap() < Duration::from_secs(60));
        assert_eq!((pods[5].name.clone(), pods[5].age()), (None, None));

        let find = |text| find(root.path(), text).map(|pod| pod.id);
        assert_eq!(find("b").unwrap(), "b");
        assert_eq!(find("k8s.io/a1").unwrap(), "a1");
        for (text, words) in [
            ("a", "k8s.io/a1, k8s.io/a2"),
            ("x", "husk ps"),
            ("", "no pod"),
        ] {
            let error = find(text).unwrap_err();
            assert!(
                error.is::<NoPod>() && error.to_string().contains(words),
                "{error}"
            );
        }
        assert!(find("shop/web").unwrap_err().to_string().contains("may be"));
    }
}
