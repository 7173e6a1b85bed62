//! Creating containers; the first brings the machine up.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::topics;
use containerd_shim_protos::types::mount::Mount;
use husk_protocol::limit;
use protobuf::MessageField;

use super::{MachineState, Pod, PodHandle, Reply};
use crate::bundle::{Bundle, BundleError, Limits, PodSpec, Role};
use crate::cgroup::{self, CgroupError, PodCgroup};
use crate::clock;
use crate::container::{Container, Kind, Process, State as ProcessState};
use crate::container_files::FilesRequest;
use crate::error::Error;
use crate::id::Id;
use crate::machine::{Machine, MachineRequest};
use crate::network::NetnsId;
use crate::process::Process as HostProcess;
use crate::rootfs::RootfsPlan;
use crate::shared_tree::SharedTree;
use crate::stand_in::StandIn;
use crate::state_dir::State;
use crate::stdio::{OnFirstOutput, StdioPaths};
use crate::template;

mod prepare;
mod processes;

use prepare::{Files, Prepared, Streams, boot_sandbox, boot_single, create_member};

/// What containerd asks for.
pub struct CreateRequest {
    /// The container.
    pub id: Id,
    /// Its bundle.
    pub bundle: PathBuf,
    /// What its root is made of.
    pub rootfs: Vec<Mount>,
    /// Where its streams go.
    pub paths: StdioPaths,
}

/// A pod that containerd asks for without a container.
pub struct SandboxRequest {
    /// The pod.
    pub id: Id,
    /// Where containerd keeps what it knows of it.
    pub bundle: PathBuf,
    /// What its machine is made from.
    pub pod: PodSpec,
}

impl Pod {
    /// Creates a container and, for the first, the machine. Answers the pid.
    pub fn create(&mut self, request: CreateRequest, reply: Reply<u32>) {
        if let Err(error) = self.begin_create(&request, reply) {
            let (reply, error) = *error;
            self.containers.remove(request.id.as_str());
            reply.send(Err(error));
        }
    }

    /// Creates the machine of a pod that has no container of its own.
    pub fn create_sandbox(&mut self, request: SandboxRequest, reply: Reply<u32>) {
        let SandboxRequest { id, bundle, pod } = request;
        let planned = self.check_first(&id).and_then(|()| self.plan_machine(pod));
        match planned {
            Ok(machine) => {
                self.pod_binds = true;
                let request = CreateRequest {
                    id,
                    bundle,
                    rootfs: Vec::new(),
                    paths: StdioPaths::default(),
                };
                self.carry_out(&request, Limits::default(), Plan::Sandbox(machine), reply);
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    fn begin_create(
        &mut self,
        request: &CreateRequest,
        reply: Reply<u32>,
    ) -> Result<(), Box<(Reply<u32>, Error)>> {
        let id = request.id.as_str();
        if self.containers.contains_key(id) {
            let error = match self.deleting.contains_key(id) {
                true => still_being_deleted(&request.id),
                false => Error::Exists {
                    what: "container",
                    id: id.to_owned(),
                },
            };
            // The one that is there stays.
            reply.send(Err(error));
            return Ok(());
        }
        let fail = |reply, error| Err(Box::new((reply, error)));
        if self.over {
            return fail(reply, Error::ShuttingDown);
        }
        if self.containers.len() >= limit::CONTAINERS {
            return fail(reply, Error::TooMany("containers"));
        }
        let bundle = match Bundle::load(&request.bundle) {
            Ok(bundle) => bundle,
            Err(error) => return fail(reply, error.into()),
        };
        let role = match bundle.role() {
            Ok(role) => role,
            Err(error) => return fail(reply, error.into()),
        };
        let limits = match role {
            Role::Sandbox => Ok(Limits::default()),
            Role::Single | Role::Member { .. } => bundle.container_limits(),
        };
        let limits = match limits {
            Ok(limits) => limits,
            Err(error) => return fail(reply, error.into()),
        };
        let outcome = match role {
            Role::Member { .. } => self
                .plan_member(request, bundle)
                .map(Box::new)
                .map(Plan::Member),
            role => self.plan_first(request, bundle, &role),
        };
        let plan = match outcome {
            Ok(plan) => plan,
            Err(error) => return fail(reply, error),
        };
        self.carry_out(request, limits, plan, reply);
        Ok(())
    }

    /// The container of a pod that is there.
    fn plan_member(&mut self, request: &CreateRequest, mut bundle: Bundle) -> Result<Files, Error> {
        self.join_processes(&mut bundle)?;
        let tree = match &self.machine {
            MachineState::Running(machine) => machine.tree().clone(),
            _ => {
                // Says why.
                self.machine()?;
                return Err(Error::ShuttingDown);
            }
        };
        self.plan_files(request, bundle).map(|plan| plan(tree))
    }

    /// The container with which the pod begins.
    fn plan_first(
        &mut self,
        request: &CreateRequest,
        bundle: Bundle,
        role: &Role,
    ) -> Result<Plan, Error> {
        self.check_first(&request.id)?;
        if let (Role::Single, Some(path)) = (role, bundle.joined_pids()) {
            return Err(BundleError::OtherProcesses(path.to_owned()).into());
        }
        let pod = bundle.pod_spec(role)?;
        let files = match role {
            Role::Sandbox => None,
            Role::Single | Role::Member { .. } => Some(self.plan_files(request, bundle)?),
        };
        let request = self.plan_machine(pod)?;
        Ok(match files {
            None => Plan::Sandbox(request),
            Some(files) => Plan::Single(request, Box::new(files)),
        })
    }

    fn check_first(&self, id: &Id) -> Result<(), Error> {
        if *self.under_way.borrow() > 0 && !self.is_used() {
            return Err(still_being_deleted(id));
        }
        if !matches!(self.machine, MachineState::None) || *id != self.settings.id {
            return Err(Error::Argument(
                "this shim serves another pod; its containers must name it in their annotations",
            ));
        }
        Ok(())
    }

    /// Makes the pod's place on the node.
    fn plan_machine(&mut self, mut pod: PodSpec) -> Result<MachineRequest, Error> {
        self.shares_pids = pod.shared_pid_namespace;
        self.take_over()?;
        self.state_dir.create()?;
        self.state = State {
            shim: HostProcess::find(std::process::id()),
            netns: pod.netns.as_deref().and_then(NetnsId::of),
            ..State::default()
        };
        self.state.timeline.request_ns = clock::monotonic_ns();
        // Who is killed as soon as the cgroup is there leaves it to `delete`.
        let path = pod.cgroups_path.as_deref();
        self.state.cgroup = path.and_then(PodCgroup::to_be_made);
        self.write_state();
        if let Some(path) = path {
            self.cgroup = PodCgroup::make(path).inspect_err(|_| self.state_dir.remove())?;
            let own = self.cgroup.as_ref().and_then(PodCgroup::own_path);
            if own != self.state.cgroup.as_deref() {
                self.state.cgroup = own.map(Path::to_owned);
                self.write_state();
            }
        }
        if let Some(cgroup) = &self.cgroup {
            if pod.limits_are_a_sum {
                pod.unlimited = cgroup.unlimited();
            }
            let limited = cgroup.limit_io(&pod.block_io);
            limited.inspect_err(|_| self.release())?;
        }
        Ok(MachineRequest {
            config: self.settings.config.clone(),
            pod,
            cgroup: self.cgroup.as_ref().map(|cgroup| cgroup.dir().clone()),
            state_dir: self.state_dir.clone(),
            state: self.state.clone(),
            debug: self.settings.debug,
        })
    }

    /// Removes what is left of a pod of this name, which `delete` could not.
    fn take_over(&self) -> Result<(), Error> {
        let Some(left) = self.state_dir.read() else {
            return Ok(());
        };
        let mut processes = [left.vmm, left.file_server].into_iter().flatten();
        if let Some(process) = processes.find(|process| process.is_alive()) {
            return Err(Error::NameTaken {
                id: self.settings.id.as_str().to_owned(),
                pid: process.pid,
            });
        }
        // One that this shim could not leave has this shim in it.
        if let (Some(path), None) = (left.cgroup, &self.cgroup)
            && !cgroup::remove(&path)
        {
            let source = io::ErrorKind::ResourceBusy.into();
            return Err(CgroupError::Io { path, source }.into());
        }
        Ok(())
    }

    fn plan_files(
        &mut self,
        request: &CreateRequest,
        bundle: Bundle,
    ) -> Result<impl FnOnce(SharedTree) -> Files + Send + use<>, Error> {
        let root = match request.rootfs.is_empty() {
            true => bundle.root()?,
            false => PathBuf::new(),
        };
        let rootfs = RootfsPlan::new(&request.rootfs, root)?;
        let (id, disks) = (request.id.clone(), Arc::clone(&self.disks));
        let groups = Arc::clone(&self.groups);
        let pod_binds = self.pod_binds;
        let hooks = Arc::new(bundle.hooks(&request.id));
        let streams = Streams {
            paths: request.paths.clone(),
            owner: self.owner(request.id.as_str()),
            on_first_output: self.report_first_output(),
        };
        Ok(move |tree| Files {
            files: FilesRequest {
                id,
                bundle,
                rootfs,
                tree,
                disks,
                groups,
                pod_binds,
            },
            streams,
            hooks,
        })
    }

    fn report_first_output(&self) -> OnFirstOutput {
        let handle: PodHandle = self.handle.clone();
        Box::new(move || {
            handle.send(Box::new(|pod| {
                pod.note(|state| &mut state.timeline.first_output_ns);
            }));
        })
    }

    fn carry_out(
        &mut self,
        request: &CreateRequest,
        limits: Limits,
        plan: Plan,
        reply: Reply<u32>,
    ) {
        self.begin_work();
        let kind = match plan {
            Plan::Sandbox(_) => Kind::Sandbox,
            Plan::Single(..) | Plan::Member(_) => Kind::Guest(None),
        };
        let container = Container {
            bundle: request.bundle.clone(),
            kind,
            stand_in: None,
            hooks: None,
            init: Process::new(request.paths.clone(), ProcessState::Creating),
            execs: BTreeMap::new(),
            limits: limits.into(),
            paused: false,
            oom_told: None,
            created_ns: clock::wall_ns(),
            unwanted: false,
        };
        self.was_used = true;
        self.containers
            .insert(request.id.as_str().to_owned(), container);
        let mut created = Created {
            id: request.id.as_str().to_owned(),
            rootfs: request.rootfs.clone(),
            reply,
        };
        match plan {
            Plan::Sandbox(machine) => {
                self.machine = MachineState::Booting;
                self.later(async move {
                    let outcome = boot_sandbox(machine).await;
                    |pod: &mut Pod| pod.sandbox_created(created, outcome)
                });
            }
            Plan::Single(machine, files) => {
                self.machine = MachineState::Booting;
                self.later(async move {
                    let outcome = boot_single(machine, files).await;
                    |pod: &mut Pod| pod.single_created(created, outcome)
                });
            }
            Plan::Member(files) => match self.machine() {
                Ok((vm, agent)) => {
                    let fitter = self.fitter();
                    self.later(async move {
                        if let Some(fitter) = fitter {
                            fitter.fit(&vm, &agent).await;
                        }
                        let passed = |what: &str| created.reply.passed(what);
                        let outcome = create_member(vm, agent, *files, passed).await;
                        |pod: &mut Pod| pod.member_created(created, outcome)
                    });
                }
                Err(error) => self.member_created(created, Err(error)),
            },
        }
    }

    fn sandbox_created(&mut self, created: Created, outcome: Result<(Machine, State), Error>) {
        self.end_work();
        match outcome {
            Ok((machine, state)) => {
                self.machine_ready(machine, state);
                self.container_created(created, None);
            }
            Err(error) => self.boot_failed(created, error),
        }
    }

    fn single_created(
        &mut self,
        created: Created,
        outcome: Result<(Machine, State, Prepared), Error>,
    ) {
        self.end_work();
        match outcome {
            Ok((machine, state, prepared)) => {
                self.machine_ready(machine, state);
                self.container_created(created, Some(prepared));
            }
            Err(error) => self.boot_failed(created, error),
        }
    }

    fn member_created(&mut self, created: Created, outcome: Result<Prepared, Error>) {
        self.end_work();
        match outcome {
            Ok(prepared) => self.container_created(created, Some(prepared)),
            Err(error) => self.create_failed(created, error),
        }
    }

    fn machine_ready(&mut self, machine: Machine, state: State) {
        // Its guest may have been early.
        let first_output_ns = self.state.timeline.first_output_ns;
        self.state = state;
        self.state.timeline.first_output_ns = first_output_ns;
        self.write_state();
        if let Some(template) = machine.lacking() {
            let procs = self.cgroup.as_ref().map(PodCgroup::procs_of_origin);
            template::make::start(template.memory_mib(), procs.as_deref());
        }
        self.follow_machine(machine);
    }

    fn boot_failed(&mut self, created: Created, error: Error) {
        self.machine = MachineState::None;
        self.create_failed(created, error);
        // Not before what failed is written down, for those who trace it.
        self.release();
    }

    fn create_failed(&mut self, created: Created, error: Error) {
        self.containers.remove(&created.id);
        self.fit_machine();
        created.reply.send(Err(error));
        // The others may have gone meanwhile.
        if let Some(machine) = self.take_last_machine() {
            self.begin_work();
            let end = self.end_last(machine);
            self.later(async move {
                end.await;
                |pod: &mut Pod| pod.work_ended()
            });
        }
    }

    fn container_created(&mut self, created: Created, prepared: Option<Prepared>) {
        let Created { id, rootfs, reply } = created;
        let vmm_pid = self.pid();
        let Some(container) = self.containers.get_mut(&id) else {
            // The pod is over.
            reply.send(Err(Error::ShuttingDown));
            return self.detach(prepared);
        };
        let (files, stdio) = match prepared {
            Some(prepared) => {
                container.stand_in = prepared.stand_in;
                container.hooks = Some(prepared.hooks);
                (Some(prepared.files), Some(prepared.stdio))
            }
            None => (None, None),
        };
        let pid = container.stand_in.as_ref().map_or(vmm_pid, StandIn::tid);
        if let Kind::Guest(slot) = &mut container.kind {
            *slot = files.map(Box::new);
        }
        container.init.created(stdio);
        let paths = &container.init.paths;
        let event = TaskCreate {
            container_id: id.clone(),
            bundle: container.bundle.display().to_string(),
            rootfs,
            io: MessageField::some(TaskIO {
                stdin: paths.stdin.clone(),
                stdout: paths.stdout.clone(),
                stderr: paths.stderr.clone(),
                terminal: paths.terminal,
                ..TaskIO::default()
            }),
            pid,
            ..TaskCreate::default()
        };
        let is_guest = matches!(container.kind, Kind::Guest(_));
        self.events.send(topics::TASK_CREATE_EVENT_TOPIC, &event);
        if is_guest {
            self.note(|state| &mut state.timeline.container_created_ns);
            self.follow_process(&id, "");
        } else {
            self.write_state();
        }
        reply.send(Ok(pid));
        if self.containers.get(&id).is_some_and(|c| c.unwanted) {
            self.delete(id, String::new(), Reply::to_nobody());
        }
    }

    fn detach(&self, unused: Option<Prepared>) {
        let Some(Prepared { files, .. }) = unused else {
            return;
        };
        self.begin_work();
        self.later(async move {
            files.detach(None).await;
            |pod: &mut Pod| pod.work_ended()
        });
    }
}

fn still_being_deleted(id: &Id) -> Error {
    Error::State {
        action: "create",
        id: id.as_str().to_owned(),
        state: "still being deleted",
    }
}

/// What is to be made.
enum Plan {
    /// The machine of a pod.
    Sandbox(MachineRequest),
    /// A machine and its one container.
    Single(MachineRequest, Box<dyn FnOnce(SharedTree) -> Files + Send>),
    /// A container more.
    Member(Box<Files>),
}

/// Whom to tell.
struct Created {
    id: String,
    rootfs: Vec<Mount>,
    reply: Reply<u32>,
}
