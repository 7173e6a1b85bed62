//! `delete`: removes what a shim that was killed has left, and tells how its
//! container ended.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use protobuf::MessageField;

use crate::bundle::{Bundle, Role};
use crate::cgroup;
use crate::clock;
use crate::config::Config;
use crate::flags::Flags;
use crate::hook;
use crate::id::{Id, IdError};
use crate::process::Process;
use crate::socket::{DEFAULT_DIR, ShimSocket};
use crate::start::{ADDRESS_FILE, PID_FILE};
use crate::state_dir::{State, StateDir};

/// As if killed by `SIGKILL`: nobody was there to see.
const EXIT_CODE: u32 = 137;

/// How long all of it may take: containerd kills us after five seconds.
const WHOLE: Duration = Duration::from_secs(4);

/// Until when each part may wait for others. Mostly nobody is waited for, and the
/// hooks have nearly all of the time; at worst a second. What is not done by then
/// stays undone: hooks that go on are killed and not run again, and a process that
/// will not end and its cgroup are left, and stay written down. A disk that does not answer is waited for
/// as long as it takes, so that containerd may kill us all the same.
#[derive(Clone, Copy, Debug)]
struct Times {
    /// A shim may go on that has no pod any more: it may be telling containerd its
    /// last events.
    last_words: Instant,
    /// What was killed may take to end; a second for its cgroup follows.
    killed: Instant,
    /// The hooks may go on.
    whole: Instant,
}

impl Times {
    /// Those from now on, less of them when there are hooks to be run.
    fn from_now(hooks: bool) -> Self {
        let now = Instant::now();
        let (last_words, killed) = match hooks {
            true => (1, 2),
            false => (2, 3),
        };
        Self {
            last_words: now + Duration::from_secs(last_words),
            killed: now + Duration::from_secs(killed),
            whole: now + WHOLE,
        }
    }
}

fn time_until(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

/// Names that cannot be cleaned up after.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// A name that cannot be.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The answer could not be written.
    #[error("writing the answer")]
    Write(#[from] io::Error),
}

/// Cleans up and prints the answer. A container of a pod has nothing of its own
/// on the node, so only the pod's own name removes anything, unless containerd
/// will not say that name again.
///
/// What will not go is no error: containerd would keep the bundle, ask again only
/// when it is restarted, and make nothing of that name until then. It writes what we
/// say of it into its log.
///
/// # Errors
/// The names cannot be, or nobody reads the answer.
pub fn delete(flags: &Flags) -> Result<(), CleanupError> {
    let namespace = Id::new("namespace", &flags.namespace)?;
    let id = Id::new("id", &flags.id)?;
    let config = Config::load().unwrap_or_else(|error| {
        // Most likely the pod is from a time when it was right.
        eprintln!(
            "containerd-shim-husk-v2: {}; cleaning up by the defaults",
            crate::error::chain(&error)
        );
        Config::default()
    });
    let bundle = flags
        .bundle
        .clone()
        .or_else(|| std::env::current_dir().ok());
    let bundle = bundle.unwrap_or_default();
    let times = Times::from_now(hook::are_owed(&bundle));
    let find = |pod: &Id| {
        let dir = StateDir::new(&config.state_dir, &namespace, pod);
        let state = dir.read().unwrap_or_default();
        (dir, state)
    };
    let serves = |state: &State, pod: &Id| {
        let shim = state.shim.filter(|shim| shim.is_alive());
        shim.is_some_and(|shim| {
            // One that was killed closes its socket before it is seen to have ended.
            socket_of(flags, &bundle, pod).answers() || !ends(shim, times.last_words)
        })
    };
    let left = pod_of(&bundle).map(|pod| (find(&pod), pod));
    let ((state_dir, state), pod) = left
        .filter(|((_, state), pod)| state.is_deleted && !serves(state, pod))
        .unwrap_or_else(|| (find(&id), id.clone()));
    let pid = state.vmm.map_or(0, |vmm| vmm.pid);
    // containerd asks when it closes its connection, which it does when the pod's
    // own container is deleted. The shim ends by itself after the last one.
    if state.is_deleted && serves(&state, &pod) {
        return answer(pid);
    }
    let shim = match state.shim {
        None => forgotten_shim(flags, &bundle).filter(|shim| !ends(*shim, times.last_words)),
        shim => shim,
    };
    // It may be alive and only deaf.
    let processes: Vec<_> = [shim, state.vmm, state.file_server]
        .into_iter()
        .flatten()
        .collect();
    Process::kill_all(processes.iter().copied(), time_until(times.killed));
    let cgroup = state.cgroup.filter(|path| !cgroup::remove(path));
    let alive: Vec<_> = processes.iter().filter(|one| one.is_alive()).collect();
    if alive.is_empty() && cgroup.is_none() {
        state_dir.remove();
    } else {
        let pids: Vec<_> = alive.iter().map(|process| process.pid).collect();
        eprintln!(
            "containerd-shim-husk-v2: not all of {}/{pod} is gone: processes {pids:?}, cgroup \
             {cgroup:?}; see `husk check`",
            flags.namespace
        );
    }
    let socket = socket_of(flags, &bundle, &pod);
    if !socket.answers() {
        socket.remove();
    }
    run_hooks(&bundle, &id, times.whole);
    answer(pid)
}

/// Runs the poststop hooks that the killed shim did not live to run.
fn run_hooks(bundle: &Path, id: &Id, until: Instant) {
    if !hook::are_owed(bundle) {
        return;
    }
    // A bundle that cannot be read never became a container.
    let Ok(bundle) = Bundle::load(bundle) else {
        return;
    };
    let hooks = bundle.hooks(id);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => {
            let run = async {
                tokio::time::timeout(time_until(until), hooks.deleted_without_shim()).await
            };
            if runtime.block_on(run).is_err() {
                eprintln!("containerd-shim-husk-v2: the poststop hooks of {id} take too long");
            }
        }
        Err(error) => eprintln!("containerd-shim-husk-v2: poststop hooks of {id}: {error}"),
    }
}

/// The pod that a container's bundle names.
fn pod_of(bundle: &Path) -> Option<Id> {
    match Bundle::load(bundle).ok()?.role().ok()? {
        Role::Member { sandbox } => Some(sandbox),
        Role::Single | Role::Sandbox => None,
    }
}

fn answer(pid: u32) -> Result<(), CleanupError> {
    let response = DeleteResponse {
        pid,
        exit_status: EXIT_CODE,
        exited_at: MessageField::some(clock::timestamp(clock::wall_ns())),
        ..DeleteResponse::default()
    };
    let text = response.write_to_bytes().map_err(io::Error::other)?;
    Ok(io::stdout().write_all(&text)?)
}

/// Where a pod's shim is asked.
fn socket_of(flags: &Flags, bundle: &Path, pod: &Id) -> ShimSocket {
    let dir = socket_dir(bundle);
    ShimSocket::new(&dir, &flags.address, &flags.namespace, pod.as_str())
}

/// Where the shim's socket is: newer containerds say where at its start. The file
/// of a container names the socket of its pod, which is in the same place.
fn socket_dir(bundle: &Path) -> PathBuf {
    let address = fs::read_to_string(bundle.join(ADDRESS_FILE)).unwrap_or_default();
    let path = address.trim().strip_prefix("unix://").map(Path::new);
    let dir = path
        .filter(|path| path.is_absolute())
        .and_then(Path::parent);
    dir.unwrap_or(Path::new(DEFAULT_DIR)).to_owned()
}

/// The process ends by itself in time.
fn ends(process: Process, until: Instant) -> bool {
    while process.is_alive() {
        if Instant::now() >= until {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
    true
}

/// A shim that serves this bundle, though it has no pod any more.
fn forgotten_shim(flags: &Flags, bundle: &Path) -> Option<Process> {
    let pid = fs::read_to_string(bundle.join(PID_FILE)).ok()?;
    let process = Process::find(pid.trim().parse().ok()?)?;
    // The number may be another's by now.
    let arguments = process.arguments();
    let has = |name: &str, value: &str| {
        arguments
            .windows(2)
            .any(|pair| pair[0] == name && pair[1] == value)
    };
    (has("-namespace", &flags.namespace) && has("-id", &flags.id)).then_some(process)
}
