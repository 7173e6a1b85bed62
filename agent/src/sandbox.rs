//! The pod: what its containers share, and the containers themselves.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use futures::future::join_all;
use husk_protocol::agent::{CreateContainerRequest, CreateSandboxRequest, Network};
use husk_protocol::{deadline, limit, path};
use tokio::sync::OnceCell;
use tokio::time::timeout;

use crate::clock;
use crate::container::attempt::{Attempt, Underway, attempt};
use crate::container::cgroup::machine_grows_to;
use crate::container::{Container, DeviceNumbers, Order, PidSource, Surroundings};
use crate::device;
use crate::entropy;
use crate::error::{Doing, Error, OsError};
use crate::events::{Event, EventQueue, Events};
use crate::hold::PidNamespace;
use crate::init::{namespaces, rootfs};
use crate::kernel_file;
use crate::lock::lock;
use crate::memory::Expected;
use crate::mirror::Mirrors;
use crate::netlink;
use crate::oci::{NamespaceKind, Spec};
use crate::pod_namespaces::PodUsers;
use crate::reaper::Reaper;
use crate::settings::Settings;
use crate::storage::{self, Mounted};

/// Where helpers attach the root they build: a private mount (see early_init).
pub const STAGE: &str = "/run/husk/stage";

/// Tenths of the time there is, for ending everything before the power goes, and
/// after that for writing out what could not be unmounted.
const ENDING: u32 = 5;
const SYNCING: u32 = 4;

/// The pod.
#[derive(Debug)]
pub struct Sandbox {
    settings: Settings,
    around: Surroundings,
    containers: Mutex<HashMap<String, Slot>>,
    pod: Mutex<Pod>,
    power_off: OnceLock<Duration>,
    mirrors: Mirrors,
    memory: Expected,
    events: EventQueue,
}

/// What an id stands for.
#[derive(Debug)]
enum Slot {
    Creating(Underway),
    Ready(Arc<Container>),
    Deleting,
}

#[derive(Debug)]
enum Pod {
    Absent,
    Creating,
    Created {
        /// Made for the first container that shares it: most pods' don't.
        shared_pids: Option<Arc<OnceCell<PidNamespace>>>,
        storages: Vec<Mounted>,
    },
}

impl Sandbox {
    /// Nothing yet.
    pub fn new(settings: Settings, reaper: Arc<Reaper>) -> Self {
        let (events, queue) = Events::new();
        Self {
            around: Surroundings {
                reaper,
                dialler: settings.dialler.clone(),
                cgroup_root: settings.cgroup_root.clone(),
                stage: STAGE.into(),
                events,
                users: OnceLock::new(),
            },
            settings,
            containers: Mutex::default(),
            pod: Mutex::new(Pod::Absent),
            power_off: OnceLock::new(),
            mirrors: Mirrors::new(path::VOLUMES),
            memory: Expected::default(),
            events: queue,
        }
    }

    /// What containers are made among.
    pub fn around(&self) -> &Surroundings {
        &self.around
    }

    /// Volumes whose files the shim sends.
    pub fn mirrors(&self) -> &Mirrors {
        &self.mirrors
    }

    /// Memory that is still to come.
    pub fn memory(&self) -> &Expected {
        &self.memory
    }

    /// Nobody has asked for anything yet that would have to be undone.
    pub fn is_untouched(&self) -> bool {
        matches!(*lock(&self.pod), Pod::Absent) && lock(&self.containers).is_empty()
    }

    /// Sets up what containers share.
    pub async fn create(&self, request: CreateSandboxRequest) -> Result<(), Error> {
        {
            let mut pod = lock(&self.pod);
            if !matches!(*pod, Pod::Absent) {
                return Err(Error::SandboxExists);
            }
            *pod = Pod::Creating;
        }
        let made = self.create_pod(request).await;
        let mut pod = lock(&self.pod);
        match made {
            Ok(created) => {
                *pod = created;
                Ok(())
            }
            Err(error) => {
                *pod = Pod::Absent;
                Err(error)
            }
        }
    }

    async fn create_pod(&self, request: CreateSandboxRequest) -> Result<Pod, Error> {
        if request.memory_max_mib > 0 {
            machine_grows_to(request.memory_max_mib.saturating_mul(1 << 20));
        }
        self.memory.more(request.plugged_mib);
        if request.power_off_seconds > 0 {
            let seconds = request.power_off_seconds.into();
            self.power_off.get_or_init(|| Duration::from_secs(seconds));
        }
        if self.settings.guest {
            // Before anything that uses a random number.
            let is_copy = !request.entropy.is_empty();
            if is_copy {
                entropy::renew(&request.entropy)?;
            }
            clock::correct(request.wall_clock_ns)?;
            if is_copy {
                // What the pod has and the template had not.
                device::rescan().await?;
            }
        }
        if !request.uid_mappings.is_empty() || !request.gid_mappings.is_empty() {
            let users = PodUsers::make(&request).await?;
            let _ = self.around.users.set(users);
        }
        if !request.hostname.is_empty() {
            let name = request.hostname.as_bytes();
            rustix::system::sethostname(name).doing("set host name", &request.hostname)?;
        }
        let storages = storage::mount_all(request.storages.clone()).await?;
        match self.create_shared(&request).await {
            Ok(()) => Ok(Pod::Created {
                shared_pids: request.shared_pid_namespace.then(Arc::default),
                storages,
            }),
            Err(error) => {
                storage::unmount_all(storages).await;
                Err(error)
            }
        }
    }

    async fn create_shared(&self, request: &CreateSandboxRequest) -> Result<(), Error> {
        if let Some(network) = request.network.as_ref() {
            netlink::apply(network).await?;
        }
        // After the interfaces, some of which they name.
        for (key, value) in &request.sysctls {
            let path = rootfs::sysctl_path(key).ok_or_else(|| Error::Invalid {
                field: "sysctls",
                reason: format!("{key:?} is no key"),
            })?;
            let written = match self.around.users.get() {
                Some(users) => users.write_sysctl(&path, value),
                None => kernel_file::write(path, value),
            };
            written.doing("set sysctl", key)?;
        }
        Ok(write_name_files(request)?)
    }

    /// Applies a network state.
    pub async fn update_network(&self, network: &Network) -> Result<(), Error> {
        Ok(netlink::apply(network).await?)
    }

    /// Makes a container.
    pub async fn create_container(&self, request: CreateContainerRequest) -> Result<i32, Error> {
        let id = request.container_id.clone();
        check_id(&id)?;
        if !matches!(*lock(&self.pod), Pod::Created { .. }) {
            return Err(Error::NoSandbox);
        }
        let attempt = {
            let mut containers = lock(&self.containers);
            if containers.len() >= limit::CONTAINERS {
                return Err(Error::TooMany {
                    what: "containers",
                    limit: limit::CONTAINERS,
                });
            }
            if containers.contains_key(&id) {
                return Err(Error::ContainerExists { id });
            }
            let (attempt, underway) = attempt();
            containers.insert(id.clone(), Slot::Creating(underway));
            attempt
        };
        let made = self.create_reserved(request, &attempt).await;
        let mut containers = lock(&self.containers);
        match made {
            Ok(container) => {
                let pid = container.first_pid();
                containers.insert(id, Slot::Ready(Arc::new(container)));
                Ok(pid)
            }
            Err(error) => {
                containers.remove(&id);
                self.around.events.forget(&id);
                Err(error)
            }
        }
    }

    async fn create_reserved(
        &self,
        request: CreateContainerRequest,
        attempt: &Attempt,
    ) -> Result<Container, Error> {
        let spec: Spec = parse("oci_spec", &request.oci_spec)?;
        let pid_namespace = self.pid_source(&spec).await?;
        let finding = DeviceNumbers::find(&request.devices, &request.pci_slots);
        let devices = attempt.work(finding).await?;
        let storages = storage::mount_all_for(attempt, request.storages).await?;
        let order = Order {
            pid_namespace,
            id: request.container_id,
            spec,
            streams: request.streams.unwrap_or_default(),
            terminal: request.terminal,
            devices,
            all_devices: request.all_devices,
        };
        match Container::create(order, &self.around, attempt).await {
            Ok(container) => {
                container.keep_storages(storages);
                Ok(container)
            }
            Err(error) => {
                storage::unmount_all(storages).await;
                Err(error)
            }
        }
    }

    /// A PID namespace in the spec without a path is the container's own; with
    /// one it is another container's or the pod's shared one.
    async fn pid_source(&self, spec: &Spec) -> Result<PidSource, Error> {
        let path = match namespaces::find(spec, NamespaceKind::Pid) {
            None => return Ok(PidSource::Guest),
            Some(None) => return Ok(PidSource::Own),
            Some(Some(path)) => path,
        };
        let target = path.strip_prefix(path::CONTAINERS).ok();
        if let Some(target) = target.and_then(Path::to_str) {
            return Ok(PidSource::Of(self.container(target)?.pid_namespace()?));
        }
        let Some(shared) = self.shared_pids() else {
            return Ok(PidSource::Own);
        };
        let make = || {
            let users = self.around.users.get();
            PidNamespace::make(&self.around.cgroup_root, &self.around.reaper, users)
        };
        let shared = shared.get_or_try_init(make).await?.file();
        Ok(PidSource::Of(
            shared.doing("join", "the pod's PID namespace")?,
        ))
    }

    /// The pod's PID namespace, if its containers share one. Nothing can join
    /// one that has ended: whoever comes next has it made anew.
    fn shared_pids(&self) -> Option<Arc<OnceCell<PidNamespace>>> {
        let mut pod = lock(&self.pod);
        let Pod::Created {
            shared_pids: Some(shared),
            ..
        } = &mut *pod
        else {
            return None;
        };
        if shared.get().is_some_and(PidNamespace::has_ended) {
            *shared = Arc::default();
        }
        Some(Arc::clone(shared))
    }

    /// A container by its id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match lock(&self.containers).get(id) {
            Some(Slot::Ready(container)) => Ok(Arc::clone(container)),
            _ => Err(Error::NoContainer { id: id.to_owned() }),
        }
    }

    /// Ends a container and what was made for it. The creation of one that is
    /// not ready yet is given up, and nothing is left of it afterwards.
    pub async fn delete_container(&self, id: &str) -> Result<(), Error> {
        let underway = match lock(&self.containers).get(id) {
            Some(Slot::Creating(underway)) => Some(underway.clone()),
            _ => None,
        };
        if let Some(underway) = &underway {
            underway.give_up();
            underway.over().await;
        }
        let Some(container) = self.take_to_delete(id) else {
            // Unless somebody else is at it.
            let is_over = !lock(&self.containers).contains_key(id);
            return match underway {
                Some(_) if is_over => Ok(()),
                _ => Err(Error::NoContainer { id: id.to_owned() }),
            };
        };
        match container.end().await {
            Ok(storages) => {
                storage::unmount_all(storages).await;
                lock(&self.containers).remove(id);
                self.around.events.forget(id);
                Ok(())
            }
            Err(error) => {
                lock(&self.containers).insert(id.to_owned(), Slot::Ready(container));
                Err(error)
            }
        }
    }

    fn take_to_delete(&self, id: &str) -> Option<Arc<Container>> {
        let mut containers = lock(&self.containers);
        let slot = containers.get_mut(id)?;
        let Slot::Ready(container) = &*slot else {
            return None;
        };
        let container = Arc::clone(container);
        *slot = Slot::Deleting;
        Some(container)
    }

    /// The next thing worth telling.
    pub async fn next_event(&self) -> Option<Event> {
        self.events.lock().await.recv().await
    }

    /// Ends all containers at once and unmounts everything, as far as time
    /// allows; one that hangs takes nothing of the others'.
    pub async fn end(&self) {
        let ending = async {
            let ids: Vec<String> = lock(&self.containers).keys().cloned().collect();
            let deletions = ids.iter().map(async |id| {
                if let Err(error) = self.delete_container(id).await {
                    log::warn!("{id}: {error}");
                }
            });
            join_all(deletions).await;
            let pod = std::mem::replace(&mut *lock(&self.pod), Pod::Absent);
            if let Pod::Created { storages, .. } = pod {
                storage::unmount_all(storages).await;
            }
        };
        let tenth = *self.power_off.get().unwrap_or(&deadline::POWER_OFF) / 10;
        if timeout(tenth * ENDING, ending).await.is_err() {
            log::error!("not everything ended within {:?}", tenth * ENDING);
        }
        let sync = tokio::task::spawn_blocking(rustix::fs::sync);
        match timeout(tenth * SYNCING, sync).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::warn!("sync: {error}"),
            Err(_) => log::error!("not synced within {:?}", tenth * SYNCING),
        }
    }
}

/// Reads JSON of a request.
pub fn parse<T: serde::de::DeserializeOwned>(field: &'static str, json: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(json).map_err(|source| Error::Json { field, source })
}

/// Ids become names of directories.
pub fn check_id(id: &str) -> Result<(), Error> {
    let bad = |reason| Error::BadId {
        id: id.chars().take(limit::ID_BYTES).collect(),
        reason,
    };
    if id.is_empty() || id.len() > limit::ID_BYTES {
        return Err(bad("its length"));
    }
    if id.starts_with('.') {
        return Err(bad("it starts with a dot"));
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    match id.bytes().all(plain) {
        true => Ok(()),
        false => Err(bad("only letters, digits, '.', '_' and '-' are allowed")),
    }
}

fn write_name_files(request: &CreateSandboxRequest) -> Result<(), OsError> {
    let directory = Path::new(path::SANDBOX);
    fs::create_dir_all(directory).doing("make", path::SANDBOX)?;
    let address = request
        .network
        .interfaces
        .iter()
        .flat_map(|interface| &interface.addresses);
    let address = address
        .map(|cidr| cidr.split('/').next().unwrap_or_default())
        .next();
    let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    if let Some(address) = address.filter(|_| !request.hostname.is_empty()) {
        hosts.push_str(&format!("{address}\t{}\n", request.hostname));
    }
    let files = [
        ("resolv.conf", resolv_conf(request)),
        ("hosts", hosts),
        ("hostname", format!("{}\n", request.hostname)),
    ];
    for (name, text) in files {
        let file = directory.join(name);
        fs::write(&file, text).doing("write", file.display())?;
    }
    Ok(())
}

fn resolv_conf(request: &CreateSandboxRequest) -> String {
    let mut text = String::new();
    for server in &request.dns_servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    for (word, values) in [
        ("search", &request.dns_searches),
        ("options", &request.dns_options),
    ] {
        if !values.is_empty() {
            text.push_str(&format!("{word} {}\n", values.join(" ")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_directories() {
        for id in ["a", "web-1.x_Y", &"a".repeat(limit::ID_BYTES)] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "ä",
            &"a".repeat(limit::ID_BYTES + 1),
        ] {
            assert!(matches!(check_id(id), Err(Error::BadId { .. })), "{id}");
        }
    }

    #[test]
    fn resolv_conf_has_the_resolvers_syntax() {
        let request = CreateSandboxRequest {
            dns_servers: vec!["10.0.0.10".into(), "fd00::a".into()],
            dns_searches: vec!["a.local".into(), "b.local".into()],
            dns_options: vec!["ndots:5".into()],
            ..Default::default()
        };
        assert_eq!(
            resolv_conf(&request),
            "nameserver 10.0.0.10\nnameserver fd00::a\nsearch a.local b.local\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(&CreateSandboxRequest::default()), "");
    }
}
