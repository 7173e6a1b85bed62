//! The task that owns the control socket, the console and the process. It ends with
//! the process, and then tells everybody why.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use husk_vmm_spec::{ExitReason, Failure, Message, Reply, Request, Timeline};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::console::Console;
use super::control::ControlSocket;
use super::end::{self, VmEnd};
use super::pinned::{Pinned, Plugging};
use crate::agent_client::clean;
use crate::cgroup::CgroupDir;
use crate::child::Child;

/// How long a VMM that was asked to end may take before it is killed.
pub(super) const KILL_PATIENCE: Duration = Duration::from_millis(500);

/// A request, and who waits for the answer.
pub(super) struct Call {
    pub(super) request: Request,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) reply: oneshot::Sender<Result<Reply, Failure>>,
}

/// Who waits for an answer, and what it tells of what is pinned.
pub(super) type Unanswered = (oneshot::Sender<Result<Reply, Failure>>, Option<Plugging>);

/// Owns a running VMM.
pub(super) struct Owner {
    pub(super) child: Child,
    pub(super) cgroup: Option<CgroupDir>,
    pub(super) control: ControlSocket,
    pub(super) console: Console,
    pub(super) calls: mpsc::Receiver<Call>,
    pub(super) kill: Arc<Notify>,
    pub(super) request_limit: Duration,
    pub(super) after_kill: Duration,
    pub(super) started: Option<oneshot::Sender<Timeline>>,
    pub(super) pinned: Pinned,
    pub(super) unanswered: VecDeque<Unanswered>,
}

impl Owner {
    pub(super) async fn run(mut self, end: watch::Sender<Option<VmEnd>>) {
        let reason = self.serve().await;
        // Whatever happened, the process ends now.
        drop(self.control);
        let has_ended = self.child.end(KILL_PATIENCE, self.after_kill).await;
        self.console.drain();
        let unsaid = || match has_ended {
            true => self
                .cgroup
                .as_ref()
                .is_some_and(CgroupDir::has_run_out_of_memory)
                .then(end::starved),
            false => Some(end::stuck()),
        };
        end.send_replace(Some(VmEnd {
            reason: reason.or_else(unsaid),
            console: self.console.tail(),
        }));
    }

    /// Returns when the machine has ended or is to end.
    async fn serve(&mut self) -> Option<ExitReason> {
        let mut deadline: Option<Instant> = None;
        loop {
            tokio::select! {
                message = self.control.receive() => match message {
                    Ok(Some(Message::Started(timeline))) => {
                        if let Some(started) = self.started.take() {
                            // Nobody waits any more after the deadline.
                            let _ = started.send(timeline);
                        }
                    }
                    Ok(Some(Message::Reply(answer))) => match self.unanswered.pop_front() {
                        Some((reply, plugging)) => {
                            self.pinned.answered(plugging, answer.is_ok());
                            drop(reply.send(answer.map_err(cleaned)));
                        }
                        None => {
                            tracing::error!("the VMM answers what was not asked; it is ended");
                            return None;
                        }
                    },
                    Ok(Some(Message::Exited(ExitReason::Failed(failure)))) => {
                        return Some(ExitReason::Failed(cleaned(failure)));
                    }
                    Ok(Some(Message::Exited(reason))) => return Some(reason),
                    Ok(None) => return None,
                    Err(error) => {
                        tracing::warn!(%error, "VMM's control socket");
                        return None;
                    }
                },
                () = self.console.read() => {}
                call = self.calls.recv(), if deadline.is_none() => match call {
                    Some(Call { request, descriptors, reply }) => {
                        let plugging = match self.pinned.expect(&request) {
                            Ok(plugging) => plugging,
                            Err(failure) => {
                                drop(reply.send(Err(failure)));
                                continue;
                            }
                        };
                        let sent = self.control.send(&request, &descriptors);
                        // Biased: only a VMM that takes nothing is ended so rudely.
                        let sent = tokio::select! {
                            biased;
                            sent = timeout(self.request_limit, sent) => sent,
                            () = self.kill.notified() => return None,
                        };
                        match sent {
                            Ok(Ok(())) => self.unanswered.push_back((reply, plugging)),
                            Ok(Err(error)) => {
                                tracing::debug!(%error, "VMM's control socket");
                                // It has ended, mostly, and what it said is still to be
                                // read. Nobody else would end one that is only deaf.
                                deadline = Some(Instant::now() + KILL_PATIENCE);
                            }
                            Err(_) => {
                                tracing::error!("the VMM takes no requests; it is ended");
                                return None;
                            }
                        }
                    }
                    // Nobody holds the machine any more.
                    None => self.kill.notify_one(),
                },
                () = self.kill.notified(), if deadline.is_none() => {
                    let limit = Instant::now() + KILL_PATIENCE;
                    deadline = Some(limit);
                    // Likewise.
                    if timeout_at(limit, self.control.send(&Request::Kill, &[])).await.is_err() {
                        return None;
                    }
                }
                () = until(deadline) => return None,
            }
        }
    }
}

/// A VMM that has fallen says what its guest wants.
fn cleaned(failure: Failure) -> Failure {
    Failure {
        message: clean(&failure.message),
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
