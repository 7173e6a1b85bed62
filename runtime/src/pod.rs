//! The pod: one task owns its machine and its containers.
//!
//! Everybody else sends that task steps: functions that look at the pod, change
//! it and return at once. What takes time runs beside it and comes back as
//! another step, so a container that hangs holds up nobody else. A request is a
//! first step and its answer a later one; when whoever asked is gone by then, the
//! work is done all the same.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use husk_node::trace::Line;
use husk_protocol::agent::event::Kind as EventKind;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use ttrpc::r#async::TtrpcContext;

use crate::agent_client::Agent;
use crate::blocking;
use crate::cgroup::{self, PodCgroup};
use crate::clock;
use crate::config::Config;
use crate::container::{Container, Kind, Process};
use crate::debug_shell;
use crate::disk::PodDisks;
use crate::error::Error;
use crate::event::EventSender;
use crate::forward;
use crate::growth::Fitter;
use crate::id::Id;
use crate::machine::Machine;
use crate::process::Process as HostProcess;
use crate::stand_in::StandIn;
use crate::state_dir::{State, StateDir};
use crate::stdio::Owner;
use crate::trace::{self, Trace};
use crate::vfio::PodGroups;
use crate::vm_process::{Vm, VmEnd};

mod create;
mod delete;
mod end;
mod exit;
mod hold;
mod query;
mod run;

pub use create::{CreateRequest, SandboxRequest};
use delete::Deletion;
use end::{Part, end_without};
pub use run::ExecRequest;

/// `SIGKILL` of signal(7).
const SIGKILL: u32 = 9;

/// Exit code of a process whose machine went away, as if that had killed it.
const MACHINE_GONE: u32 = 128 + SIGKILL;

/// Least time between two events of a guest, so that it cannot flood containerd.
const EVENT_PAUSE: Duration = Duration::from_millis(100);

/// Pause after an event that the agent would not tell.
const NO_EVENT_PAUSE: Duration = Duration::from_secs(1);

/// How long a shim waits for its first container.
const BEFORE_USE: Duration = Duration::from_secs(300);

/// How long a shim stays when its last container is gone; containerd mostly asks
/// it to end at once.
const AFTER_USE: Duration = Duration::from_secs(30);

/// How long the end of a pod waits for creations and deletions that are under
/// way: they have files of others mounted.
const UNDER_WAY: Duration = Duration::from_secs(10);

/// A function that looks at the pod or changes it.
type Step = Box<dyn FnOnce(&mut Pod) + Send>;

/// A way to send steps to the pod's task.
#[derive(Clone)]
pub struct PodHandle {
    steps: mpsc::UnboundedSender<Step>,
    state_dir: StateDir,
}

/// The other end of a request.
pub struct Reply<T> {
    answer: oneshot::Sender<Result<T, Error>>,
    trace: Option<Box<Trace>>,
}

/// What the pod is made with.
pub struct PodSettings {
    /// containerd's namespace.
    pub namespace: Id,
    /// The pod's name.
    pub id: Id,
    /// The node's configuration.
    pub config: Arc<Config>,
    /// Log more.
    pub debug: bool,
}

/// A pod.
pub struct Pod {
    settings: PodSettings,
    state_dir: StateDir,
    state: State,
    /// containerd traces what it asks for.
    is_traced: bool,
    events: EventSender,
    handle: PodHandle,
    machine: MachineState,
    cgroup: Option<PodCgroup>,
    containers: BTreeMap<String, Container>,
    /// Creations and deletions that are under way.
    under_way: watch::Sender<usize>,
    /// What waits for the start of a process, any one.
    after_start: Vec<Step>,
    /// Containers that are on their way out.
    deleting: BTreeMap<String, Deletion>,
    /// The last container is deleted when the VMM has ended.
    awaits_vmm: bool,
    /// Containers get the pod's own files about names.
    pod_binds: bool,
    /// Its containers may share their processes.
    shares_pids: bool,
    /// Code with which the sandbox ends, once it was asked to.
    sandbox_exit: Option<u32>,
    /// What the machine was ended for the lack of.
    lost_part: Option<Part>,
    disks: Arc<PodDisks>,
    groups: Arc<PodGroups>,
    /// There has been a container.
    was_used: bool,
    over: bool,
}

/// The pod's machine.
enum MachineState {
    /// There is none yet.
    None,
    /// It is being made.
    Booting,
    /// It runs.
    Running(Machine),
    /// It has ended; what belonged to it is still there.
    Ended(Machine, VmEnd),
}

impl<T> Reply<T> {
    /// Nobody asked.
    fn to_nobody() -> Self {
        Self {
            answer: oneshot::channel().0,
            trace: None,
        }
    }

    /// A part of what was asked for is done.
    fn passed(&mut self, what: &str) {
        if let Some(trace) = &mut self.trace {
            trace.passed(what);
        }
    }

    /// Answers the request.
    fn send(self, answer: Result<T, Error>) {
        if let Some(trace) = self.trace {
            trace.end(answer.as_ref().err());
        }
        // Nobody may wait any more.
        let _ = self.answer.send(answer);
    }
}

impl PodHandle {
    /// Lets the pod's task act, and waits for the answer.
    ///
    /// # Errors
    /// As the action answers.
    pub async fn ask<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Pod, Reply<T>) + Send + 'static,
    ) -> Result<T, Error> {
        self.ask_in(None, act).await
    }

    /// The trace that a request about a container, or a process that was added to it,
    /// belongs to.
    pub fn trace(
        &self,
        context: &TtrpcContext,
        method: &'static str,
        names: [&str; 2],
    ) -> Option<Box<Trace>> {
        Trace::of(&context.metadata, &self.state_dir, method, names)
    }

    /// The same as [`Self::ask`] for a request that may belong to a trace.
    ///
    /// # Errors
    /// As the action answers.
    pub async fn ask_in<T: Send + 'static>(
        &self,
        trace: Option<Box<Trace>>,
        act: impl FnOnce(&mut Pod, Reply<T>) + Send + 'static,
    ) -> Result<T, Error> {
        let (sender, answer) = oneshot::channel();
        self.send(Box::new(move |pod| {
            pod.is_traced |= trace.is_some();
            let answer = sender;
            act(pod, Reply { answer, trace });
        }));
        answer.await.unwrap_or(Err(Error::ShuttingDown))
    }

    fn send(&self, step: Step) {
        // The pod may be over.
        let _ = self.steps.send(step);
    }
}

impl Pod {
    /// Starts the pod's task; it ends, and with it the returned future, when the
    /// pod is shut down.
    pub fn start(
        settings: PodSettings,
        events: EventSender,
    ) -> (PodHandle, impl Future<Output = ()>) {
        let (steps, receiver) = mpsc::unbounded_channel();
        let state_dir = StateDir::new(
            &settings.config.state_dir,
            &settings.namespace,
            &settings.id,
        );
        let handle = PodHandle {
            steps,
            state_dir: state_dir.clone(),
        };
        let vfio = settings.config.vfio;
        let pod = Self {
            settings,
            state_dir,
            state: State::default(),
            is_traced: false,
            events,
            handle: handle.clone(),
            machine: MachineState::None,
            cgroup: None,
            containers: BTreeMap::new(),
            under_way: watch::Sender::new(0),
            after_start: Vec::new(),
            deleting: BTreeMap::new(),
            awaits_vmm: false,
            pod_binds: false,
            shares_pids: false,
            sandbox_exit: None,
            lost_part: None,
            disks: Arc::default(),
            groups: Arc::new(PodGroups::new(vfio)),
            was_used: false,
            over: false,
        };
        (handle, pod.run(receiver))
    }

    async fn run(mut self, mut steps: mpsc::UnboundedReceiver<Step>) {
        while !self.over {
            let step = match self.patience() {
                None => steps.recv().await,
                Some(patience) => match timeout(patience, steps.recv()).await {
                    Ok(step) => step,
                    Err(_) => {
                        tracing::info!("nobody needs this shim any more");
                        break;
                    }
                },
            };
            match step {
                Some(step) => step(&mut self),
                None => break,
            }
        }
        self.over = true;
        // Whatever is still there goes with the pod.
        let containers = std::mem::take(&mut self.containers);
        let deadline = Instant::now() + UNDER_WAY;
        while *self.under_way.borrow() > 0 {
            match timeout_at(deadline, steps.recv()).await {
                Ok(Some(step)) => step(&mut self),
                Ok(None) | Err(_) => break,
            }
        }
        match std::mem::replace(&mut self.machine, MachineState::None) {
            MachineState::Running(machine) | MachineState::Ended(machine, _) => {
                machine.end().await;
            }
            MachineState::None | MachineState::Booting => {}
        }
        // A file system may take its time to be unmounted.
        let unmounted = blocking::discard(containers);
        if timeout(UNDER_WAY, unmounted).await.is_err() {
            tracing::warn!("the pod's file systems are still being unmounted");
        }
        self.release();
    }

    /// Does `work` beside the pod's task and its result as a step of it.
    fn later<F, S>(&self, work: F)
    where
        F: Future<Output = S> + Send + 'static,
        S: FnOnce(&mut Pod) + Send + 'static,
    {
        let handle = self.handle.clone();
        tokio::spawn(async move {
            let step = work.await;
            handle.send(Box::new(step));
        });
    }

    /// How long the shim waits for somebody to need it: containerd may have
    /// given it up without a word.
    fn patience(&self) -> Option<Duration> {
        if !self.is_idle() {
            None
        } else if self.was_used {
            Some(AFTER_USE)
        } else {
            Some(BEFORE_USE)
        }
    }

    /// A container is there to stay.
    fn is_used(&self) -> bool {
        let mut ids = self.containers.keys();
        ids.any(|id| !self.deleting.contains_key(id))
    }

    fn is_idle(&self) -> bool {
        self.containers.is_empty()
            && *self.under_way.borrow() == 0
            && matches!(self.machine, MachineState::None)
    }

    /// Something that has mounts on the node begins.
    fn begin_work(&self) {
        self.under_way.send_modify(|count| *count += 1);
    }

    /// It has come to its end.
    fn end_work(&self) {
        self.under_way.send_modify(|count| *count -= 1);
    }

    /// Gives back what the pod has on the node apart from the machine. Where not all
    /// of the pod can be gone by then, what it is stays written down, for `delete`.
    fn release(&mut self) {
        self.cgroup.take_if(|cgroup| cgroup.leave());
        // This one's state knows nothing of a machine that did not come to be, or of what
        // a pod of this name has left before it.
        let written = self.state_dir.read().unwrap_or_default();
        let mut processes = [written.vmm, written.file_server].into_iter().flatten();
        let has_left = self.cgroup.is_none() && !processes.any(HostProcess::is_alive);
        if has_left && written.cgroup.as_deref().is_none_or(cgroup::remove) {
            self.state_dir.remove();
        } else {
            tracing::error!(path = %self.state_dir.path().display(), "not all of the pod is gone");
        }
        self.state = State::default();
    }

    fn container(&self, id: &str) -> Result<&Container, Error> {
        self.containers.get(id).ok_or_else(|| not_found(id))
    }

    fn container_mut(&mut self, id: &str) -> Result<&mut Container, Error> {
        self.containers.get_mut(id).ok_or_else(|| not_found(id))
    }

    fn process(&self, id: &str, exec: &str) -> Result<&Process, Error> {
        let container = self.container(id)?;
        container.process(exec).ok_or_else(|| no_process(exec))
    }

    fn process_mut(&mut self, id: &str, exec: &str) -> Result<&mut Process, Error> {
        let container = self.container_mut(id)?;
        container.process_mut(exec).ok_or_else(|| no_process(exec))
    }

    /// What makes the machine fit for the containers of now.
    fn fitter(&self) -> Option<Fitter> {
        let MachineState::Running(machine) = &self.machine else {
            return None;
        };
        let guests = self.containers.values();
        let limits: Vec<_> = guests
            .filter(|container| matches!(container.kind, Kind::Guest(_)))
            .map(|container| container.limits.largest())
            .collect();
        machine.fitter().want(&limits);
        Some(machine.fitter().clone())
    }

    /// Makes the machine fit, beside the pod's task.
    fn fit_machine(&self) {
        if let (Some(fitter), Ok((vm, agent))) = (self.fitter(), self.machine()) {
            tokio::spawn(async move { fitter.fit(&vm, &agent).await });
        }
    }

    /// Whose the output of a container or an added process is.
    fn owner(&self, id: &str) -> Owner {
        Owner {
            namespace: self.settings.namespace.as_str().to_owned(),
            id: id.to_owned(),
        }
    }

    /// The running machine.
    fn machine(&self) -> Result<(Vm, Agent), Error> {
        match &self.machine {
            MachineState::Running(machine) => Ok((machine.vm().clone(), machine.agent().clone())),
            MachineState::Ended(_, end) => Err(Error::MachineGone(end.to_string())),
            MachineState::None | MachineState::Booting => {
                Err(Error::Argument("the pod has no machine yet"))
            }
        }
    }

    /// The VMM's process id. containerd is told it for what has none of its own,
    /// since no process of the guest has a number here.
    fn pid(&self) -> u32 {
        match &self.machine {
            MachineState::Running(machine) | MachineState::Ended(machine, _) => {
                machine.vm().process().pid
            }
            MachineState::None | MachineState::Booting => 0,
        }
    }

    /// What was told as the process id of a container and of every process in it:
    /// the machine may have gone before it.
    fn pid_of(&self, id: &str) -> u32 {
        if let Some(deletion) = self.deleting.get(id) {
            return deletion.deleted.pid;
        }
        let container = self.containers.get(id);
        container.map_or_else(|| self.pid(), |container| self.pid_for(container))
    }

    fn pid_for(&self, container: &Container) -> u32 {
        let stand_in = container.stand_in.as_ref();
        stand_in.map_or_else(|| self.pid(), StandIn::tid)
    }

    /// The container that a process id was told for.
    fn with_pid(&self, pid: u32) -> Option<&str> {
        let is_its = |container: &Container| {
            let stand_in = container.stand_in.as_ref();
            stand_in.is_some_and(|stand_in| stand_in.tid() == pid)
        };
        let mut containers = self.containers.iter();
        let (id, _) = containers.find(|(_, container)| is_its(container))?;
        Some(id)
    }

    fn write_state(&self) {
        if let Err(error) = self.state_dir.write(&self.state) {
            tracing::warn!(%error, "pod's state");
        }
        if self.is_traced {
            trace::note(&self.state_dir, &Line::Timeline(self.state.timeline));
        }
    }

    /// Notes a moment of the start, the first time.
    fn note(&mut self, moment: impl FnOnce(&mut State) -> &mut u64) {
        let noted = moment(&mut self.state);
        if *noted != 0 {
            return;
        }
        *noted = clock::monotonic_ns();
        // A machine that is being made writes down what it consists of, which this
        // state does not know yet; without one there is nothing to write it for.
        if !matches!(self.machine, MachineState::None | MachineState::Booting) {
            self.write_state();
        }
    }

    /// Follows a machine that has just become ready.
    fn follow_machine(&mut self, machine: Machine) {
        let (vm, agent) = (machine.vm().clone(), machine.agent().clone());
        let patience = agent.patience();
        let file_server = Arc::clone(machine.file_server());
        let (server_vm, handle) = (vm.clone(), self.handle.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = file_server.ended() => {}
                _ = server_vm.ended() => return,
            }
            // It ends with the machine, unless it fails.
            end_without(Part::FileServer, &server_vm, &handle, patience).await;
        });
        let end_vm = vm.clone();
        self.later(async move {
            let end = end_vm.ended().await;
            move |pod: &mut Pod| pod.machine_ended(end)
        });
        tokio::spawn(follow_agent(agent.clone(), vm.clone(), self.handle.clone()));
        let interfaces = machine.interfaces().clone();
        tokio::spawn(interfaces.follow(vm.clone(), agent.clone()));
        if let Some(netns) = machine.netns() {
            let netns = netns.clone();
            tokio::spawn(forward::serve(netns, vm.clone(), agent.clone()));
        }
        if self.settings.config.debug_shell {
            let dir = self.state_dir.clone();
            tokio::spawn(async move { debug_shell::serve(dir.path(), vm, agent).await });
        }
        self.machine = MachineState::Running(machine);
    }

    fn agent_event(&mut self, kind: Option<EventKind>) {
        match kind {
            Some(EventKind::Oom(oom)) => self.tell_oom(&oom.container_id),
            _ => tracing::debug!("the agent tells something unknown"),
        }
    }
}

/// Passes on what the agent tells, and ends a machine that lost its agent.
async fn follow_agent(agent: Agent, vm: Vm, pod: PodHandle) {
    let mut warned = false;
    loop {
        match agent.next_event().await {
            Ok(event) => {
                pod.send(Box::new(move |pod| pod.agent_event(event.kind)));
                sleep(EVENT_PAUSE).await;
            }
            Err(crate::agent_client::AgentError::Gone) => break,
            Err(error) => {
                if !std::mem::replace(&mut warned, true) {
                    tracing::warn!(%error, "the agent tells no events");
                }
                // Asked on: how else would its end be seen?
                sleep(NO_EVENT_PAUSE).await;
            }
        }
    }
    end_without(Part::Agent, &vm, &pod, agent.patience()).await;
}

fn not_found(id: &str) -> Error {
    Error::NotFound {
        what: "container",
        id: id.to_owned(),
    }
}

fn no_process(exec: &str) -> Error {
    Error::NotFound {
        what: "process",
        id: exec.to_owned(),
    }
}
