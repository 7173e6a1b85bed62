//! Hooks of the container's own (`startContainer`): programs in its root that
//! run as its process would, and in its place, just before its program does.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;

use super::InitError;
use super::executable::{self, ExecutableError, FileId};
use crate::error::{Doing, OsError};
use crate::oci::{Hook, Spec};

/// Most that all of them may take: whoever waits for the start waits longer.
const DEADLINE: Duration = Duration::from_secs(30);

/// Between two looks at one that runs.
const PAUSE: Duration = Duration::from_millis(5);

/// Hooks that only need to be run.
#[derive(Debug, Default)]
pub struct Hooks(Vec<Prepared>);

#[derive(Debug)]
struct Prepared {
    hook: Hook,
    /// What it is told, to be read from the start.
    state: File,
}

impl Hooks {
    /// Those of a container.
    pub fn prepare(spec: &Spec, id: &str) -> Result<Self, OsError> {
        let hooks = spec.hooks.start_container.iter();
        let prepared = hooks.map(|hook| {
            Ok(Prepared {
                hook: hook.clone(),
                state: state(spec, id).doing("write", "the state for a hook")?,
            })
        });
        Ok(Self(prepared.collect::<Result<_, OsError>>()?))
    }

    /// Runs them one by one, to the first that fails. None may be `own`.
    pub fn run(self, own: FileId) -> Result<(), InitError> {
        let end = Instant::now() + DEADLINE;
        self.0.into_iter().try_for_each(|hook| hook.run(own, end))
    }
}

fn state(spec: &Spec, id: &str) -> std::io::Result<File> {
    // The process has become the container's by now, and has its number.
    let state = json!({
        "ociVersion": spec.oci_version, "id": id, "status": "created",
        "pid": std::process::id(), "bundle": "", "annotations": spec.annotations,
    });
    let mut file = File::from(memfd_create("state", MemfdFlags::CLOEXEC)?);
    file.write_all(state.to_string().as_bytes())?;
    file.rewind()?;
    Ok(file)
}

impl Prepared {
    fn run(self, own: FileId, end: Instant) -> Result<(), InitError> {
        let path = &self.hook.path;
        let failed = |reason: String| InitError::Hook {
            path: path.display().to_string(),
            reason,
        };
        let end = match self.hook.timeout {
            Some(seconds) => end.min(Instant::now() + Duration::from_secs(seconds.min(60))),
            None => end,
        };
        let program = executable::find(&path.to_string_lossy(), None, own)?;
        let mut command = Command::new(&program);
        if let Some((name, arguments)) = self.hook.args.split_first() {
            command.arg0(name).args(arguments);
        }
        let environment = self.hook.env.iter();
        command
            .env_clear()
            .envs(environment.filter_map(|line| line.split_once('=')))
            .stdin(Stdio::from(self.state))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let spawned = command.spawn();
        let mut child = spawned.map_err(|error| ExecutableError::refused(path, &error))?;
        loop {
            let ended = child.try_wait().doing("wait for", path.display())?;
            match ended {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(failed(status.to_string())),
                None if Instant::now() < end => std::thread::sleep(PAUSE),
                None => {
                    // It may end in between.
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(failed("it did not end in time".to_owned()));
                }
            }
        }
    }
}
