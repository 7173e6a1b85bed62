//! Annotations: which pod a container belongs to, and what operators say about
//! the machine.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use husk_node::config::key::{self, Kind};
use husk_node::rates::Rates;
use husk_vmm_spec::{MEMORY_MAX_MIB, VCPU_MAX};

use super::{BundleError, Limits, Role};
use crate::id::Id;

/// Keys that are ours begin so.
const PREFIX: &str = "io.husk.";

/// Before a key of the configuration that a pod may have otherwise.
const KEY_PREFIX: &str = "io.husk.vm.";

const VCPUS: &str = "io.husk.vm.vcpus";
const MEMORY_MIB: &str = "io.husk.vm.memory_mib";

/// Least memory that a machine with a workload gets along with, MiB.
const MEMORY_MIN_MIB: u32 = 64;

/// The annotations that tell the role, as containerd and CRI-O spell them.
const ROLES: [(&str, &str); 2] = [
    (
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
    ),
    (
        "io.kubernetes.cri-o.ContainerType",
        "io.kubernetes.cri-o.SandboxID",
    ),
];

/// The annotations with the pod's id in Kubernetes.
const POD_UIDS: [&str; 2] = ["io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid"];

/// What the operator said about the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// vCPUs.
    pub vcpus: Option<u8>,
    /// Memory of the guest, MiB.
    pub memory_mib: Option<u32>,
    /// What disks and interfaces may move.
    pub rates: Rates,
}

/// An annotation that cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// No annotation of ours has this key.
    #[error(
        "annotation {0} is not known; known are {VCPUS}, {MEMORY_MIB}, and {KEY_PREFIX} before a key of the configuration that limits disks or networks"
    )]
    Unknown(String),
    /// A value that is no number in the range.
    #[error("annotation {key} is {value:?}; it must be a number from {least} to {most}")]
    Number {
        /// The annotation.
        key: String,
        /// As given.
        value: String,
        /// Least that may be.
        least: u64,
        /// Most that may be.
        most: u64,
    },
    /// A number of containerd's that is none.
    #[error("annotation {key} is {value:?}, which is no number")]
    NoNumber {
        /// The annotation.
        key: &'static str,
        /// As given.
        value: String,
    },
}

impl Overrides {
    /// Reads our annotations.
    ///
    /// # Errors
    /// The first that is not known or cannot be.
    pub fn read(annotations: &BTreeMap<String, String>) -> Result<Self, AnnotationError> {
        let mut overrides = Self::default();
        for (key, value) in annotations
            .iter()
            .filter(|(key, _)| key.starts_with(PREFIX))
        {
            match key.as_str() {
                VCPUS => overrides.vcpus = Some(number(VCPUS, value, 1..=VCPU_MAX)?),
                MEMORY_MIB => {
                    let range = MEMORY_MIN_MIB..=MEMORY_MAX_MIB;
                    overrides.memory_mib = Some(number(MEMORY_MIB, value, range)?);
                }
                _ => overrides.read_rate(key, value)?,
            }
        }
        Ok(overrides)
    }

    fn read_rate(&mut self, annotation: &str, value: &str) -> Result<(), AnnotationError> {
        let unknown = || AnnotationError::Unknown(annotation.to_owned());
        let name = annotation.strip_prefix(KEY_PREFIX).ok_or_else(unknown)?;
        let place = self.rates.named(name).ok_or_else(unknown)?;
        let Some(Kind::Number { least, most, .. }) = key::find(name).map(|key| key.kind) else {
            return Err(unknown());
        };
        *place = Some(number(annotation, value, least..=most)?);
        Ok(())
    }
}

/// What a bundle with these annotations stands for.
pub(super) fn role(annotations: &BTreeMap<String, String>) -> Result<Role, BundleError> {
    for (kind, sandbox) in ROLES {
        match annotations.get(kind).map(String::as_str) {
            Some("sandbox") => return Ok(Role::Sandbox),
            Some("container") => {
                let id = annotations
                    .get(sandbox)
                    .ok_or(BundleError::NoSandboxId(sandbox))?;
                return Ok(Role::Member {
                    sandbox: Id::new("sandbox id", id)?,
                });
            }
            _ => {}
        }
    }
    Ok(Role::Single)
}

/// The pod's id in Kubernetes.
pub(super) fn pod_uid(annotations: &BTreeMap<String, String>) -> Option<String> {
    POD_UIDS
        .iter()
        .find_map(|key| annotations.get(*key))
        .cloned()
}

/// Limits of a whole pod, which containerd writes since 1.7.
pub(super) fn sandbox_limits(
    annotations: &BTreeMap<String, String>,
) -> Result<Limits, BundleError> {
    let quota: Option<i64> = plain(annotations, "io.kubernetes.cri.sandbox-cpu-quota")?;
    let period: Option<u64> = plain(annotations, "io.kubernetes.cri.sandbox-cpu-period")?;
    let memory = plain(annotations, "io.kubernetes.cri.sandbox-memory")?;
    Limits::new(memory, quota, period)
}

fn plain<T: FromStr>(
    annotations: &BTreeMap<String, String>,
    key: &'static str,
) -> Result<Option<T>, AnnotationError> {
    annotations
        .get(key)
        .map(|value| {
            value.parse().map_err(|_| AnnotationError::NoNumber {
                key,
                value: value.clone(),
            })
        })
        .transpose()
}

fn number<T>(key: &str, value: &str, range: RangeInclusive<T>) -> Result<T, AnnotationError>
where
    T: FromStr + PartialOrd + Display + Copy + Into<u64>,
{
    value
        .parse()
        .ok()
        .filter(|number| range.contains(number))
        .ok_or_else(|| AnnotationError::Number {
            key: key.to_owned(),
            value: value.to_owned(),
            least: (*range.start()).into(),
            most: (*range.end()).into(),
        })
}
