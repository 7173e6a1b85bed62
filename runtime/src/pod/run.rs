//! Starting processes and acting on those that run.

use std::time::Duration;

use containerd_shim_protos::events::task::{
    TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::topics;
use husk_protocol::agent;
use husk_protocol::{deadline, limit};
use tokio::sync::watch;
use tokio::time::timeout;

use super::delete::report;
use super::exit::ended_now;
use super::{MACHINE_GONE, MachineState, Pod, PodHandle, Reply, SIGKILL};
use husk_node::trace::stage;

use crate::agent_client::{Agent, AgentError, Exit};
use crate::config::Patience;
use crate::container::{Exec, Kind, Process, State};
use crate::error::Error;
use crate::id::Id;
use crate::machine::explained;
use crate::stdio::{GuestStreams, Stdio, StdioPaths};
use crate::vm_process::Vm;

/// How long a machine may take to power itself off before it is ended: what was
/// written goes to its disks.
const POWER_OFF: Duration = deadline::POWER_OFF;

/// Signals that end a sandbox, as they would end its pause process: `SIGINT`,
/// `SIGKILL`, `SIGTERM`.
const ENDING: [u32; 3] = [2, SIGKILL, 15];

/// How long a process may live that was sent `SIGKILL`, whatever the guest says.
const AFTER_SIGKILL: Duration = Duration::from_secs(20);

/// A process that was sent `SIGKILL`.
struct Killed {
    id: String,
    exec: String,
    end: watch::Receiver<Option<Exit>>,
}

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
        if container.paused {
            return Err(Error::State {
                action: "add a process to",
                id: request.container,
                state: "paused",
            });
        }
        if container.init.state() != State::Running {
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
    pub fn start_process(&mut self, id: String, exec: String, mut reply: Reply<u32>) {
        if let Err(error) = self.process_mut(&id, &exec).and_then(|process| {
            let name = if exec.is_empty() { &id } else { &exec };
            process.begin_start(name)
        }) {
            reply.send(Err(error));
            return;
        }
        let is_sandbox = matches!(self.container(&id).map(|c| &c.kind), Ok(Kind::Sandbox));
        if is_sandbox {
            return self.started(&id, &exec, Ok(()), reply);
        }
        let (vm, agent) = match self.machine() {
            Ok(machine) => machine,
            Err(error) => return self.started(&id, &exec, Err(error), reply),
        };
        if exec.is_empty() {
            let hooks = self.containers.get(&id).and_then(|c| c.hooks.clone());
            let pid = self.pid_of(&id);
            let interfaces = match &self.machine {
                MachineState::Running(machine) => Some(machine.interfaces().clone()),
                _ => None,
            };
            self.later(async move {
                let plugged = match interfaces {
                    Some(interfaces) => interfaces.catch_up_for_start(&vm, &agent).await,
                    None => Ok(()),
                };
                reply.passed(stage::NETWORK);
                let started = match plugged {
                    Ok(()) => agent.start_container(&id).await.map_err(Error::from),
                    Err(error) => Err(error),
                };
                reply.passed(stage::START);
                let outcome = match started {
                    Ok(()) => {
                        if let Some(hooks) = hooks {
                            hooks.started(pid).await;
                        }
                        Ok(())
                    }
                    Err(Error::Agent(error)) => Err(explained(&vm, &agent, error).await),
                    Err(error) => Err(error),
                };
                move |pod: &mut Pod| {
                    if outcome.is_ok() {
                        pod.note(|state| &mut state.timeline.container_started_ns);
                    }
                    pod.started(&id, &exec, outcome, reply);
                }
            });
            return;
        }
        let Some(added) = self.containers.get(&id).and_then(|c| c.execs.get(&exec)) else {
            return;
        };
        let (paths, spec) = (added.process.paths.clone(), added.spec.clone());
        let owner = self.owner(&exec);
        self.later(async move {
            let opened = Stdio::open(&paths, &owner, Box::new(|| {})).await;
            reply.passed(stage::STREAMS);
            let outcome = match opened {
                Ok(streams) => {
                    start_exec(&vm, &agent, &id, &exec, streams, paths.terminal, spec).await
                }
                Err(error) => Err(error.into()),
            };
            reply.passed(stage::EXEC);
            move |pod: &mut Pod| {
                let outcome = outcome.map(|stdio| {
                    if let Ok(process) = pod.process_mut(&id, &exec) {
                        process.opened(stdio);
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
        let pid = self.pid_of(id);
        // They are answered by what is true now.
        for step in std::mem::take(&mut self.after_start) {
            self.handle.send(step);
        }
        let process = match self.process_mut(id, exec) {
            Ok(process) => process,
            Err(error) => return reply.send(Err(error)),
        };
        let early = process.finish_start(outcome.is_ok());
        // Nobody has heard of an added one that did not start.
        let early = early.filter(|_| outcome.is_ok() || exec.is_empty());
        if outcome.is_ok() {
            if exec.is_empty() {
                let event = TaskStart {
                    container_id: id.to_owned(),
                    pid,
                    ..TaskStart::default()
                };
                self.events.send(topics::TASK_START_EVENT_TOPIC, &event);
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
        // An added process is never the whole container.
        let all = all && exec.is_empty();
        let name = if exec.is_empty() { &id } else { &exec };
        let state = self.process(&id, &exec).and_then(|process| {
            process.check_alive("signal", name)?;
            match process.state() {
                // One that was added is in the guest only once it runs.
                State::Created if !exec.is_empty() => Err(process.refuse("signal", name)),
                state => Ok(state),
            }
        });
        match state {
            Ok(State::Starting) if !exec.is_empty() => {
                if signal == SIGKILL {
                    self.give_up_start(id.clone(), exec.clone());
                }
                let again = move |pod: &mut Pod| {
                    let state = pod.process(&id, &exec).map(Process::state);
                    match state {
                        // It was given up.
                        Ok(State::Created | State::Stopped(_)) if signal == SIGKILL => {
                            reply.send(Ok(()));
                        }
                        _ => pod.kill(id, exec, signal, all, reply),
                    }
                };
                return self.after_start.push(Box::new(again));
            }
            Ok(_) => {}
            Err(error) => return reply.send(Err(error)),
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
        let killed = match self.process(&id, &exec) {
            Ok(process) if signal == SIGKILL => Some(Killed {
                id: id.clone(),
                exec: exec.clone(),
                end: process.watch(),
            }),
            _ => None,
        };
        let pod = self.handle.clone();
        tokio::spawn(async move {
            let outcome = agent.signal(&id, &exec, signal, all).await;
            let Some(killed) = killed else {
                return reply.send(outcome.map_err(Error::from));
            };
            // The end is seen to, so that nobody has to ask again.
            reply.send(match outcome {
                Err(AgentError::Deadline { .. } | AgentError::Gone) => Ok(()),
                outcome => outcome.map_err(Error::from),
            });
            killed.see_to_it(&vm, &pod, agent.patience()).await;
        });
    }

    /// The start of an added process may take as long as its file system does; a
    /// guest that knows of it lets go of it at once.
    fn give_up_start(&self, id: String, exec: String) {
        let Ok((_, agent)) = self.machine() else {
            return;
        };
        tokio::spawn(async move {
            if let Err(error) = agent.signal(&id, &exec, SIGKILL, false).await {
                tracing::debug!(id, exec, %error, "giving up a start");
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
        tracing::debug!(id, exec, "end of input");
        let outcome = self.process_mut(id, exec);
        reply.send(outcome.map(Process::close_input));
    }

    /// Changes a container's limits.
    pub fn update(&mut self, id: String, resources: Vec<u8>, reply: Reply<()>) {
        match self.container(&id).map(|c| (&c.kind, c.init.state())) {
            Err(error) => reply.send(Err(error)),
            // The machine's size is what it is.
            Ok((Kind::Sandbox, _)) => reply.send(Ok(())),
            Ok((_, State::Stopped(_))) => reply.send(Err(Error::Finished)),
            Ok(_) => self.update_container(id, resources, reply),
        }
    }

    /// The machine has room for the old limits and the new ones until the guest
    /// has changed them.
    fn update_container(&mut self, id: String, resources: Vec<u8>, reply: Reply<()>) {
        let (vm, agent) = match self.machine() {
            Ok(machine) => machine,
            Err(error) => return reply.send(Err(error)),
        };
        let Ok(container) = self.container_mut(&id) else {
            return;
        };
        let resources = container.limits.ask(resources);
        let fitter = self.fitter();
        self.later(async move {
            if let Some(fitter) = fitter {
                fitter.fit(&vm, &agent).await;
            }
            let outcome = agent.update_resources(&id, resources.to_vec()).await;
            move |pod: &mut Pod| {
                if let Ok(container) = pod.container_mut(&id) {
                    container.limits.answered(&resources, outcome.is_ok());
                }
                pod.fit_machine();
                reply.send(outcome.map_err(Error::from));
            }
        });
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

impl Killed {
    /// Whoever asked relies on the end. Nothing in a guest that does not answer
    /// can be ended but by ending the machine; of a process that was added it is
    /// enough to say so.
    async fn see_to_it(mut self, vm: &Vm, pod: &PodHandle, patience: Patience) {
        let ended = self.end.wait_for(Option::is_some);
        if timeout(patience.of(AFTER_SIGKILL), ended).await.is_ok() {
            return;
        }
        let Self { id, exec, .. } = self;
        if exec.is_empty() {
            tracing::error!(id, "the guest does not take SIGKILL; the machine is ended");
            vm.kill().await;
        } else {
            tracing::warn!(id, exec, "the guest does not take SIGKILL");
            pod.send(Box::new(move |pod| {
                pod.process_exited(&id, &exec, ended_now(MACHINE_GONE));
            }));
        }
    }
}

async fn start_exec(
    vm: &Vm,
    agent: &Agent,
    id: &str,
    exec: &str,
    (stdio, streams): (Stdio, GuestStreams),
    terminal: bool,
    spec: Vec<u8>,
) -> Result<Stdio, Error> {
    let ports = streams.port_numbers();
    vm.add_host_ports(streams.host_ports).await?;
    let request = agent::ExecRequest {
        container_id: id.to_owned(),
        exec_id: exec.to_owned(),
        oci_process: spec,
        streams: Some(streams.ports).into(),
        terminal,
        ..agent::ExecRequest::default()
    };
    match agent.exec(&request).await {
        Ok(()) => Ok(stdio),
        Err(error) => {
            vm.remove_host_ports(ports).await;
            if matches!(error, AgentError::Deadline { .. }) {
                // It may run all the same, and nobody would know.
                report(agent.signal(id, exec, SIGKILL, false).await);
                let ended = agent.wait(id, exec);
                let _ = timeout(agent.patience().of(AFTER_SIGKILL), ended).await;
                report(agent.delete_process(id, exec).await);
            }
            Err(explained(vm, agent, error).await)
        }
    }
}

/// Ends a machine, with its goodwill if that does not take long.
async fn power_off(vm: Vm, agent: Agent) {
    let limit = agent.patience().of(POWER_OFF);
    let asked = async {
        tokio::join!(agent.shut_down(limit), vm.ended());
    };
    if timeout(limit, asked).await.is_err() {
        vm.kill().await;
    }
}
