//! The end of processes: output first, then the word.

use std::time::Duration;

use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::topics;
use futures::future::join_all;
use protobuf::MessageField;
use tokio::time::timeout;

use super::Pod;
use crate::agent_client::Exit;
use crate::clock;
use crate::container::State;
use crate::stdio::Stdio;

/// How long the end of a container's first process waits for the others, which
/// end with it.
const OTHERS: Duration = Duration::from_secs(1);

/// How long a process's end waits for somebody to read its output. The output
/// is kept for them all the same.
const SLOW_READER: Duration = Duration::from_millis(500);

impl Pod {
    /// Waits beside the pod for the end of a process.
    pub(super) fn follow_process(&self, id: &str, exec: &str) {
        let Ok((_, agent)) = self.machine() else {
            // Its end is told with the machine's.
            return;
        };
        let (id, exec) = (id.to_owned(), exec.to_owned());
        self.later(async move {
            let outcome = agent.wait(&id, &exec).await;
            move |pod: &mut Pod| match outcome {
                Ok(exit) => pod.process_exited(&id, &exec, exit),
                Err(error) => {
                    // Mostly since the machine has ended, which is told apart.
                    tracing::debug!(id, exec, %error, "wait");
                }
            }
        });
    }

    /// A process has ended: once its output is taken, everybody is told. The
    /// container's first comes after the others.
    pub(super) fn process_exited(&mut self, id: &str, exec: &str, exit: Exit) {
        let Ok(process) = self.process_mut(id, exec) else {
            return;
        };
        if !process.begin_exit(exit) {
            return;
        }
        let stdio = process.stdio.take();
        let mut others = Vec::new();
        if exec.is_empty()
            && let Some(container) = self.containers.get(id)
        {
            for exec in container.execs.values() {
                if matches!(exec.process.state(), State::Starting | State::Running) {
                    others.push(exec.process.watch());
                }
            }
        }
        let (id, exec) = (id.to_owned(), exec.to_owned());
        self.later(async move {
            let others = join_all(others.iter_mut().map(async |end| {
                // Gone is ended, too.
                drop(end.wait_for(Option::is_some).await);
            }));
            // They may live on where the PID namespace is another's.
            let _ = timeout(OTHERS, others).await;
            let stdio = drain(stdio).await;
            move |pod: &mut Pod| pod.tell_exit(&id, &exec, exit, stdio)
        });
    }

    fn tell_exit(&mut self, id: &str, exec: &str, exit: Exit, stdio: Option<Stdio>) {
        let pid = self.pid();
        let Ok(process) = self.process_mut(id, exec) else {
            return;
        };
        // Whoever holds the output open may still write until the deletion.
        process.stdio = stdio;
        process.finish_exit(exit);
        let event = TaskExit {
            container_id: id.to_owned(),
            id: if exec.is_empty() { id } else { exec }.to_owned(),
            pid,
            exit_status: exit.code,
            exited_at: MessageField::some(clock::timestamp(exit.at_ns)),
            ..TaskExit::default()
        };
        self.events.send(topics::TASK_EXIT_EVENT_TOPIC, &event);
    }
}

async fn drain(stdio: Option<Stdio>) -> Option<Stdio> {
    let mut stdio = stdio?;
    stdio.drain(SLOW_READER).await;
    Some(stdio)
}
