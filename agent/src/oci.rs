//! What the agent reads of an OCI runtime spec: the JSON of config.json, field
//! by field as the specification names them. Types of our own, since the
//! library for them carries a regular-expression engine into the guest.
//!
//! Everything that Go writes may be null or missing; both mean nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

fn null_is_none<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    pub oci_version: String,
    pub root: Option<Root>,
    pub process: Option<Process>,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    #[serde(deserialize_with = "null_is_none")]
    pub mounts: Vec<Mount>,
    #[serde(deserialize_with = "null_is_none")]
    pub hooks: Hooks,
    #[serde(deserialize_with = "null_is_none")]
    pub annotations: BTreeMap<String, String>,
    #[serde(deserialize_with = "null_is_none")]
    pub linux: Linux,
}

/// Those of the guest; the others are run on the host.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    #[serde(deserialize_with = "null_is_none")]
    pub start_container: Vec<Hook>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hook {
    pub path: PathBuf,
    #[serde(default, deserialize_with = "null_is_none")]
    pub args: Vec<String>,
    #[serde(default, deserialize_with = "null_is_none")]
    pub env: Vec<String>,
    /// Seconds.
    pub timeout: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Root {
    pub path: PathBuf,
    #[serde(default)]
    pub readonly: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mount {
    pub destination: PathBuf,
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub source: Option<PathBuf>,
    #[serde(default, deserialize_with = "null_is_none")]
    pub options: Vec<String>,
    #[serde(default, deserialize_with = "null_is_none")]
    pub uid_mappings: Vec<IdMapping>,
    #[serde(default, deserialize_with = "null_is_none")]
    pub gid_mappings: Vec<IdMapping>,
}

impl Mount {
    /// Whether it shows what is elsewhere: by its type or by an option.
    pub fn is_bind(&self) -> bool {
        let is_bind = |word: &str| matches!(word, "bind" | "rbind");
        self.kind.as_deref().is_some_and(is_bind)
            || self.options.iter().any(|option| is_bind(option))
    }

    /// Whether its files shall appear with other owners.
    pub fn maps_ids(&self) -> bool {
        let is_map = |option: &String| matches!(option.as_str(), "idmap" | "ridmap");
        !self.uid_mappings.is_empty()
            || !self.gid_mappings.is_empty()
            || self.options.iter().any(is_map)
    }
}

/// A process of a container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    pub console_size: Option<ConsoleSize>,
    #[serde(deserialize_with = "null_is_none")]
    pub user: User,
    #[serde(deserialize_with = "null_is_none")]
    pub args: Vec<String>,
    #[serde(deserialize_with = "null_is_none")]
    pub env: Vec<String>,
    pub cwd: PathBuf,
    pub capabilities: Option<Capabilities>,
    #[serde(deserialize_with = "null_is_none")]
    pub rlimits: Vec<ResourceLimit>,
    pub no_new_privileges: bool,
    pub apparmor_profile: Option<String>,
    pub selinux_label: Option<String>,
    pub oom_score_adj: Option<i32>,
    pub io_priority: Option<IoPriority>,
    pub scheduler: Option<Scheduler>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ConsoleSize {
    pub height: u64,
    pub width: u64,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub umask: Option<u32>,
    #[serde(deserialize_with = "null_is_none")]
    pub additional_gids: Vec<u32>,
}

/// Names such as `CAP_KILL`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    #[serde(deserialize_with = "null_is_none")]
    pub bounding: Vec<String>,
    #[serde(deserialize_with = "null_is_none")]
    pub effective: Vec<String>,
    #[serde(deserialize_with = "null_is_none")]
    pub inheritable: Vec<String>,
    #[serde(deserialize_with = "null_is_none")]
    pub permitted: Vec<String>,
    #[serde(deserialize_with = "null_is_none")]
    pub ambient: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ResourceLimit {
    /// Such as `RLIMIT_NOFILE`.
    #[serde(rename = "type")]
    pub kind: String,
    pub soft: u64,
    pub hard: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct IoPriority {
    /// Such as `IOPRIO_CLASS_BE`.
    pub class: String,
    #[serde(default)]
    pub priority: i64,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Scheduler {
    /// Such as `SCHED_FIFO`.
    pub policy: String,
    pub nice: i32,
    pub priority: i32,
    /// Such as `SCHED_FLAG_RESET_ON_FORK`.
    #[serde(deserialize_with = "null_is_none")]
    pub flags: Vec<String>,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// The part that Linux alone has.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    #[serde(deserialize_with = "null_is_none")]
    pub uid_mappings: Vec<IdMapping>,
    #[serde(deserialize_with = "null_is_none")]
    pub gid_mappings: Vec<IdMapping>,
    #[serde(deserialize_with = "null_is_none")]
    pub sysctl: BTreeMap<String, String>,
    pub resources: Option<Resources>,
    #[serde(deserialize_with = "null_is_none")]
    pub namespaces: Vec<Namespace>,
    #[serde(deserialize_with = "null_is_none")]
    pub devices: Vec<Device>,
    pub seccomp: Option<Seccomp>,
    pub rootfs_propagation: Option<String>,
    #[serde(deserialize_with = "null_is_none")]
    pub masked_paths: Vec<String>,
    #[serde(deserialize_with = "null_is_none")]
    pub readonly_paths: Vec<String>,
    pub personality: Option<Personality>,
    #[serde(deserialize_with = "null_is_none")]
    pub time_offsets: BTreeMap<String, TimeOffset>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    #[serde(rename = "containerID")]
    pub container_id: u32,
    #[serde(rename = "hostID")]
    pub host_id: u32,
    pub size: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceKind {
    Pid,
    Network,
    Mount,
    Ipc,
    Uts,
    User,
    Cgroup,
    Time,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Namespace {
    #[serde(rename = "type")]
    pub kind: NamespaceKind,
    pub path: Option<PathBuf>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    pub path: PathBuf,
    #[serde(rename = "type")]
    pub kind: DeviceKind,
    #[serde(default)]
    pub major: i64,
    #[serde(default)]
    pub minor: i64,
    pub file_mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

impl Device {
    /// As the kernel writes both in one.
    pub fn number(&self) -> u64 {
        device_number(self.major, self.minor)
    }
}

fn device_number(major: i64, minor: i64) -> u64 {
    let half = |number: i64| u32::try_from(number).unwrap_or(0);
    rustix::fs::makedev(half(major), half(minor))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// Of rules only.
    #[serde(rename = "a")]
    All,
    #[serde(rename = "b")]
    Block,
    #[serde(rename = "c", alias = "u")]
    Character,
    #[serde(rename = "p")]
    Pipe,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Personality {
    pub domain: PersonalityDomain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum PersonalityDomain {
    Linux,
    Linux32,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TimeOffset {
    pub secs: i64,
    pub nanosecs: u32,
}

/// Limits.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    #[serde(deserialize_with = "null_is_none")]
    pub devices: Vec<DeviceRule>,
    #[serde(deserialize_with = "null_is_none")]
    pub memory: Memory,
    #[serde(deserialize_with = "null_is_none")]
    pub cpu: Cpu,
    #[serde(deserialize_with = "null_is_none")]
    pub pids: Pids,
    #[serde(rename = "blockIO", deserialize_with = "null_is_none")]
    pub block_io: BlockIo,
    #[serde(deserialize_with = "null_is_none")]
    pub hugepage_limits: Vec<HugepageLimit>,
    #[serde(deserialize_with = "null_is_none")]
    pub unified: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeviceRule {
    pub allow: bool,
    /// Missing is all.
    #[serde(rename = "type")]
    pub kind: Option<DeviceKind>,
    pub major: Option<i64>,
    pub minor: Option<i64>,
    pub access: Option<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    pub limit: Option<i64>,
    pub reservation: Option<i64>,
    pub swap: Option<i64>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpu {
    pub shares: Option<u64>,
    pub quota: Option<i64>,
    pub burst: Option<u64>,
    pub period: Option<u64>,
    pub idle: Option<i64>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Pids {
    pub limit: Option<i64>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BlockIo {
    pub weight: Option<u16>,
    #[serde(deserialize_with = "null_is_none")]
    pub throttle_read_bps_device: Vec<Throttle>,
    #[serde(deserialize_with = "null_is_none")]
    pub throttle_write_bps_device: Vec<Throttle>,
    #[serde(rename = "throttleReadIOPSDevice", deserialize_with = "null_is_none")]
    pub throttle_read_iops_device: Vec<Throttle>,
    #[serde(rename = "throttleWriteIOPSDevice", deserialize_with = "null_is_none")]
    pub throttle_write_iops_device: Vec<Throttle>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Throttle {
    pub major: i64,
    pub minor: i64,
    pub rate: u64,
}

impl Throttle {
    /// As the kernel writes both in one.
    pub fn number(&self) -> u64 {
        device_number(self.major, self.minor)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HugepageLimit {
    pub page_size: String,
    /// Go writes the largest unsigned number for none.
    pub limit: u64,
}

/// A system call filter.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Seccomp {
    pub default_action: SeccompAction,
    pub default_errno_ret: Option<u32>,
    /// Such as `SCMP_ARCH_X86_64`.
    #[serde(default, deserialize_with = "null_is_none")]
    pub architectures: Vec<String>,
    /// Such as `SECCOMP_FILTER_FLAG_LOG`.
    #[serde(default, deserialize_with = "null_is_none")]
    pub flags: Vec<String>,
    #[serde(default, deserialize_with = "null_is_none")]
    pub syscalls: Vec<SeccompRule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompAction {
    #[serde(rename = "SCMP_ACT_KILL")]
    Kill,
    #[serde(rename = "SCMP_ACT_KILL_THREAD")]
    KillThread,
    #[serde(rename = "SCMP_ACT_KILL_PROCESS")]
    KillProcess,
    #[serde(rename = "SCMP_ACT_TRAP")]
    Trap,
    #[serde(rename = "SCMP_ACT_ERRNO")]
    Errno,
    #[serde(rename = "SCMP_ACT_TRACE")]
    Trace,
    #[serde(rename = "SCMP_ACT_LOG")]
    Log,
    #[serde(rename = "SCMP_ACT_ALLOW")]
    Allow,
    #[serde(rename = "SCMP_ACT_NOTIFY")]
    Notify,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeccompRule {
    pub names: Vec<String>,
    pub action: SeccompAction,
    pub errno_ret: Option<u32>,
    #[serde(default, deserialize_with = "null_is_none")]
    pub args: Vec<SeccompArgument>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeccompArgument {
    pub index: u32,
    pub value: u64,
    #[serde(default)]
    pub value_two: u64,
    pub op: SeccompOperator,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompOperator {
    #[serde(rename = "SCMP_CMP_NE")]
    NotEqual,
    #[serde(rename = "SCMP_CMP_LT")]
    Less,
    #[serde(rename = "SCMP_CMP_LE")]
    LessOrEqual,
    #[serde(rename = "SCMP_CMP_EQ")]
    Equal,
    #[serde(rename = "SCMP_CMP_GE")]
    GreaterOrEqual,
    #[serde(rename = "SCMP_CMP_GT")]
    Greater,
    #[serde(rename = "SCMP_CMP_MASKED_EQ")]
    MaskedEqual,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_go_leaves_out_or_nulls_is_nothing() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.1.0","mounts":null,"linux":null,"annotations":{"a":"b"},
                "process":{"cwd":"/","args":null,"user":{"uid":1,"gid":2,"additionalGids":null}}}"#,
        )
        .unwrap();
        assert!(spec.mounts.is_empty() && spec.linux.namespaces.is_empty());
        let process = spec.process.unwrap();
        assert!(process.args.is_empty() && process.capabilities.is_none());
        assert_eq!((process.user.uid, process.user.gid), (1, 2));
        let resources: Resources =
            serde_json::from_str(r#"{"memory":null,"cpu":{"shares":2},"pids":null}"#).unwrap();
        assert_eq!(resources.cpu.shares, Some(2));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for json in [
            r#"{"linux":{"namespaces":[{"type":"dream"}]}}"#,
            r#"{"linux":{"seccomp":{"defaultAction":"SCMP_ACT_MAYBE"}}}"#,
            r#"{"process":{"user":{"uid":-1,"gid":0}}}"#,
            r#"{"linux":{"personality":{"domain":"AMIGA"}}}"#,
            r#"{"linux":{"resources":{"devices":[{"allow":true,"type":"x"}]}}}"#,
        ] {
            assert!(serde_json::from_str::<Spec>(json).is_err(), "{json}");
        }
    }
}
