//! OCI hooks: programs of the node's that a spec wants run at the turns of a
//! container's life.
//!
//! Those of the container's own program, `startContainer`, are the guest's to run.
//! `createContainer` names programs of the node's for the container's namespaces,
//! which are the guest's: nobody can run them.
//!
//! They run among the node's mounts, not the shim's: what they mount is for
//! others.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{ChildStderr, Command};
use tokio::time::timeout;

use crate::descriptors;

/// How long a hook may take that names no time.
const DEADLINE: Duration = Duration::from_secs(60);

/// How long what a hook has said is waited for when it has ended: a child of its
/// may hold the pipe.
const AFTER_END: Duration = Duration::from_millis(200);

/// The node's mounts, of a shim that has its own.
static NODE_MOUNTS: OnceLock<File> = OnceLock::new();

/// A file of a bundle that is there as long as the container's poststop hooks have
/// yet to run.
const OWED_FILE: &str = "husk-poststop";

/// Most that is told of what a hook says, bytes.
const COMPLAINT: u64 = 1024;

/// The hooks of a spec.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Hooks {
    prestart: Option<Vec<Hook>>,
    create_runtime: Option<Vec<Hook>>,
    create_container: Option<Vec<Hook>>,
    poststart: Option<Vec<Hook>>,
    poststop: Option<Vec<Hook>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Hook {
    path: PathBuf,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<String>>,
    /// Seconds.
    #[serde(default)]
    timeout: Option<u64>,
}

/// Those of a container, and what they are told of it.
#[derive(Debug)]
pub struct ContainerHooks {
    hooks: Hooks,
    state: Value,
    owed: PathBuf,
}

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It is not there, or no program.
    #[error("{turn} hook {path}")]
    Run {
        /// Its place in the spec.
        turn: &'static str,
        /// Its program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It says so.
    #[error("{turn} hook {path}: {status}: {complaint}")]
    Failed {
        /// Its place in the spec.
        turn: &'static str,
        /// Its program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to its standard error.
        complaint: String,
    },
    /// It went on for too long, and was killed.
    #[error("{turn} hook {path} did not end within {seconds} s")]
    Deadline {
        /// Its place in the spec.
        turn: &'static str,
        /// Its program.
        path: PathBuf,
        /// How long it had.
        seconds: u64,
    },
}

impl ContainerHooks {
    /// Those of the container `id` of a bundle.
    pub fn new(
        hooks: Hooks,
        version: &str,
        id: &str,
        bundle: &Path,
        annotations: &BTreeMap<String, String>,
    ) -> Self {
        if let Some(hook) = hooks.create_container.iter().flatten().next() {
            let path = hook.path.display();
            tracing::warn!(id, %path, "createContainer hooks cannot be run in a virtual machine");
        }
        let state = json!({
            "ociVersion": version, "id": id, "bundle": bundle, "annotations": annotations,
        });
        Self {
            hooks,
            state,
            owed: bundle.join(OWED_FILE),
        }
    }

    /// The container is made and not yet started.
    ///
    /// # Errors
    /// The first that fails: there shall be no such container.
    pub async fn created(&self, pid: u32) -> Result<(), HookError> {
        for (turn, hooks) in [
            ("prestart", &self.hooks.prestart),
            ("createRuntime", &self.hooks.create_runtime),
        ] {
            for hook in hooks.iter().flatten() {
                hook.run(turn, &self.state("creating", pid)).await?;
            }
        }
        if self.hooks.poststop.iter().flatten().next().is_some()
            && let Err(error) = fs::write(&self.owed, "")
        {
            let path = self.owed.display();
            tracing::warn!(%path, %error, "poststop hooks will not survive this shim");
        }
        Ok(())
    }

    /// Its program runs. A hook that fails changes nothing about that.
    pub async fn started(&self, pid: u32) {
        let state = self.state("running", pid);
        run_all("poststart", self.hooks.poststart.as_deref(), &state).await;
    }

    /// It is gone.
    pub async fn deleted(&self) {
        self.settle();
        let state = self.state("stopped", 0);
        run_all("poststop", self.hooks.poststop.as_deref(), &state).await;
    }

    /// As `deleted`, for a container whose shim was killed before it could.
    pub async fn deleted_without_shim(&self) {
        if self.settle() {
            self.deleted().await;
        }
    }

    /// Whether the poststop hooks were still to be run; from now on they are not.
    fn settle(&self) -> bool {
        fs::remove_file(&self.owed).is_ok()
    }

    fn state(&self, status: &str, pid: u32) -> Vec<u8> {
        let mut state = self.state.clone();
        state["status"] = status.into();
        state["pid"] = pid.into();
        state.to_string().into_bytes()
    }
}

/// Whether a bundle has poststop hooks that have yet to run.
pub fn are_owed(bundle: &Path) -> bool {
    bundle.join(OWED_FILE).exists()
}

/// Has hooks run where the mounts are those of now: the caller is about to have
/// its own.
///
/// # Errors
/// No descriptor is free.
pub fn keep_node_mounts() -> io::Result<()> {
    let mounts = File::open("/proc/self/ns/mnt")?;
    NODE_MOUNTS.get_or_init(|| mounts);
    Ok(())
}

/// Has a program run among the node's mounts, in the same directory.
///
/// # Errors
/// The directory is gone.
pub fn among_node_mounts(command: &mut Command) -> io::Result<()> {
    let Some(mounts) = NODE_MOUNTS.get() else {
        return Ok(());
    };
    let directory = std::env::current_dir()?.into_os_string().into_vec();
    let directory = CString::new(directory)?;
    let enter = move || {
        setns(mounts.as_fd(), CloneFlags::CLONE_NEWNS)?;
        rustix::process::chdir(directory.as_c_str())?;
        descriptors::give_back()
    };
    // SAFETY: a few system calls on what was made before.
    unsafe { command.pre_exec(enter) };
    Ok(())
}

async fn run_all(turn: &'static str, hooks: Option<&[Hook]>, state: &[u8]) {
    for hook in hooks.unwrap_or_default() {
        if let Err(error) = hook.run(turn, state).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "hook");
        }
    }
}

impl Hook {
    async fn run(&self, turn: &'static str, state: &[u8]) -> Result<(), HookError> {
        let path = || self.path.clone();
        let limit = self.timeout.map_or(DEADLINE, Duration::from_secs);
        let ended = timeout(limit, self.execute(state)).await;
        let ended = ended.map_err(|_| HookError::Deadline {
            turn,
            path: path(),
            seconds: limit.as_secs(),
        })?;
        match ended {
            Ok((status, _)) if status.success() => Ok(()),
            Ok((status, complaint)) => Err(HookError::Failed {
                turn,
                path: path(),
                status,
                complaint,
            }),
            Err(source) => Err(HookError::Run {
                turn,
                path: path(),
                source,
            }),
        }
    }

    async fn execute(&self, state: &[u8]) -> io::Result<(ExitStatus, String)> {
        let mut command = Command::new(&self.path);
        if let Some((name, arguments)) = self.args.as_deref().and_then(<[_]>::split_first) {
            command.arg0(name).args(arguments);
        }
        let environment = self.env.iter().flatten();
        command
            .env_clear()
            .envs(environment.filter_map(|line| line.split_once('=')))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        among_node_mounts(&mut command)?;
        let mut child = command.spawn()?;
        let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
        let complaint = stderr.map(|stderr| tokio::spawn(take_in(stderr)));
        if let Some(mut stdin) = stdin {
            // It need not read it.
            let _ = stdin.write_all(state).await;
        }
        let status = child.wait().await?;
        let complaint = match complaint {
            Some(complaint) => timeout(AFTER_END, complaint)
                .await
                .ok()
                .and_then(Result::ok),
            None => None,
        };
        Ok((status, complaint.unwrap_or_default()))
    }
}

/// The beginning of what a hook says; the rest is read, too, so that it can end.
async fn take_in(mut stderr: ChildStderr) -> String {
    let mut begin = Vec::new();
    if (&mut stderr)
        .take(COMPLAINT)
        .read_to_end(&mut begin)
        .await
        .is_ok()
    {
        let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
    }
    String::from_utf8_lossy(&begin).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(json: Value) -> ContainerHooks {
        in_bundle(json, Path::new("/bundle"))
    }

    fn in_bundle(json: Value, bundle: &Path) -> ContainerHooks {
        let hooks = serde_json::from_value(json).unwrap();
        let annotations = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        ContainerHooks::new(hooks, "1.1.0", "c1", bundle, &annotations)
    }

    fn shell(script: &str) -> Value {
        json!({"path": "/bin/sh", "args": ["hook", "-c", script], "env": ["KEY=a=b"]})
    }

    #[tokio::test]
    async fn hooks_are_told_of_the_container() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        let writes = |name: &str| shell(&format!("cat > {}", file(name).display()));
        let hooks = hooks(json!({
            "prestart": [shell(&format!("echo $KEY $PATH > {}", file("env").display()))],
            "createRuntime": null,
            "poststart": [shell("exit 1"), writes("started")],
            "poststop": [writes("stopped")],
        }));
        hooks.created(7).await.unwrap();
        let environment = std::fs::read_to_string(file("env")).unwrap();
        assert!(environment.starts_with("a=b"), "{environment}");
        hooks.started(7).await;
        hooks.deleted().await;
        let told = |name| -> Value {
            serde_json::from_str(&std::fs::read_to_string(file(name)).unwrap()).unwrap()
        };
        let expected = json!({
            "ociVersion": "1.1.0", "id": "c1", "bundle": "/bundle", "annotations": {"a": "b"},
            "status": "running", "pid": 7,
        });
        assert_eq!(told("started"), expected);
        assert_eq!(told("stopped")["status"], "stopped");
    }

    #[tokio::test]
    async fn a_killed_shims_hooks_run_once() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let writes = shell(&format!("echo ran >> {}", log.display()));
        let hooks = in_bundle(json!({ "poststop": [writes] }), dir.path());
        hooks.deleted_without_shim().await;
        assert!(!log.exists(), "of a container that never was");
        hooks.created(7).await.unwrap();
        hooks.deleted_without_shim().await;
        hooks.deleted_without_shim().await;
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "ran\n");
        hooks.created(7).await.unwrap();
        hooks.deleted().await;
        hooks.deleted_without_shim().await;
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "ran\nran\n");
    }

    #[tokio::test]
    async fn a_hook_that_fails_says_why() {
        for (hook, text) in [
            (
                shell("echo no luck >&2; exit 3"),
                "createRuntime hook /bin/sh: exit status: 3: no luck",
            ),
            (
                json!({"path": "/bin/sleep", "args": ["sleep", "100"], "timeout": 1}),
                "createRuntime hook /bin/sleep did not end within 1 s",
            ),
            (
                json!({"path": "/not/there"}),
                "createRuntime hook /not/there",
            ),
        ] {
            let hooks = hooks(json!({"createRuntime": [hook]}));
            assert_eq!(hooks.created(7).await.unwrap_err().to_string(), text);
        }
    }

    #[tokio::test]
    async fn what_a_hook_leaves_running_holds_nobody_up() {
        let hooks = hooks(json!({"createRuntime": [shell("sleep 30 & exit 0")]}));
        let done = timeout(Duration::from_secs(10), hooks.created(7)).await;
        done.unwrap().unwrap();
    }
}
