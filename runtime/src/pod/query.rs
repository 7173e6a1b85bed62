//! Questions about the pod that change nothing.

use std::iter;
use std::path::PathBuf;

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::task::Status;
use tokio::sync::watch;

use super::{Pod, Reply};
use crate::agent_client::Exit;
use crate::container::{Kind, State};
use crate::error::Error;
use crate::stdio::StdioPaths;

/// What containerd wants to know about a process.
#[derive(Clone, Debug)]
pub struct ProcessReport {
    /// Its container's bundle.
    pub bundle: PathBuf,
    /// What is told as its pid.
    pub pid: u32,
    /// Where in its life it is.
    pub status: Status,
    /// Where its streams go.
    pub paths: StdioPaths,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
    /// When containerd asked for its container, wall clock.
    pub created_ns: u64,
}

/// Counters: `io.containerd.cgroups.v2.Metrics`, serialized.
pub type Stats = Vec<u8>;

impl Pod {
    /// Tells about a process.
    pub fn report(&mut self, id: &str, exec: &str, reply: Reply<ProcessReport>) {
        let report = self.container(id).and_then(|container| {
            let process = self.process(id, exec)?;
            let exit = match process.state() {
                State::Stopped(exit) => Some(exit),
                _ => None,
            };
            Ok(ProcessReport {
                bundle: container.bundle.clone(),
                pid: self.pid_of(id),
                status: container.status(exec).unwrap_or(Status::UNKNOWN),
                paths: process.paths.clone(),
                exit,
                created_ns: container.created_ns,
            })
        });
        reply.send(report);
    }

    /// Follows the end of a process.
    pub fn watch(&mut self, id: &str, exec: &str, reply: Reply<watch::Receiver<Option<Exit>>>) {
        reply.send(self.process(id, exec).map(|process| process.watch()));
    }

    /// A container's processes as far as they are known here, by their names; the
    /// first has none, and counts until the container is deleted: a containerd
    /// that starts again takes an empty list for a task that never was, and would
    /// lose its exit code. The guest is not asked, whose numbers would be taken
    /// for the node's.
    pub fn processes(&mut self, id: &str, reply: Reply<(u32, Vec<String>)>) {
        let pid = self.pid_of(id);
        reply.send(self.container(id).map(|container| {
            let running = container.execs.iter().filter(|(_, exec)| {
                matches!(exec.process.state(), State::Starting | State::Running)
            });
            let added = running.map(|(name, _)| name.clone());
            (pid, iter::once(String::new()).chain(added).collect())
        }));
    }

    /// A container's counters; the sandbox's are those of the whole pod.
    pub fn stats(&mut self, id: String, reply: Reply<Stats>) {
        match self.container(&id).map(|c| (&c.kind, c.init.state())) {
            Err(error) => reply.send(Err(error)),
            Ok((Kind::Sandbox, _)) => {
                let metrics = self
                    .cgroup
                    .as_ref()
                    .map(|cgroup| cgroup.metrics())
                    .unwrap_or_default();
                // Plain numbers always serialize.
                reply.send(Ok(metrics.write_to_bytes().unwrap_or_default()));
            }
            Ok((_, State::Stopped(_))) => reply.send(Err(Error::Finished)),
            Ok(_) => {
                self.with_agent(reply, move |agent| async move { agent.stats(&id).await });
            }
        }
    }

    /// What is told as a container's pid.
    pub fn task_pid(&mut self, id: &str, reply: Reply<u32>) {
        reply.send(self.container(id).map(|_| self.pid_of(id)));
    }
}
