//! A bundle's `config.json`: the only place on the host that reads OCI.
//!
//! The host acts on little of it, so little of it is typed; the rest crosses to
//! the agent as it came.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use husk_protocol::path;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::hook::{ContainerHooks, Hooks};
use crate::id::{Id, IdError};
use crate::id_map::{IdMaps, IdRange};
use crate::joined::POD_FILE;

mod annotation;
mod block_io;
pub mod device;
mod limits;

pub use annotation::{AnnotationError, Overrides};
pub use block_io::BlockIo;
pub use device::{Device, DeviceRule};
pub use limits::{Limits, Unlimited};
use limits::{MEMORY_LIMIT_MAX, MEMORY_LIMIT_MIN, ResourceLimits};

/// Largest `config.json` taken, bytes: what fits in one message to the agent.
const LARGEST: u64 = (husk_protocol::limit::MESSAGE_BYTES / 2) as u64;

/// A bundle that was read.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    spec: Spec,
    json: Value,
}

/// What a bundle stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// A container that is a pod of its own.
    Single,
    /// A pod of Kubernetes: its container is never run.
    Sandbox,
    /// A container in a pod that exists already.
    Member {
        /// The pod.
        sandbox: Id,
    },
}

/// What the pod's machine and its sandbox are made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSpec {
    /// Host name in the guest; empty: none was asked for.
    pub hostname: String,
    /// Network namespace that the machine takes over; none: loopback only.
    pub netns: Option<PathBuf>,
    /// Of the whole pod.
    pub sysctls: BTreeMap<String, String>,
    /// As containerd wrote it.
    pub cgroups_path: Option<String>,
    /// What the pod may use; the machine's size follows from it.
    pub limits: Limits,
    /// They are the sum over those of its containers that have limits.
    pub limits_are_a_sum: bool,
    /// What some container may use without limit, though others have one.
    pub unlimited: Unlimited,
    /// What it may do to the node's disks.
    pub block_io: BlockIo,
    /// What the operator said about the machine.
    pub overrides: Overrides,
    /// For the processes of the pod on the host.
    pub oom_score_adj: Option<i32>,
    /// Containers may ask to see each other's processes.
    pub shared_pid_namespace: bool,
    /// Of the pod; none: containerd writes the containers' files about names.
    pub dns: Option<Dns>,
    /// Its containers' users are others in the guest.
    pub id_maps: Option<IdMaps>,
}

/// How the pod resolves names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses.
    pub servers: Vec<String>,
    /// Domains.
    pub searches: Vec<String>,
    /// As resolv.conf(5) has them.
    pub options: Vec<String>,
}

/// One entry of `mounts`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Mount {
    /// Inside the container.
    pub destination: PathBuf,
    /// File system type; absent for most binds.
    #[serde(rename = "type", default)]
    pub kind: Option<String>,
    /// On the host.
    #[serde(default)]
    pub source: Option<PathBuf>,
    /// As for mount(8).
    #[serde(default)]
    pub options: Option<Vec<String>>,
    /// Its files appear with other owners.
    #[serde(rename = "uidMappings", default)]
    pub users: Option<Vec<IdRange>>,
    /// The same for groups.
    #[serde(rename = "gidMappings", default)]
    pub groups: Option<Vec<IdRange>>,
}

/// Options that say so; the second one of what is mounted below as well.
const MAP_OPTIONS: [&str; 2] = ["idmap", "ridmap"];

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    oci_version: String,
    hostname: Option<String>,
    annotations: Option<BTreeMap<String, String>>,
    root: Option<Root>,
    mounts: Option<Vec<Mount>>,
    hooks: Option<Hooks>,
    process: Option<Process>,
    linux: Option<Linux>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Root {
    path: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Process {
    oom_score_adj: Option<i32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Linux {
    namespaces: Option<Vec<Namespace>>,
    sysctl: Option<BTreeMap<String, String>>,
    cgroups_path: Option<String>,
    #[serde(rename = "uidMappings")]
    users: Option<Vec<IdRange>>,
    #[serde(rename = "gidMappings")]
    groups: Option<Vec<IdRange>>,
    devices: Option<Vec<Device>>,
    resources: Option<Resources>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Resources {
    devices: Option<Vec<DeviceRule>>,
    #[serde(flatten)]
    limits: ResourceLimits,
    #[serde(rename = "blockIO")]
    block_io: Option<BlockIo>,
}

/// A bundle that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// `config.json` could not be read.
    #[error("bundle's {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is too large to cross to the guest.
    #[error("bundle's {0} is larger than {LARGEST} bytes")]
    TooLarge(PathBuf),
    /// It is no OCI spec.
    #[error("bundle's {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A container of a pod that does not name the pod.
    #[error("annotation {0} is missing from a container of a pod")]
    NoSandboxId(&'static str),
    /// A pod's id that cannot be one.
    #[error(transparent)]
    Id(#[from] IdError),
    /// An annotation for us that cannot be.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// A spec without a root file system.
    #[error("root.path is missing")]
    NoRoot,
    /// The pod asks for the node's own network.
    #[error(
        "the spec has no network namespace of its own, that is the host's network; a virtual \
         machine cannot have it: give the pod a network of its own (no hostNetwork, no --net-host)"
    )]
    HostNetwork,
    /// Processes outside of the machine.
    #[error(
        "PID namespace {0} is of no container of this pod; processes outside of its virtual machine \
         cannot be joined"
    )]
    OtherProcesses(PathBuf),
    /// A memory limit no container can run under.
    #[error(
        "memory limit {0} is impossible; it must be from {MEMORY_LIMIT_MIN} to {MEMORY_LIMIT_MAX} \
         bytes"
    )]
    MemoryLimit(i64),
}

impl Bundle {
    /// Reads the bundle in `dir`.
    ///
    /// # Errors
    /// There is no `config.json`, or it is no OCI spec, or an annotation for us
    /// is wrong.
    pub fn load(dir: &Path) -> Result<Self, BundleError> {
        let path = dir.join("config.json");
        let mut text = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(LARGEST + 1).read_to_end(&mut text))
            .map_err(|source| BundleError::Read {
                path: path.clone(),
                source,
            })?;
        if text.len() as u64 > LARGEST {
            return Err(BundleError::TooLarge(path));
        }
        Self::parse(dir, &text).map_err(|source| BundleError::Parse { path, source })
    }

    fn parse(dir: &Path, text: &[u8]) -> Result<Self, serde_json::Error> {
        let json: Value = serde_json::from_slice(text)?;
        check_objects(&json)?;
        let mut spec: Spec = serde_json::from_slice(text)?;
        spec.complete_mounts();
        Ok(Self {
            dir: dir.to_owned(),
            spec,
            json,
        })
    }

    /// What the bundle stands for.
    ///
    /// # Errors
    /// A container of a pod whose id is missing or no id.
    pub fn role(&self) -> Result<Role, BundleError> {
        let role = annotation::role(&self.annotations())?;
        match fs::read_to_string(self.dir.join(POD_FILE)) {
            Ok(pod) if role == Role::Single => Ok(Role::Member {
                sandbox: Id::new("pod", &pod)?,
            }),
            _ => Ok(role),
        }
    }

    /// The network namespace that the spec names.
    pub fn netns(&self) -> Option<&Path> {
        let namespaces = self.spec.linux.as_ref()?.namespaces.as_ref()?;
        let network = namespaces.iter().find(|n| n.kind == "network")?;
        let path = network.path.as_deref()?;
        (!path.as_os_str().is_empty()).then_some(path)
    }

    /// The pod that the bundle of a [`Role::Single`] or [`Role::Sandbox`] asks
    /// for.
    ///
    /// # Errors
    /// The first value that cannot be.
    pub fn pod_spec(&self, role: &Role) -> Result<PodSpec, BundleError> {
        let annotations = self.annotations();
        let overrides = Overrides::read(&annotations)?;
        let empty = Linux::default();
        let linux = self.spec.linux.as_ref().unwrap_or(&empty);
        let mut namespaces = linux.namespaces.iter().flatten();
        if !namespaces.any(|namespace| namespace.kind == "network") {
            return Err(BundleError::HostNetwork);
        }
        let netns = self.netns().map(Path::to_owned);
        let limits = match role {
            Role::Sandbox => annotation::sandbox_limits(&annotations)?,
            Role::Single | Role::Member { .. } => self.container_limits()?,
        };
        let resources = linux.resources.as_ref();
        let block_io = match role {
            Role::Single => resources.and_then(|r| r.block_io.clone()),
            // One file server serves all containers of a pod.
            Role::Sandbox | Role::Member { .. } => None,
        };
        let sysctls = match role {
            Role::Sandbox => linux.sysctl.clone().unwrap_or_default(),
            // They stay in the container's own spec.
            Role::Single | Role::Member { .. } => BTreeMap::new(),
        };
        Ok(PodSpec {
            hostname: self.spec.hostname.clone().unwrap_or_default(),
            netns,
            sysctls,
            cgroups_path: linux.cgroups_path.clone().filter(|path| !path.is_empty()),
            limits,
            limits_are_a_sum: *role == Role::Sandbox,
            unlimited: Unlimited::default(),
            block_io: block_io.unwrap_or_default(),
            overrides,
            oom_score_adj: self.spec.process.as_ref().and_then(|p| p.oom_score_adj),
            // Which of them do is in their own specs, which come later.
            shared_pid_namespace: *role == Role::Sandbox,
            dns: None,
            id_maps: linux.id_maps(),
        })
    }

    /// Whether it says anything of I/O to disks.
    pub fn limits_io(&self) -> bool {
        let resources = self.spec.linux.as_ref().and_then(|l| l.resources.as_ref());
        let block_io = resources.and_then(|r| r.block_io.as_ref());
        block_io.is_some_and(|io| io.weight().is_some() || !io.throttles().is_empty())
    }

    /// Checks what only matters for a container.
    ///
    /// # Errors
    /// The first value that cannot be.
    pub fn container_limits(&self) -> Result<Limits, BundleError> {
        Overrides::read(&self.annotations())?;
        let resources = self.spec.linux.as_ref().and_then(|l| l.resources.as_ref());
        match resources {
            Some(resources) => resources.limits.limits(),
            None => Ok(Limits::default()),
        }
    }

    /// Directory that is the container's root when containerd gives no mounts.
    ///
    /// # Errors
    /// The spec names none.
    pub fn root(&self) -> Result<PathBuf, BundleError> {
        match &self.spec.root {
            Some(root) if !root.path.as_os_str().is_empty() => Ok(self.dir.join(&root.path)),
            _ => Err(BundleError::NoRoot),
        }
    }

    /// The mounts of the container, in order.
    pub fn mounts(&self) -> &[Mount] {
        self.spec.mounts.as_deref().unwrap_or_default()
    }

    /// The devices of the container, in order.
    pub fn devices(&self) -> &[Device] {
        let linux = self.spec.linux.as_ref();
        linux
            .and_then(|linux| linux.devices.as_deref())
            .unwrap_or_default()
    }

    /// Leaves only those devices, by their places, to the guest.
    pub fn keep_devices(&mut self, places: &[usize]) {
        if let Some(Value::Array(list)) = self.json.pointer_mut("/linux/devices") {
            let kept = places.iter().filter_map(|place| list.get(*place).cloned());
            *list = kept.collect();
        }
    }

    /// The rules about devices, in order.
    pub fn device_rules(&self) -> &[DeviceRule] {
        let linux = self.spec.linux.as_ref();
        linux
            .and_then(|linux| linux.resources.as_ref()?.devices.as_deref())
            .unwrap_or_default()
    }

    /// The PID namespace of somebody else's that the container joins.
    pub fn joined_pids(&self) -> Option<&Path> {
        let namespaces = self.spec.linux.as_ref()?.namespaces.as_ref()?;
        let of_pids = namespaces
            .iter()
            .find(|namespace| namespace.kind == "pid")?;
        let path = of_pids.path.as_deref()?;
        (!path.as_os_str().is_empty()).then_some(path)
    }

    /// The process by which the spec names it.
    pub fn joined_pid(&self) -> Option<u32> {
        let path = self.joined_pids()?.to_str()?;
        let number = path.strip_prefix("/proc/")?.strip_suffix("/ns/pid")?;
        number.parse().ok()
    }

    /// Names that namespace by the container whose it is, as the guest knows it.
    pub fn join_processes_of(&mut self, container: &str) {
        let namespaces = self.json.pointer_mut("/linux/namespaces");
        let namespaces = namespaces.and_then(Value::as_array_mut);
        let namespaces = namespaces.into_iter().flatten();
        for namespace in namespaces.filter_map(Value::as_object_mut) {
            if namespace.get("type").is_some_and(|kind| kind == "pid") {
                let path = format!("{}/{container}", path::CONTAINERS);
                namespace.insert("path".to_owned(), path.into());
            }
        }
    }

    /// The spec as the agent gets it: guest paths for the root and for those
    /// mounts that have an entry in `sources`, binds of guest paths added, and
    /// nothing that only makes sense on the host.
    pub fn guest_spec(
        &self,
        root: &str,
        sources: &BTreeMap<usize, String>,
        binds: &[(&str, String)],
    ) -> Vec<u8> {
        let mut json = self.json.clone();
        let Some(spec) = json.as_object_mut() else {
            return Vec::new();
        };
        match spec.get_mut("root").and_then(Value::as_object_mut) {
            Some(found) => found.insert("path".to_owned(), root.into()),
            None => spec.insert("root".to_owned(), json!({"path": root})),
        };
        for (index, source) in sources {
            let mount = spec
                .get_mut("mounts")
                .and_then(|mounts| mounts.get_mut(*index));
            if let Some(mount) = mount.and_then(Value::as_object_mut) {
                mount.insert("source".to_owned(), source.as_str().into());
                // What is shown to the guest is mapped.
                mount.remove("uidMappings");
                mount.remove("gidMappings");
                if let Some(options) = mount.get_mut("options").and_then(Value::as_array_mut) {
                    options.retain(|option| !MAP_OPTIONS.iter().any(|map| option == map));
                }
            }
        }
        // Programs of the node's stay here.
        if let Some(hooks) = spec.get_mut("hooks").and_then(Value::as_object_mut) {
            hooks.retain(|turn, _| turn == "startContainer");
        }
        if !binds.is_empty() {
            let mounts = spec.entry("mounts").or_insert_with(|| json!([]));
            if let Some(mounts) = mounts.as_array_mut() {
                mounts.extend(binds.iter().map(|(destination, source)| {
                    let options = ["rbind", "rprivate"];
                    json!({
                        "destination": destination, "type": "bind",
                        "source": source, "options": options,
                    })
                }));
            }
        }
        json.to_string().into_bytes()
    }

    /// What the node runs at the turns of the container's life.
    pub fn hooks(&self, id: &Id) -> ContainerHooks {
        ContainerHooks::new(
            self.spec.hooks.clone().unwrap_or_default(),
            &self.spec.oci_version,
            id.as_str(),
            &self.dir,
            &self.annotations(),
        )
    }

    /// The pod's id as Kubernetes knows it.
    pub fn pod_uid(&self) -> Option<String> {
        annotation::pod_uid(&self.annotations())
    }

    fn annotations(&self) -> BTreeMap<String, String> {
        self.spec.annotations.clone().unwrap_or_default()
    }
}

impl Spec {
    /// A mount that is to be mapped and does not say how is as the container is.
    fn complete_mounts(&mut self) {
        let Some(maps) = self.linux.as_ref().and_then(Linux::id_maps) else {
            return;
        };
        for mount in self.mounts.iter_mut().flatten() {
            if mount.has_any(&MAP_OPTIONS) && mount.id_maps().is_none() {
                mount.users = Some(maps.users.clone());
                mount.groups = Some(maps.groups.clone());
            }
        }
    }
}

impl Mount {
    /// How the owners of its files appear, if not as they are.
    pub fn id_maps(&self) -> Option<IdMaps> {
        let ranges = |ranges: &Option<Vec<IdRange>>| ranges.clone().unwrap_or_default();
        IdMaps::new(&ranges(&self.users), &ranges(&self.groups))
    }

    /// Whether one of these is among its options.
    pub fn has_any(&self, names: &[&str]) -> bool {
        let mut options = self.options.iter().flatten();
        options.any(|option| names.contains(&option.as_str()))
    }
}

impl Linux {
    /// The maps of the user namespace, if there is one.
    fn id_maps(&self) -> Option<IdMaps> {
        let mut namespaces = self.namespaces.iter().flatten();
        let has_one = namespaces.any(|namespace| namespace.kind == "user");
        let ranges = |ranges: &Option<Vec<IdRange>>| ranges.clone().unwrap_or_default();
        has_one.then(|| IdMaps::new(&ranges(&self.users), &ranges(&self.groups)))?
    }
}

/// Refuses arrays where OCI has objects: serde takes one for a struct, its fields in
/// order, and the guest's copy would be no such thing.
fn check_objects(json: &Value) -> Result<(), serde_json::Error> {
    let check = |value: &Value, path: &str| match value {
        Value::Array(_) => Err(serde::de::Error::custom(format!("{path} is an array"))),
        _ => Ok(()),
    };
    check(json, "the spec")?;
    for path in ["/root", "/process", "/hooks", "/linux", "/linux/resources"] {
        json.pointer(path).map_or(Ok(()), |one| check(one, path))?;
    }
    for path in [
        "/mounts",
        "/linux/namespaces",
        "/linux/devices",
        "/linux/resources/devices",
    ] {
        let list = json.pointer(path).and_then(Value::as_array);
        for (index, one) in list.into_iter().flatten().enumerate() {
            check(one, &format!("{path}/{index}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
