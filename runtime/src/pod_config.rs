//! The pod's configuration as CRI writes it, which containerd's Sandbox API
//! carries opaquely.

use containerd_shim_protos::protobuf::{Error as WireError, Message};

use crate::bundle::{BundleError, Dns, Limits, PodSpec};

use crate::id_map::{IdMaps, IdRange};

use generated::pod_config::{
    IDMapping, LinuxContainerResources, LinuxPodSandboxConfig, NamespaceMode, PodSandboxConfig,
};

#[allow(
    missing_docs,
    unused_mut,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

/// What CRI calls the scope of a cgroup.
const SCOPE_PREFIX: &str = "cri-containerd";

/// A message that is none, or says what cannot be.
#[derive(Debug, thiserror::Error)]
pub enum PodConfigError {
    /// It is no PodSandboxConfig.
    #[error("the sandbox's options are no PodSandboxConfig")]
    Wire(#[from] WireError),
    /// A value that cannot be.
    #[error(transparent)]
    Value(#[from] BundleError),
}

/// Reads the configuration of the pod `id`. Its network comes beside it. Its
/// annotations say nothing about the machine: here they come from whoever may
/// create pods, where a bundle has only those that the operator lets through.
///
/// # Errors
/// It is none, or asks for what cannot be.
pub fn read(message: &[u8], id: &str) -> Result<PodSpec, PodConfigError> {
    let config = PodSandboxConfig::parse_from_bytes(message)?;
    let linux = config.linux.unwrap_or_default();
    let dns = config.dns_config.unwrap_or_default();
    Ok(PodSpec {
        hostname: config.hostname,
        id_maps: id_maps(&linux),
        sysctls: linux.sysctls.into_iter().collect(),
        cgroups_path: cgroups_path(&linux.cgroup_parent, id),
        limits: limits(&linux.resources.unwrap_or_default())?,
        limits_are_a_sum: true,
        shared_pid_namespace: true,
        dns: Some(Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        ..PodSpec::default()
    })
}

fn id_maps(linux: &LinuxPodSandboxConfig) -> Option<IdMaps> {
    let options = &linux.security_context.namespace_options.userns_options;
    let of_pod = options.is_some() && options.mode == NamespaceMode::POD.into();
    let ranges = |mappings: &[IDMapping]| {
        let range = |mapping: &IDMapping| IdRange {
            inside: mapping.container_id,
            outside: mapping.host_id,
            size: mapping.length,
        };
        mappings.iter().map(range).collect::<Vec<_>>()
    };
    of_pod.then(|| IdMaps::new(&ranges(&options.uids), &ranges(&options.gids)))?
}

fn limits(resources: &LinuxContainerResources) -> Result<Limits, BundleError> {
    Limits::new(
        Some(resources.memory_limit_in_bytes),
        Some(resources.cpu_quota),
        u64::try_from(resources.cpu_period).ok(),
    )
}

/// Below the pod's, in the form that its parent has.
fn cgroups_path(parent: &str, id: &str) -> Option<String> {
    if parent.is_empty() {
        None
    } else if parent.ends_with(".slice") {
        let slice = parent.rsplit('/').next().unwrap_or(parent);
        Some(format!("{slice}:{SCOPE_PREFIX}:{id}"))
    } else {
        Some(format!("{parent}/{id}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Overrides;
    use generated::pod_config::{DNSConfig, LinuxPodSandboxConfig};
    use protobuf::MessageField;

    #[test]
    fn reads_what_a_machine_is_made_from() {
        let config = PodSandboxConfig {
            hostname: "h".into(),
            dns_config: MessageField::some(DNSConfig {
                servers: vec!["10.0.0.10".into()],
                ..DNSConfig::default()
            }),
            linux: MessageField::some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods.slice/kubepods-podx.slice".into(),
                resources: MessageField::some(LinuxContainerResources {
                    cpu_period: 100_000,
                    cpu_quota: 150_000,
                    memory_limit_in_bytes: 64 << 20,
                    ..LinuxContainerResources::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        let pod = read(&config.write_to_bytes().unwrap(), "p").unwrap();
        assert_eq!(pod.hostname, "h");
        assert_eq!(pod.dns.unwrap().servers, ["10.0.0.10"]);
        assert_eq!(
            pod.cgroups_path.as_deref(),
            Some("kubepods-podx.slice:cri-containerd:p")
        );
        assert_eq!(pod.limits.cpu_millis, Some(1500));
        assert_eq!(pod.limits.memory_bytes, Some(64 << 20));
    }

    #[test]
    fn reads_whom_the_pods_users_are() {
        use generated::pod_config::{LinuxSandboxSecurityContext, NamespaceOption, UserNamespace};
        let mapping = IDMapping {
            host_id: 100_000,
            length: 65_536,
            ..IDMapping::default()
        };
        let read_mode = |mode: NamespaceMode| {
            let options = UserNamespace {
                mode: mode.into(),
                uids: vec![mapping.clone()],
                gids: vec![mapping.clone()],
                ..UserNamespace::default()
            };
            let namespaces = NamespaceOption {
                userns_options: MessageField::some(options),
                ..NamespaceOption::default()
            };
            let security = LinuxSandboxSecurityContext {
                namespace_options: MessageField::some(namespaces),
                ..LinuxSandboxSecurityContext::default()
            };
            let linux = LinuxPodSandboxConfig {
                security_context: MessageField::some(security),
                ..LinuxPodSandboxConfig::default()
            };
            let config = PodSandboxConfig {
                linux: MessageField::some(linux),
                ..PodSandboxConfig::default()
            };
            let pod = read(&config.write_to_bytes().unwrap(), "p").unwrap();
            pod.id_maps.and_then(|maps| maps.root())
        };
        assert_eq!(read_mode(NamespaceMode::POD), Some((100_000, 100_000)));
        assert_eq!(read_mode(NamespaceMode::NODE), None);
    }

    #[test]
    fn refuses_what_is_none() {
        assert!(matches!(read(&[0xff], "p"), Err(PodConfigError::Wire(_))));
    }

    #[test]
    fn lets_no_tenant_size_the_machine() {
        let config = PodSandboxConfig {
            annotations: [("io.husk.vm.vcpus".into(), "64".into())].into(),
            ..PodSandboxConfig::default()
        };
        let pod = read(&config.write_to_bytes().unwrap(), "p").unwrap();
        assert_eq!(pod.overrides, Overrides::default());
    }
}
