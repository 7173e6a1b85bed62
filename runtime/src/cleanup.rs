//! `delete`: removes what a shim that was killed has left, and tells how its
//! container ended.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use protobuf::MessageField;

use crate::cgroup;
use crate::clock;
use crate::config::{Config, ConfigError};
use crate::flags::Flags;
use crate::id::{Id, IdError};
use crate::process::Process;
use crate::socket::{DEFAULT_DIR, ShimSocket};
use crate::start::PID_FILE;
use crate::state_dir::StateDir;

/// As if killed by `SIGKILL`: nobody was there to see.
const EXIT_CODE: u32 = 137;

/// How long a process may take to end.
const PATIENCE: Duration = Duration::from_secs(2);

/// Names that cannot be cleaned up after.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// A name that cannot be.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The node's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The answer could not be written.
    #[error("writing the answer")]
    Write(#[from] io::Error),
}

/// Cleans up and prints the answer. A container of a pod has nothing of its own
/// on the node, so only the pod's own name removes anything.
///
/// # Errors
/// The names cannot be, or nobody reads the answer.
pub fn delete(flags: &Flags) -> Result<(), CleanupError> {
    let namespace = Id::new("namespace", &flags.namespace)?;
    let pod = Id::new("id", &flags.id)?;
    let config = Config::load()?;
    let state_dir = StateDir::new(&config.state_dir, &namespace, &pod);
    let state = state_dir.read().unwrap_or_default();
    let pid = state.vmm.map_or(0, |vmm| vmm.pid);
    let shim = state.shim.or_else(|| forgotten_shim(flags));
    // It may be alive and only deaf.
    let processes = [shim, state.vmm, state.file_server];
    Process::kill_all(processes.into_iter().flatten(), PATIENCE);
    if let Some(path) = &state.cgroup {
        cgroup::remove(path);
    }
    state_dir.remove();
    let socket = ShimSocket::new(
        Path::new(DEFAULT_DIR),
        &flags.address,
        &flags.namespace,
        &flags.id,
    );
    if !socket.answers() {
        socket.remove();
    }
    let response = DeleteResponse {
        pid,
        exit_status: EXIT_CODE,
        exited_at: MessageField::some(clock::timestamp(clock::wall_ns())),
        ..DeleteResponse::default()
    };
    let text = response.write_to_bytes().map_err(io::Error::other)?;
    Ok(io::stdout().write_all(&text)?)
}

/// A shim that serves this bundle, though it has no pod any more.
fn forgotten_shim(flags: &Flags) -> Option<Process> {
    let bundle = match &flags.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().ok()?,
    };
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
