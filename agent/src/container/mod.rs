//! One container: made, started, joined by more processes, ended, removed.

pub mod attempt;
pub mod cgroup;
mod device_filter;
mod device_numbers;
mod exec;
mod id_map;
mod launch;
mod limits;
mod process;
mod stats;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

pub use device_numbers::DeviceNumbers;
use husk_protocol::agent::Streams;
pub use id_map::IdMaps;
pub use launch::{Child, Helper, LaunchError};
use nix::sched::CloneFlags;
pub use process::Process;
use tokio::task::JoinHandle;

use crate::error::{Doing, Error};
use crate::events::Events;
use crate::init::channel::AgentChannel;
use crate::init::plan::{ContainerPlan, Kind, PidNamespace, Plan};
use crate::lock::lock;
use crate::oci::{self, NamespaceKind, Personality, Resources, Seccomp, Spec};
use crate::pod_namespaces::PodUsers;
use crate::reaper::Reaper;
use crate::socket::Dialler;
use crate::stdio::{Stdio, Terminal};
use crate::storage::{self, Mounted};
use attempt::Attempt;
use cgroup::Cgroup;
use exec::Exec;

/// How long a killed process may take to end.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// What every container needs of its surroundings.
#[derive(Debug)]
pub struct Surroundings {
    /// Hands out exits.
    pub reaper: Arc<Reaper>,
    /// Reaches the host's ports.
    pub dialler: Dialler,
    /// Mount point of cgroup v2.
    pub cgroup_root: PathBuf,
    /// Where helpers attach the root they build.
    pub stage: PathBuf,
    /// Where events go.
    pub events: Events,
    /// The pod's, if it has users of its own.
    pub users: OnceLock<PodUsers>,
}

/// What a container is made from.
#[derive(Debug)]
pub struct Order {
    /// Its id.
    pub id: String,
    /// Its OCI spec.
    pub spec: Spec,
    /// Host ports of its streams.
    pub streams: Streams,
    /// Whether its first process has a terminal.
    pub terminal: bool,
    /// Where its PID namespace comes from.
    pub pid_namespace: PidSource,
    /// The devices that its spec names.
    pub devices: DeviceNumbers,
    /// Whether it has a node of every device.
    pub all_devices: bool,
}

/// Where a container's PID namespace comes from.
#[derive(Debug)]
pub enum PidSource {
    /// Its own.
    Own,
    /// The guest's.
    Guest,
    /// That of this descriptor.
    Of(File),
}

/// A container between its creation and its deletion.
#[derive(Debug)]
pub struct Container {
    id: String,
    cgroup: Arc<Cgroup>,
    first: Process,
    phase: Mutex<Phase>,
    execs: Mutex<HashMap<String, Exec>>,
    storages: Mutex<Vec<Mounted>>,
    /// `CLONE_NEW*` flags for those who join.
    namespaces: CloneFlags,
    process: oci::Process,
    seccomp: Option<Seccomp>,
    personality: Option<Personality>,
    id_maps: IdMaps,
    devices: DeviceNumbers,
    memory_watch: Option<JoinHandle<()>>,
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(watch) = &self.memory_watch {
            watch.abort();
        }
    }
}

/// What the first process is at, as far as it hasn't ended.
#[derive(Debug)]
enum Phase {
    Created(AgentChannel),
    Starting,
    Running,
    Paused,
}

impl Container {
    /// Makes a container whose storages are mounted. When it fails, nothing
    /// but those is left.
    pub async fn create(
        order: Order,
        around: &Surroundings,
        attempt: &Attempt,
    ) -> Result<Self, Error> {
        let cgroup = Arc::new(Cgroup::create(&around.cgroup_root, &order.id)?);
        let made = Self::create_in(order, around, Arc::clone(&cgroup), attempt).await;
        if made.is_err()
            && let Err(error) = cgroup.remove().await
        {
            log::error!("{}: {error}", cgroup.path().display());
        }
        made
    }

    async fn create_in(
        order: Order,
        around: &Surroundings,
        cgroup: Arc<Cgroup>,
        attempt: &Attempt,
    ) -> Result<Self, Error> {
        let mut spec = order.spec;
        device_numbers::check_mounts(&spec.mounts)?;
        order.devices.translate(&mut spec.linux)?;
        let resources = spec.linux.resources.clone().unwrap_or_default();
        let blocks = order.devices.blocks();
        cgroup.limit(&resources, &order.devices.disks())?;
        cgroup.filter_devices(&resources.devices, &blocks)?;
        let process = spec.process.clone().ok_or_else(|| Error::Invalid {
            field: "oci_spec.process",
            reason: "missing".to_owned(),
        })?;
        if process.apparmor_profile.is_some() || process.selinux_label.is_some() {
            log::info!("{}: the guest has no AppArmor and no SELinux", order.id);
        }
        let seccomp = spec.linux.seccomp.clone();
        let personality = spec.linux.personality;
        let namespaces = namespaces_to_join(&spec);
        let id_maps = IdMaps::from_spec(&spec)?;
        let (uid, gid) = id_maps.outside(&process.user)?;
        let (stdio, streams) =
            Stdio::connect(&around.dialler, &order.streams, order.terminal).await?;
        streams.hand_over(uid, gid)?;
        let of_pod = around.users.get();
        let users = of_pod.and_then(|users| users.with_maps(&id_maps));
        let users = users
            .transpose()
            .doing("join", "the pod's user namespace")?;
        let has_own_users = users.is_none() && namespaces.contains(CloneFlags::CLONE_NEWUSER);
        let (pid_namespace, process_source) = match order.pid_namespace {
            PidSource::Own => (PidNamespace::Own, None),
            PidSource::Guest => (PidNamespace::Guest, None),
            // Its /proc would have to be the agent's, with all of the guest.
            PidSource::Of(_) if has_own_users => {
                return Err(Error::Invalid {
                    field: "linux.namespaces",
                    reason: "a user namespace of its own in a shared PID namespace".to_owned(),
                });
            }
            PidSource::Of(file) => (PidNamespace::Join(file.as_raw_fd()), Some(file)),
        };
        let users_fd = users.as_ref().map(AsRawFd::as_raw_fd);
        let inherited = process_source.into_iter().chain(users).map(OwnedFd::from);
        let inherited: Vec<_> = inherited.collect();
        let binds = spec.mounts.iter().filter(|mount| mount.is_bind());
        let sources = binds.filter_map(|mount| mount.source.clone()).collect();
        let reaching = async {
            storage::reach_shared(sources).await;
            Ok::<_, LaunchError>(())
        };
        attempt.work(reaching).await?;
        let plan = Plan {
            cgroups: vec![cgroup.procs_file()],
            terminal: order.terminal,
            kind: Kind::Container(Box::new(ContainerPlan {
                id: order.id.clone(),
                spec,
                stage: around.stage.clone(),
                pid_namespace,
                users: users_fd,
                all_devices: order.all_devices,
            })),
        };
        let launched = launch::launch(&around.reaper, &plan, streams, &inherited, attempt).await;
        let launched = launched.map_err(|error| match error {
            LaunchError::Ended if cgroup.oom_kills() > 0 => LaunchError::OutOfMemory,
            error => error,
        })?;
        let terminal = terminal_of(launched.terminal)?;
        let streams = stdio.start(terminal.as_ref())?;
        let memory_watch = watch_memory(order.id.clone(), &cgroup, around.events.clone());
        let last_rites = {
            let (id, cgroup, events) =
                (order.id.clone(), Arc::clone(&cgroup), around.events.clone());
            move || {
                events.oom_kills(&id, cgroup.oom_kills());
                // In a PID namespace of its own the kernel has done so.
                if pid_namespace != PidNamespace::Own
                    && let Err(error) = cgroup.kill()
                {
                    log::error!("{id}: {error}");
                }
            }
        };
        Ok(Self {
            first: Process::new(launched.child, terminal, streams, last_rites),
            id: order.id,
            cgroup,
            phase: Mutex::new(Phase::Created(launched.channel)),
            execs: Mutex::default(),
            storages: Mutex::default(),
            namespaces,
            process,
            seccomp,
            personality,
            id_maps,
            devices: order.devices,
            memory_watch,
        })
    }

    /// Runs the user's program.
    pub async fn start(&self) -> Result<(), Error> {
        self.expect_alive("created")?;
        let channel = {
            let mut phase = lock(&self.phase);
            match std::mem::replace(&mut *phase, Phase::Starting) {
                Phase::Created(channel) => channel,
                other => {
                    let state = other.name();
                    *phase = other;
                    return Err(self.wrong_state(state, "created"));
                }
            }
        };
        let released = launch::release(channel).await;
        *lock(&self.phase) = Phase::Running;
        if let Err(error) = &released {
            end_unconfirmed(&self.first, error).await?;
        }
        Ok(released?)
    }

    /// Signals every process.
    pub fn signal_all(&self, signal: i32) -> Result<(), Error> {
        if signal == libc::SIGKILL {
            return Ok(self.cgroup.kill()?);
        }
        for pid in self.cgroup.processes()? {
            match process::send_signal(pid, signal) {
                Ok(()) | Err(Error::Finished) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// containerd's statistics, serialized.
    pub fn stats(&self) -> Result<Vec<u8>, Error> {
        stats::of(self.cgroup.path())
    }

    /// Changes what is given. Blocks.
    pub fn update(&self, resources: &Resources) -> Result<(), Error> {
        let has_rules = !resources.devices.is_empty();
        let mut resources = resources.clone();
        self.devices.translate_resources(&mut resources);
        self.cgroup.limit(&resources, &self.devices.disks())?;
        if has_rules {
            let blocks = self.devices.blocks();
            self.cgroup.filter_devices(&resources.devices, &blocks)?;
        }
        Ok(())
    }

    /// Stops all processes where they are.
    pub async fn pause(&self) -> Result<(), Error> {
        self.expect_running()?;
        if let Err(error) = self.cgroup.freeze(true).await {
            // Half frozen is worse than running.
            if let Err(error) = self.cgroup.freeze(false).await {
                log::error!("{}: {error}", self.id);
            }
            return Err(error.into());
        }
        *lock(&self.phase) = Phase::Paused;
        Ok(())
    }

    /// Lets them go on.
    pub async fn resume(&self) -> Result<(), Error> {
        self.expect_alive("paused")?;
        let state = lock(&self.phase).name();
        if state != "paused" {
            return Err(self.wrong_state(state, "paused"));
        }
        self.cgroup.freeze(false).await?;
        *lock(&self.phase) = Phase::Running;
        Ok(())
    }

    /// Whether the kernel has killed a process of it for want of memory.
    pub fn was_oom_killed(&self) -> bool {
        self.cgroup.oom_kills() > 0
    }

    /// The process that a client is told of.
    pub fn first_pid(&self) -> i32 {
        self.first.pid()
    }

    /// For others to join, while its first process has not ended.
    pub fn pid_namespace(&self) -> Result<File, Error> {
        let file = format!("/proc/{}/ns/pid", self.first.pid());
        let opened = File::open(&file).doing("open", &file);
        // Looked at after opening: its number was not yet another's then.
        if !self.first.pidfd().is_running() {
            return Err(Error::Finished);
        }
        Ok(opened?)
    }

    /// Remembers what is mounted for it, in order.
    pub fn keep_storages(&self, storages: Vec<Mounted>) {
        *lock(&self.storages) = storages;
    }

    /// Ends what is left; gives back what was mounted for it. May be tried
    /// again when it fails.
    pub async fn end(&self) -> Result<Vec<Mounted>, Error> {
        self.cgroup.remove().await?;
        // A container with rights over cgroups may have moved it out of ours.
        let _ = self.first.signal(libc::SIGKILL);
        let ended = tokio::time::timeout(END_DEADLINE, self.first.wait()).await;
        ended.map_err(|_| Error::Deadline {
            what: format!("the end of container {:?}", self.id),
            seconds: END_DEADLINE.as_secs(),
        })??;
        Ok(std::mem::take(&mut *lock(&self.storages)))
    }

    fn expect_running(&self) -> Result<(), Error> {
        self.expect_alive("running")?;
        match lock(&self.phase).name() {
            "running" => Ok(()),
            state => Err(self.wrong_state(state, "running")),
        }
    }

    fn expect_alive(&self, wanted: &'static str) -> Result<(), Error> {
        match self.first.ended() {
            None => Ok(()),
            Some(_) => Err(self.wrong_state("stopped", wanted)),
        }
    }

    fn wrong_state(&self, state: &'static str, wanted: &'static str) -> Error {
        Error::State {
            id: self.id.clone(),
            state,
            wanted,
        }
    }
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Created(_) => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
        }
    }
}

/// A process that says that it can't run its program ends by itself, one that
/// says nothing doesn't. The caller shall find it ended.
async fn end_unconfirmed(process: &Process, error: &LaunchError) -> Result<(), Error> {
    if matches!(error, LaunchError::Deadline { .. } | LaunchError::GivenUp) {
        let _ = process.signal(libc::SIGKILL);
    }
    let ended = tokio::time::timeout(END_DEADLINE, process.wait()).await;
    ended.map_err(|_| Error::Deadline {
        what: format!("the end of process {}", process.pid()),
        seconds: END_DEADLINE.as_secs(),
    })??;
    Ok(())
}

fn terminal_of(master: Option<OwnedFd>) -> Result<Option<Terminal>, Error> {
    let terminal = master.map(Terminal::new).transpose();
    Ok(terminal.doing("use", "the terminal")?)
}

fn namespaces_to_join(spec: &Spec) -> CloneFlags {
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    for namespace in &spec.linux.namespaces {
        match namespace.kind {
            NamespaceKind::User => flags |= CloneFlags::CLONE_NEWUSER,
            NamespaceKind::Time => flags |= CloneFlags::from_bits_retain(0x80),
            _ => {}
        }
    }
    flags
}

/// Until the handle is aborted: a cgroup that is removed tells nobody.
fn watch_memory(id: String, cgroup: &Arc<Cgroup>, events: Events) -> Option<JoinHandle<()>> {
    let watch = cgroup.watch_oom()?;
    Some(tokio::spawn(async move {
        while let Ok(text) = watch.read() {
            events.oom_kills(&id, cgroup::oom_kills_in(&text));
            if watch.changed().await.is_err() {
                return;
            }
        }
    }))
}
