//! Starting processes and acting on those that run.

use std::time::Duration;

use containerd_shim_protos::events::task::{
    TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::topics;
use husk_protocol::agent;
use husk_protocol::limit;
use tokio::time::timeout;

use super::{Pod, Reply};
use crate::agent_client::{Agent, AgentError};
use crate::container::{Exec, Kind, Process, State};
use crate::error::Error;
use crate::id::Id;
use crate::stdio::{self, Stdio, StdioPaths};
use crate::vm_process::Vm;

/// How long a machine may take to power itself off before it is ended.
const POWER_OFF: Duration = Duration::from_secs(3);

/// `SIGKILL` of signal(7).
const SIGKILL: u32 = 9;

/// Signals that end a sandbox, as they would end its pause process: `SIGINT`,
/// `SIGKILL`, `SIGTERM`.
const ENDING: [u32; 3] = [2, SIGKILL, 15];

/// A process that containerd wants added.
pub struct ExecRequest {
    /// To this container.
    pub container: String,
    /// Under this name.
    pub exec: Id,
    /// OCI `process` object.
    pub spec: Vec<u8>,
    /// Where its streams go.
    pub paths: StdioPaths,
}

impl Pod {
    /// Adds a process; it is started later.
    pub fn exec(&mut self, request: ExecRequest, reply: Reply<()>) {
        reply.send(self.add_exec(request));
    }

    fn add_exec(&mut self, request: ExecRequest) -> Result<(), Error> {
        let container = self.container_mut(&request.container)?;
        let id = request.exec.as_str().to_owned();
        if container.execs.contains_key(&id) {
            return Err(Error::Exists {
                what: "process",
                id,
            });
        }
        if container.init.state() != State::Running || container.paused {
            return Err(container
                .init
                .refuse("add a process to", &request.container));
        }
        if matches!(container.kind, Kind::Sandbox) {
            return Err(Error::Unsupported(
                "a process in the pod's own container, which is never run,",
            ));
        }
        if container.execs.len() >= limit::EXECS {
            return Err(Error::TooMany("processes"));
        }
        let exec = Exec {
            process: Process::new(request.paths, State::Created),
            spec: request.spec,
        };
        container.execs.insert(id.clone(), exec);
        let event = TaskExecAdded {
            container_id: request.container,
            exec_id: id,
            ..TaskExecAdded::default()
        };
        self.events
            .send(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    /// Starts a container's first process, or one that was added. Answers the
    /// pid.
    pub fn start_process(&mut self, id: String, exec: String, reply: Reply<u32>) {
        if let Err(error) = self.process_mut(&id, &exec).and_then(|process| {
            let name = if exec.is_empty() { &id } else { &exec };
            process.begin_start(name)
        }) {
            reply.send(Err(error));
            return;
        }
        let is_sandbox = matches!(self.container(&id).map(|c| &c.kind), Ok(Kind::Sandbox));
        if is_sandbox {
            self.started(&id, &exec, Ok(()), reply);
            return;
        }
        let (vm, agent) = match self.machine() {
            Ok(machine) => machine,
            Err(error) => return self.started(&id, &exec, Err(error), reply),
        };
        if exec.is_empty() {
            self.later(async move {
                let outcome = agent.start_container(&id).await.map_err(Error::from);
                move |pod: &mut Pod| pod.started(&id, &exec, outcome, reply)
            });
            return;
        }
        let first_port = self.ports.take(stdio::PORTS);
        let Some(added) = self.containers.get(&id).and_then(|c| c.execs.get(&exec)) else {
            return;
        };
        let (paths, spec) = (added.process.paths.clone(), added.spec.clone());
        self.later(async move {
            let outcome = start_exec(&vm, &agent, &id, &exec, paths, spec, first_port).await;
            move |pod: &mut Pod| {
                let outcome = outcome.map(|stdio| {
                    if let Ok(process) = pod.process_mut(&id, &exec) {
                        process.stdio = Some(stdio);
                    }
                });
                if outcome.is_ok() {
                    pod.follow_process(&id, &exec);
                }
                pod.started(&id, &exec, outcome, reply);
            }
        });
    }

    fn started(&mut self, id: &str, exec: &str, outcome: Result<(), Error>, reply: Reply<u32>) {
        let pid = self.pid();
        let Ok(process) = self.process_mut(id, exec) else {
            reply.send(Err(Error::ShuttingDown));
            return;
        };
        let early = process.finish_start(outcome.is_ok());
        if outcome.is_ok() {
            if exec.is_empty() {
                let event = TaskStart {
                    container_id: id.to_owned(),
                    pid,
                    ..TaskStart::default()
                };
                self.events.send(topics::TASK_START_EVENT_TOPIC, &event);
                self.note(|state| &mut state.timeline.container_started_ns);
            } else {
                let event = TaskExecStarted {
                    container_id: id.to_owned(),
                    exec_id: exec.to_owned(),
                    pid,
                    ..TaskExecStarted::default()
                };
                self.events
                    .send(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
            }
        }
        reply.send(outcome.map(|()| pid));
        if let Some(exit) = early {
            self.process_exited(id, exec, exit);
        }
    }

    /// Sends a signal.
    pub fn kill(&mut self, id: String, exec: String, signal: u32, all: bool, reply: Reply<()>) {
        let name = if exec.is_empty() { &id } else { &exec };
        let alive = self
            .process(&id, &exec)
            .and_then(|process| process.check_alive("signal", name));
        if let Err(error) = alive {
            reply.send(Err(error));
            return;
        }
        let (vm, agent) = match self.machine() {
            Ok(machine) => machine,
            // Its end is about to be told.
            Err(Error::MachineGone(_)) => return reply.send(Ok(())),
            Err(error) => return reply.send(Err(error)),
        };
        if matches!(self.container(&id).map(|c| &c.kind), Ok(Kind::Sandbox)) {
            if ENDING.contains(&signal) {
                self.sandbox_exit.get_or_insert(128 + signal);
                vm.dismiss();
                tokio::spawn(power_off(vm, agent));
            }
            reply.send(Ok(()));
            return;
        }
        tokio::spawn(async move {
            let outcome = agent.signal(&id, &exec, signal, all).await;
            let lost = matches!(outcome, Err(AgentError::Deadline(_) | AgentError::Gone));
            if lost && signal == SIGKILL {
                // Nothing in the machine can be ended but by ending the machine.
                tracing::error!("the agent does not take SIGKILL; the machine is ended");
                vm.kill().await;
                reply.send(Ok(()));
            } else {
                reply.send(outcome.map_err(Error::from));
            }
        });
    }

    /// Sets a terminal's size.
    pub fn resize_pty(
        &mut self,
        id: String,
        exec: String,
        (width, height): (u32, u32),
        reply: Reply<()>,
    ) {
        let outcome = self.process(&id, &exec).and_then(|process| {
            let name = if exec.is_empty() { &id } else { &exec };
            process.check_alive("resize the terminal of", name)?;
            Ok((process.state(), process.paths.terminal))
        });
        match outcome {
            Err(error) => reply.send(Err(error)),
            Ok((_, false)) => reply.send(Err(Error::Argument("the process has no terminal"))),
            // A process that was added is in the guest only once it runs.
            Ok((State::Created, _)) if !exec.is_empty() => reply.send(Ok(())),
            Ok(_) => self.with_agent(reply, move |agent| async move {
                agent.resize_pty(&id, &exec, width, height).await
            }),
        }
    }

    /// Lets a process see the end of its input.
    pub fn close_input(&mut self, id: &str, exec: &str, reply: Reply<()>) {
        let outcome = self.process_mut(id, exec).map(|process| {
            if let Some(stdio) = &mut process.stdio {
                stdio.close_input();
            }
        });
        reply.send(outcome);
    }

    /// Changes a container's limits.
    pub fn update(&mut self, id: String, resources: Vec<u8>, reply: Reply<()>) {
        match self.container(&id).map(|c| (&c.kind, c.init.state())) {
            Err(error) => reply.send(Err(error)),
            // The machine's size is what it is.
            Ok((Kind::Sandbox, _)) => reply.send(Ok(())),
            Ok((_, State::Stopped(_))) => reply.send(Err(Error::Finished)),
            Ok(_) => self.with_agent(reply, move |agent| async move {
                agent.update_resources(&id, resources).await
            }),
        }
    }

    /// Freezes a container.
    pub fn pause(&mut self, id: String, reply: Reply<()>) {
        self.freeze(id, true, reply);
    }

    /// Thaws a container.
    pub fn resume(&mut self, id: String, reply: Reply<()>) {
        self.freeze(id, false, reply);
    }

    fn freeze(&mut self, id: String, freeze: bool, reply: Reply<()>) {
        let action = if freeze { "pause" } else { "resume" };
        let container = match self.container(&id) {
            Ok(container) => container,
            Err(error) => return reply.send(Err(error)),
        };
        if container.init.state() != State::Running {
            return reply.send(Err(container.init.refuse(action, &id)));
        }
        if matches!(container.kind, Kind::Sandbox) {
            return reply.send(Err(Error::Unsupported("pausing a whole pod")));
        }
        if container.paused == freeze {
            let state = if freeze { "paused" } else { "running" };
            return reply.send(Err(Error::State { action, id, state }));
        }
        let agent = match self.machine() {
            Ok((_, agent)) => agent,
            Err(error) => return reply.send(Err(error)),
        };
        self.later(async move {
            let outcome = if freeze {
                agent.pause(&id).await
            } else {
                agent.resume(&id).await
            };
            move |pod: &mut Pod| {
                if outcome.is_ok() {
                    pod.frozen(&id, freeze);
                }
                reply.send(outcome.map_err(Error::from));
            }
        });
    }

    fn frozen(&mut self, id: &str, freeze: bool) {
        if let Ok(container) = self.container_mut(id) {
            container.paused = freeze;
        }
        if freeze {
            let event = TaskPaused {
                container_id: id.to_owned(),
                ..TaskPaused::default()
            };
            self.events.send(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        } else {
            let event = TaskResumed {
                container_id: id.to_owned(),
                ..TaskResumed::default()
            };
            self.events.send(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        }
    }

    /// Asks the agent something whose answer changes nothing here.
    pub(super) fn with_agent<T, F, A>(&self, reply: Reply<T>, ask: A)
    where
        T: Send + 'static,
        F: Future<Output = Result<T, AgentError>> + Send,
        A: FnOnce(Agent) -> F + Send + 'static,
    {
        match self.machine() {
            Ok((_, agent)) => {
                tokio::spawn(async move {
                    reply.send(ask(agent).await.map_err(Error::from));
                });
            }
            Err(error) => reply.send(Err(error)),
        }
    }
}

async fn start_exec(
    vm: &Vm,
    agent: &Agent,
    id: &str,
    exec: &str,
    paths: StdioPaths,
    spec: Vec<u8>,
    first_port: u32,
) -> Result<Stdio, Error> {
    let (stdio, streams) = Stdio::open(&paths, first_port, Box::new(|| {}))?;
    vm.add_host_ports(streams.host_ports).await?;
    let request = agent::ExecRequest {
        container_id: id.to_owned(),
        exec_id: exec.to_owned(),
        oci_process: spec,
        streams: Some(streams.ports).into(),
        terminal: paths.terminal,
        ..agent::ExecRequest::default()
    };
    agent.exec(&request).await?;
    Ok(stdio)
}

/// Ends a machine, with its goodwill if that does not take long.
async fn power_off(vm: Vm, agent: Agent) {
    let asked = async {
        tokio::join!(agent.shut_down(POWER_OFF), vm.ended());
    };
    if timeout(POWER_OFF, asked).await.is_err() {
        vm.kill().await;
    }
}
