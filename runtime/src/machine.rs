//! A pod's machine: everything on the node that belongs to it, from start to
//! end.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_node::rates::Rates;
use husk_node::state::{DiskFacts, MachineFacts, NicFacts};
use husk_protocol::agent::{
    CreateSandboxRequest, CreateSandboxResponse, Network, Storage, VirtioFsStorage,
};
use husk_protocol::{deadline, path};
use nix::unistd::{SysconfVar, sysconf};
use tokio::time::timeout;

use crate::agent_client::{Agent, AgentError};
use crate::blocking;
use crate::bundle::PodSpec;
use crate::cgroup::CgroupDir;
use crate::child::Program;
use crate::clock;
use crate::config::{Config, Patience};
use crate::error::Error;
use crate::file_server::FileServer;
use crate::growth::{Fitter, Growth};
use crate::id_map::IdMaps;
use crate::interfaces::{Interfaces, Known};
use crate::network::{Netns, NetworkError, PodNetwork};
use crate::second_line;
use crate::shared_tree::SharedTree;
use crate::state_dir::{State, StateDir};
use crate::template::TemplateKey;
use crate::vm_plan::{self, Disk, HostFacts, Room, Start, VmParts, VmSize};
use crate::vm_process::{Vm, VmEnd, VmError, Vmm};
use crate::volume;

mod start_plan;

use start_plan::{StartPlan, blame};

/// How long a machine whose agent has gone may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What a machine is made from.
#[derive(Debug)]
pub struct MachineRequest {
    /// The node's configuration.
    pub config: Arc<Config>,
    /// The pod.
    pub pod: PodSpec,
    /// Where its processes begin.
    pub cgroup: Option<CgroupDir>,
    /// Its directory.
    pub state_dir: StateDir,
    /// What is on the node already; more is noted as it comes.
    pub state: State,
    /// Log more.
    pub debug: bool,
}

/// The parts that can be had without knowing the containers.
#[derive(Debug)]
pub struct MachineParts {
    request: MachineRequest,
    /// As the pod needs it.
    size: VmSize,
    plan: StartPlan,
    host: HostFacts,
    kvm: OwnedFd,
    tree: SharedTree,
    vmm: Vmm,
    file_server: FileServer,
    file_server_socket: OwnedFd,
    network: Option<(Netns, PodNetwork)>,
}

/// A machine whose agent has set the sandbox up.
pub struct Machine {
    vm: Vm,
    agent: Agent,
    tree: SharedTree,
    file_server: Arc<FileServer>,
    netns: Option<Netns>,
    interfaces: Interfaces,
    fitter: Fitter,
    lacking: Option<TemplateKey>,
}

impl MachineParts {
    /// Starts the VMM and prepares tree, file server and network, all at once.
    ///
    /// # Errors
    /// Something is missing; nothing stays.
    pub async fn prepare(request: MachineRequest) -> Result<Self, Error> {
        let config = &request.config;
        let host = host_facts();
        let size = vm_plan::size(&request.pod, host)?;
        // Whatever is missing is told before anything has begun.
        let kvm = open("KVM", Path::new("/dev/kvm"), true)?;
        let plan = StartPlan::new(&request, size, host).await?;
        let tree = SharedTree::create(&request.state_dir.shared())?;

        second_line::warn_of_kernel();
        let (vmm, network) = tokio::join!(
            Vmm::spawn(&config.vmm, config.first_uid, request.cgroup.clone()),
            attach(request.pod.netns.clone())
        );
        let vmm = vmm?;
        let (file_server, network) = match network {
            Err(error) => (Err(error), None),
            Ok(network) => {
                let program = Program {
                    path: &config.file_server,
                    first_uid: config.first_uid,
                    cgroup: request.cgroup.as_ref(),
                    complaints: vmm.console_input()?,
                };
                let most_mib = plan.size.memory_mib + plan.room.pluggable_mib;
                let spawned = FileServer::spawn(program, tree.path(), most_mib);
                (spawned.await.map_err(Error::from), network)
            }
        };
        if let Some(cgroup) = &request.cgroup {
            cgroup.move_in();
        }
        let (file_server, file_server_socket) = match file_server {
            Ok(spawned) => spawned,
            Err(error) => {
                vmm.end(config.patience()).await;
                return Err(error);
            }
        };
        Ok(Self {
            size,
            plan,
            host,
            kvm,
            tree,
            vmm,
            file_server,
            file_server_socket,
            network,
            request,
        })
    }

    /// Where containers' files go.
    pub fn tree(&self) -> &SharedTree {
        &self.tree
    }

    /// Ends what was started.
    pub async fn end(self) {
        let patience = self.request.config.patience();
        self.vmm.end(patience).await;
        drop(self.file_server_socket);
        self.file_server.end(patience).await;
    }

    /// Boots the machine with `disks` and has the agent set the sandbox up.
    ///
    /// # Errors
    /// The machine did not start, or the agent could not; nothing stays.
    pub async fn boot(self, disks: Vec<Disk>) -> Result<(Machine, State), Error> {
        let Self { request, .. } = self;
        let mut state = request.state;
        state.vmm = Some(self.vmm.process());
        state.file_server = Some(self.file_server.process());
        request.state_dir.write(&state)?;
        for process in [state.vmm, state.file_server].into_iter().flatten() {
            process.set_oom_score_adj(request.pod.oom_score_adj.unwrap_or(0));
        }

        let patience = Duration::from_secs(request.config.boot_timeout_seconds.into());
        let (near, far) = UnixStream::pair().map_err(AgentError::Connect)?;
        let agent = Agent::new(near, request.config.patience())?;
        let (netns, nics, network) = match self.network {
            Some((netns, network)) => (Some(netns), network.nics, network.guest),
            None => (None, Vec::new(), Network::default()),
        };
        let known = Known::new(&nics, network.clone());
        for nic in &nics {
            tracing::info!(name = nic.link.name, mac = %nic.mac, mtu = nic.mtu, "interface");
        }
        let rates = Rates::of_node(&request.config);
        let rates = request.pod.overrides.rates.or(rates);
        let parts = VmParts {
            kvm: self.kvm,
            start: self.plan.start,
            console: self.vmm.console_input()?,
            agent: far.into(),
            nics,
            file_server: Some(self.file_server_socket),
            disks,
            rates,
            vfio: request.config.vfio,
        };
        let StartPlan {
            size,
            room,
            entropy,
            template,
            lacking,
            hits,
            ..
        } = self.plan;
        let used = template.as_ref();
        let mut facts = machine_facts(self.size, size, room, &parts);
        facts.template = used.map(TemplateKey::name);
        let (spec, descriptors) = vm_plan::plan(size, room, parts)?;
        let (vm, timeline) = match self
            .vmm
            .start(
                &spec,
                descriptors,
                patience,
                request.config.patience(),
                rates,
            )
            .await
        {
            Ok(started) => started,
            Err(error) => {
                let error = error.into();
                blame(used, &error, &hits);
                self.file_server.end(request.config.patience()).await;
                return Err(error);
            }
        };
        second_line::warn_of_users(vm.process());
        state.timeline.vmm_exec_ns = timeline.exec_ns;
        state.timeline.vmm_spec_ns = timeline.spec_ns;
        state.timeline.guest_entered_ns = timeline.entered_ns;
        let since = |ns: u64| ns.saturating_sub(state.timeline.request_ns) / 1_000_000;
        tracing::info!(
            vmm_exec_ms = since(timeline.exec_ns),
            spec_ms = since(timeline.spec_ns),
            entered_ms = since(timeline.entered_ns),
            "machine runs"
        );

        let interfaces = Interfaces::new(netns.clone(), vm.process(), known);
        let machine = Machine {
            vm,
            interfaces,
            agent,
            tree: self.tree,
            file_server: Arc::new(self.file_server),
            netns,
            fitter: Fitter::new(Growth::new(&request.pod, size, self.size, room, self.host)),
            lacking: lacking.filter(TemplateKey::is_worth_making),
        };
        let mut sandbox = sandbox_request(&request.pod, network, request.config.patience());
        sandbox.memory_max_mib = (size.memory_mib + room.pluggable_mib).into();
        sandbox.entropy = entropy;
        sandbox.plugged_mib = self.size.memory_mib.saturating_sub(size.memory_mib);
        match machine.set_up(&sandbox, patience).await {
            Ok(guest) => {
                match used {
                    Some(template) => template.proved(),
                    None => state.timeline.agent_began_ns = agent_began_ns(&guest),
                }
                machine.fitter.fit(&machine.vm, &machine.agent).await;
                state.timeline.agent_ready_ns = clock::monotonic_ns();
                facts.agent_version = guest.agent_version;
                facts.kernel_release = guest.kernel_release;
                state.machine = Some(facts);
                Ok((machine, state))
            }
            Err(error) => {
                blame(used, &error, &hits);
                machine.end().await;
                Err(error)
            }
        }
    }
}

impl Machine {
    /// The virtual machine.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Its agent.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Where containers' files go.
    pub fn tree(&self) -> &SharedTree {
        &self.tree
    }

    /// The server of those files.
    pub fn file_server(&self) -> &Arc<FileServer> {
        &self.file_server
    }

    /// What comes to its network.
    pub fn interfaces(&self) -> &Interfaces {
        &self.interfaces
    }

    /// The namespace whose interfaces the machine took over.
    pub fn netns(&self) -> Option<&Netns> {
        self.netns.as_ref()
    }

    /// What changes its size.
    pub fn fitter(&self) -> &Fitter {
        &self.fitter
    }

    /// The template that is to be made for the next such machine.
    pub fn lacking(&self) -> Option<&TemplateKey> {
        self.lacking.as_ref()
    }

    /// Ends the machine at once, and all that belongs to it.
    pub async fn end(&self) -> VmEnd {
        let end = self.vm.kill().await;
        self.file_server.end(self.agent.patience()).await;
        end
    }

    async fn set_up(
        &self,
        sandbox: &CreateSandboxRequest,
        patience: Duration,
    ) -> Result<CreateSandboxResponse, Error> {
        let answer = tokio::select! {
            answer = self.agent.create_sandbox(sandbox, patience) => answer,
            end = self.vm.ended() => return Err(VmError::Ended(end).into()),
        };
        match answer {
            Ok(sandbox) => {
                tracing::info!(
                    agent = sandbox.agent_version,
                    kernel = sandbox.kernel_release,
                    "machine is ready"
                );
                Ok(sandbox)
            }
            Err(AgentError::Deadline { seconds, .. }) => {
                let VmEnd { console, .. } = self.vm.kill().await;
                Err(VmError::NotReady { seconds, console }.into())
            }
            Err(error) => Err(explained(&self.vm, &self.agent, error).await),
        }
    }
}

/// When an agent that has just answered began, which it alone knows.
fn agent_began_ns(answer: &CreateSandboxResponse) -> u64 {
    let took = answer
        .sandbox_ready_ns
        .saturating_sub(answer.agent_started_ns);
    clock::monotonic_ns().saturating_sub(took)
}

/// What others may know of a machine; what its guest says comes later.
fn machine_facts(size: VmSize, boot: VmSize, room: Room, parts: &VmParts) -> MachineFacts {
    let all_mib = boot.memory_mib + room.pluggable_mib;
    let nics = parts.nics.iter().map(|nic| NicFacts {
        name: nic.link.name.clone(),
        mac: nic.mac.to_string(),
        mtu: nic.mtu,
    });
    let disks = parts.disks.iter().map(|disk| DiskFacts {
        serial: disk.serial.clone(),
        read_only: disk.read_only,
    });
    MachineFacts {
        vcpus: size.vcpus,
        vcpus_max: room.vcpus,
        memory_mib: size.memory_mib,
        pluggable_mib: all_mib.saturating_sub(size.memory_mib),
        from_template: matches!(parts.start, Start::Restore { .. }),
        nics: nics.collect(),
        disks: disks.collect(),
        shim_version: env!("CARGO_PKG_VERSION").to_owned(),
        ..MachineFacts::default()
    }
}

/// Why an agent failed: that its machine has ended, and how, says more than a
/// lost connection.
pub async fn explained(vm: &Vm, agent: &Agent, error: AgentError) -> Error {
    if !matches!(error, AgentError::Gone) {
        return error.into();
    }
    match timeout(agent.patience().of(LAST_WORDS), vm.ended()).await {
        Ok(end) => VmError::Ended(end).into(),
        Err(_) => error.into(),
    }
}

fn sandbox_request(pod: &PodSpec, network: Network, patience: Patience) -> CreateSandboxRequest {
    let mut shared = Storage {
        mount_point: path::SHARED.to_owned(),
        ..Storage::default()
    };
    shared.set_virtio_fs(VirtioFsStorage {
        tag: path::SHARED_TAG.to_owned(),
        ..VirtioFsStorage::default()
    });
    let dns = pod.dns.clone().unwrap_or_default();
    let [uid_mappings, gid_mappings] = pod
        .id_maps
        .as_ref()
        .map(IdMaps::for_guest)
        .unwrap_or_default();
    let root = pod.id_maps.as_ref().and_then(IdMaps::root);
    let power_off = patience.of(deadline::POWER_OFF).as_secs();
    CreateSandboxRequest {
        hostname: pod.hostname.clone(),
        dns_servers: dns.servers,
        dns_searches: dns.searches,
        dns_options: dns.options,
        sysctls: pod.sysctls.clone().into_iter().collect(),
        network: Some(network).into(),
        storages: vec![shared, volume::shm_storage(root.unwrap_or_default())],
        shared_pid_namespace: pod.shared_pid_namespace,
        wall_clock_ns: clock::wall_ns(),
        uid_mappings,
        gid_mappings,
        power_off_seconds: power_off.try_into().unwrap_or(u32::MAX),
        ..CreateSandboxRequest::default()
    }
}

/// From here on the namespace is what was opened, wherever its path leads.
async fn attach(path: Option<PathBuf>) -> Result<Option<(Netns, PodNetwork)>, Error> {
    let Some(path) = path else { return Ok(None) };
    let attached = blocking::run(move || {
        let netns = Netns::open(&path)?;
        let network = PodNetwork::attach(&netns)?;
        Ok::<_, NetworkError>((netns, network))
    });
    Ok(Some(attached.await.map_err(Error::Thread)??))
}

/// Opens a file that a machine is made of.
///
/// # Errors
/// It is not there, or not for this user.
pub fn open(what: &'static str, path: &Path, write: bool) -> Result<OwnedFd, VmError> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|source| VmError::Open {
            what,
            path: path.to_owned(),
            source,
        })
}

/// What this node has.
pub fn host_facts() -> HostFacts {
    let info = rustix::system::sysinfo();
    let bytes = info.totalram.saturating_mul(u64::from(info.mem_unit));
    // Not what this process may use: it is in the pod's cgroup, whose quota is to
    // be spent by as many vCPUs as the pod asked for.
    let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN);
    let cpus = cpus.ok().flatten().unwrap_or(1);
    HostFacts {
        memory_mib: u32::try_from(bytes >> 20).unwrap_or(u32::MAX),
        cpus: u8::try_from(cpus).unwrap_or(u8::MAX),
    }
}
