//! The end of processes: output first, then the word.

use std::fs;
use std::time::Duration;

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::topics;
use futures::future::join_all;
use protobuf::MessageField;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::{MACHINE_GONE, Pod};
use crate::agent_client::{AgentError, End, Exit, Written};
use crate::clock;
use crate::container::{Kind, Process, State};
use crate::stdio::{Limits, Stdio};

/// How long the end of a container's first process waits for the others, which
/// end with it.
const OTHERS: Duration = Duration::from_secs(2);

/// How long a process's end waits for somebody to read its output. The output
/// is kept for them all the same.
const SLOW_READER: Duration = Duration::from_millis(500);

/// How long a guest may take to send what it says a process has written.
const STALLED: Duration = Duration::from_secs(10);

/// Exit code of a process of whose end nobody can tell.
const UNKNOWN: u32 = 255;

/// Least time between two words of the same container's memory.
const OOM_PAUSE: Duration = Duration::from_secs(10);

/// File in the bundle of a container whose memory ran out. CRI-O, which takes no
/// events, looks for it when the container has ended.
const OOM_FILE: &str = "oom";

impl Pod {
    /// Waits beside the pod for the end of a process.
    pub(super) fn follow_process(&mut self, id: &str, exec: &str) {
        let agent = match self.machine() {
            Ok((_, agent)) => agent,
            Err(error) => {
                // The machine's end was told before this process was there.
                tracing::debug!(id, exec, %error, "wait");
                return self.process_exited(id, exec, ended_now(MACHINE_GONE));
            }
        };
        let (id, exec) = (id.to_owned(), exec.to_owned());
        self.later(async move {
            let outcome = agent.wait(&id, &exec).await;
            move |pod: &mut Pod| match outcome {
                Ok(end) => pod.process_exited(&id, &exec, end),
                // The machine's end is told apart.
                Err(AgentError::Gone) => {}
                Err(error) => {
                    tracing::warn!(id, exec, %error, "how the process ends is not known");
                    pod.process_exited(&id, &exec, ended_now(UNKNOWN));
                }
            }
        });
    }

    /// A process has ended: once its output is taken, everybody is told. The
    /// container's first comes after the others.
    pub(super) fn process_exited(&mut self, id: &str, exec: &str, end: End) {
        let limits = self.drain_limits(SLOW_READER, Duration::ZERO);
        let Ok(process) = self.process_mut(id, exec) else {
            return;
        };
        if !process.begin_exit(end) {
            return;
        }
        let stdio = process.stdio.take();
        if end.oom_killed {
            self.tell_oom(id);
        }
        let mut others = if exec.is_empty() {
            self.others(id)
        } else {
            Vec::new()
        };
        let (id, exec) = (id.to_owned(), exec.to_owned());
        self.later(async move {
            let others = join_all(others.iter_mut().map(async |end| {
                // Gone is ended, too.
                drop(end.wait_for(Option::is_some).await);
            }));
            // They may live on where the PID namespace is another's.
            let _ = timeout(OTHERS, others).await;
            let stdio = drain(stdio, end.written, limits).await;
            move |pod: &mut Pod| pod.tell_exit(&id, &exec, end.exit, stdio)
        });
    }

    /// How long a process's output may take that waits `slow_reader` for its
    /// reader, and for that of its children as long as `others`.
    pub(super) fn drain_limits(&self, slow_reader: Duration, others: Duration) -> Limits {
        Limits {
            slow_reader,
            others,
            stalled: self.settings.config.patience().of(STALLED),
        }
    }

    /// Processes that end with a container's first: those that were added and,
    /// when it stands for the pod, the other containers.
    fn others(&self, id: &str) -> Vec<watch::Receiver<Option<Exit>>> {
        let Some(container) = self.containers.get(id) else {
            return Vec::new();
        };
        let added = container.execs.values().map(|exec| &exec.process);
        let is_sandbox = matches!(container.kind, Kind::Sandbox);
        let members = self
            .containers
            .values()
            .filter(|other| is_sandbox && !matches!(other.kind, Kind::Sandbox))
            .map(|other| &other.init);
        added
            .chain(members)
            .filter(|process| matches!(process.state(), State::Starting | State::Running))
            .map(Process::watch)
            .collect()
    }

    fn tell_exit(&mut self, id: &str, exec: &str, exit: Exit, stdio: Option<Stdio>) {
        let Ok(process) = self.process_mut(id, exec) else {
            return;
        };
        // Whoever holds the output open may still write until the deletion.
        process.stdio = stdio;
        process.finish_exit(exit);
        let name = if exec.is_empty() { id } else { exec };
        self.send_exit(name, id, self.pid_of(id), exit);
    }

    /// Tells the end of the process `name` of a container.
    pub(super) fn send_exit(&self, name: &str, container: &str, pid: u32, exit: Exit) {
        let event = TaskExit {
            container_id: container.to_owned(),
            id: name.to_owned(),
            pid,
            exit_status: exit.code,
            exited_at: MessageField::some(clock::timestamp(exit.at_ns)),
            ..TaskExit::default()
        };
        self.events.send(topics::TASK_EXIT_EVENT_TOPIC, &event);
    }

    /// Tells that a container's memory ran out, unless that was just told.
    pub(super) fn tell_oom(&mut self, id: &str) {
        let Ok(container) = self.container_mut(id) else {
            return;
        };
        let told = container
            .oom_told
            .is_some_and(|at| at.elapsed() < OOM_PAUSE);
        if told {
            return;
        }
        container.oom_told = Some(Instant::now());
        if let Err(error) = fs::write(container.bundle.join(OOM_FILE), "") {
            tracing::warn!(id, %error, "writing {OOM_FILE}");
        }
        let event = TaskOOM {
            container_id: id.to_owned(),
            ..TaskOOM::default()
        };
        self.events.send(topics::TASK_OOM_EVENT_TOPIC, &event);
    }
}

/// The end of a process of which the guest does not tell.
pub(super) fn ended_now(code: u32) -> End {
    Exit::now(code).into()
}

async fn drain(stdio: Option<Stdio>, written: Option<Written>, limits: Limits) -> Option<Stdio> {
    let mut stdio = stdio?;
    if let Some(written) = written {
        stdio.expect(written);
    }
    stdio.drain(limits).await;
    Some(stdio)
}
