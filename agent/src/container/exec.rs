//! The processes that join a running container.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_protocol::agent::Streams;
use husk_protocol::limit;

use super::attempt::{Attempt, Underway, attempt};
use super::process::Process;
use super::{Container, Surroundings, end_unconfirmed, launch, terminal_of};
use crate::error::{Doing, Error};
use crate::init::plan::{ExecPlan, Kind, Plan};
use crate::lock::lock;
use crate::oci;
use crate::stdio::Stdio;

/// A process of a container.
#[derive(Debug)]
pub enum ProcessRef<'a> {
    /// Its first one.
    First(&'a Process),
    /// One made by exec.
    Exec(Arc<Process>),
}

impl std::ops::Deref for ProcessRef<'_> {
    type Target = Process;

    fn deref(&self) -> &Process {
        match self {
            Self::First(process) => process,
            Self::Exec(process) => process,
        }
    }
}

/// What an exec id stands for.
#[derive(Debug)]
pub enum Exec {
    /// A process that is being made.
    Making(Underway),
    /// One that runs or has ended.
    Made(Arc<Process>),
}

impl Container {
    /// Runs another process.
    pub async fn exec(
        &self,
        exec_id: &str,
        mut process: oci::Process,
        streams: &Streams,
        terminal: bool,
        around: &Surroundings,
    ) -> Result<Arc<Process>, Error> {
        self.expect_running()?;
        if process.capabilities.is_none() {
            process.capabilities.clone_from(&self.process.capabilities);
        }
        let attempt = self.reserve_exec(exec_id)?;
        let made = self
            .exec_reserved(process, streams, terminal, around, &attempt)
            .await;
        let mut execs = lock(&self.execs);
        match made {
            Ok(process) => {
                let process = Arc::new(process);
                execs.insert(exec_id.to_owned(), Exec::Made(Arc::clone(&process)));
                Ok(process)
            }
            Err(error) => {
                execs.remove(exec_id);
                Err(error)
            }
        }
    }

    fn reserve_exec(&self, exec_id: &str) -> Result<Attempt, Error> {
        let mut execs = lock(&self.execs);
        if execs.len() >= limit::EXECS {
            return Err(Error::TooMany {
                what: "processes in a container",
                limit: limit::EXECS,
            });
        }
        match execs.entry(exec_id.to_owned()) {
            Entry::Vacant(slot) => {
                let (attempt, underway) = attempt();
                slot.insert(Exec::Making(underway));
                Ok(attempt)
            }
            Entry::Occupied(_) => Err(Error::ProcessExists {
                id: self.id.clone(),
                exec_id: exec_id.to_owned(),
            }),
        }
    }

    async fn exec_reserved(
        &self,
        process: oci::Process,
        streams: &Streams,
        terminal: bool,
        around: &Surroundings,
        attempt: &Attempt,
    ) -> Result<Process, Error> {
        let pidfd = self.first.pidfd().try_clone();
        let pidfd = pidfd.doing("open", "the container's process")?;
        let (uid, gid) = self.id_maps.outside(&process.user)?;
        let mut cgroups = vec![self.cgroup.procs_file()];
        cgroups.extend(own_cgroup_of(self.first.pid(), &around.cgroup_root));
        let plan = Plan {
            cgroups,
            terminal,
            kind: Kind::Exec(Box::new(ExecPlan {
                process,
                seccomp: self.seccomp.clone(),
                personality: self.personality,
                pidfd: pidfd.as_raw_fd(),
                namespaces: self.namespaces.bits().cast_unsigned(),
            })),
        };
        let (stdio, child_streams) = Stdio::connect(&around.dialler, streams, terminal).await?;
        child_streams.hand_over(uid, gid)?;
        let launched =
            launch::launch(&around.reaper, &plan, child_streams, &[pidfd], attempt).await?;
        let terminal = terminal_of(launched.terminal);
        let wired = terminal.and_then(|terminal| {
            let streams = stdio.start(terminal.as_ref())?;
            Ok((terminal, streams))
        });
        let (terminal, streams) = wired.inspect_err(|_| {
            // It runs by now, and nobody would ever hear of it.
            let _ = launched.child.pidfd.signal(libc::SIGKILL);
        })?;
        let process = Process::new(launched.child, terminal, streams, || ());
        let confirmed = launch::confirm(launched.channel, launched.deadline);
        if let Err(error) = attempt.work(confirmed).await {
            end_unconfirmed(&process, &error).await?;
            return Err(error.into());
        }
        Ok(process)
    }

    /// The first process, or the one with this id.
    pub fn process(&self, exec_id: &str) -> Result<ProcessRef<'_>, Error> {
        if exec_id.is_empty() {
            return Ok(ProcessRef::First(&self.first));
        }
        match lock(&self.execs).get(exec_id) {
            Some(Exec::Made(process)) => Ok(ProcessRef::Exec(Arc::clone(process))),
            Some(Exec::Making(_)) => Err(Error::NotMade {
                id: self.id.clone(),
                exec_id: exec_id.to_owned(),
            }),
            None => Err(self.no_process(exec_id)),
        }
    }

    /// Signals one process. What is still being made is given up when it is
    /// killed.
    pub fn signal(&self, exec_id: &str, signal: i32) -> Result<(), Error> {
        if signal == libc::SIGKILL
            && let Some(Exec::Making(underway)) = lock(&self.execs).get(exec_id)
        {
            underway.give_up();
            return Ok(());
        }
        self.process(exec_id)?.signal(signal)
    }

    /// Forgets an ended process. One that is still being made is given up, and
    /// nothing is left of it afterwards.
    pub async fn delete_process(&self, exec_id: &str) -> Result<(), Error> {
        let underway = {
            let mut execs = lock(&self.execs);
            match execs.get(exec_id) {
                Some(Exec::Making(underway)) => underway.clone(),
                Some(Exec::Made(process)) if process.ended().is_some() => {
                    execs.remove(exec_id);
                    return Ok(());
                }
                Some(Exec::Made(_)) => return Err(self.still_running(exec_id)),
                None => return Err(self.no_process(exec_id)),
            }
        };
        underway.give_up();
        underway.over().await;
        match lock(&self.execs).contains_key(exec_id) {
            true => Err(self.still_running(exec_id)),
            false => Ok(()),
        }
    }

    /// All processes, with the ids of those made by exec.
    pub fn processes(&self) -> Result<Vec<(i32, String)>, Error> {
        let mut ids = HashMap::new();
        for (exec_id, exec) in lock(&self.execs).iter() {
            // The number of an ended one may be another's.
            if let Exec::Made(process) = exec
                && process.ended().is_none()
            {
                ids.insert(process.pid(), exec_id.clone());
            }
        }
        let with_id = |pid| (pid, ids.remove(&pid).unwrap_or_default());
        Ok(self.cgroup.processes()?.into_iter().map(with_id).collect())
    }

    fn still_running(&self, exec_id: &str) -> Error {
        Error::StillRunning {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        }
    }

    fn no_process(&self, exec_id: &str) -> Error {
        Error::NoProcess {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        }
    }
}

/// Where the first process is now: the container may have moved it.
fn own_cgroup_of(pid: i32, root: &Path) -> Option<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(root.join(path).join("cgroup.procs"))
}
