//! A pod that a case drives through the CRI.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::case::Bench;
use crate::cri::Cri;
use crate::cri::api::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatus, ImageSpec,
    LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata,
};
use crate::process::eventually;

/// The kubelet's default: each container sees its own processes.
fn own_processes() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    }
}

/// A pod and what it was made from.
pub struct Pod<'a> {
    /// The CRI's id.
    pub id: String,
    /// As given to the CRI.
    pub config: PodSandboxConfig,
    bench: &'a Bench,
}

impl<'a> Pod<'a> {
    /// Starts a pod whose configuration `change` may alter.
    pub fn run(
        bench: &'a Bench,
        cri: &Cri,
        change: impl FnOnce(&mut PodSandboxConfig),
    ) -> Result<Self> {
        Self::run_as(bench, cri, bench.runtime.name(), change)
    }

    /// The same with a handler by its name in the node's configuration.
    pub fn run_as(
        bench: &'a Bench,
        cri: &Cri,
        handler: &str,
        change: impl FnOnce(&mut PodSandboxConfig),
    ) -> Result<Self> {
        let name = bench.id();
        let folder = bench.folder().join(&name);
        fs::create_dir_all(&folder)?;
        let mut config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.clone(),
                uid: name.clone(),
                namespace: "e2e".into(),
                attempt: 0,
            }),
            hostname: "a-pod".into(),
            log_directory: folder.display().to_string(),
            labels: [("case".to_owned(), name)].into(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(own_processes()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let id = cri.run_pod(&config, handler)?;
        Ok(Self { id, config, bench })
    }

    /// The configuration of a container of the test image.
    pub fn container(&self, command: &[&str]) -> ContainerConfig {
        let name = self.bench.id();
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.clone(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: crate::image::BASE.into(),
                ..Default::default()
            }),
            command: command.iter().map(|&word| word.into()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(own_processes()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Creates and starts a container of a configuration; returns its id.
    pub fn start_config(&self, cri: &Cri, config: &ContainerConfig) -> Result<String> {
        let id = cri.create(&self.id, config, &self.config)?;
        cri.start(&id)?;
        Ok(id)
    }

    /// Creates and starts a container; returns its id.
    pub fn start(&self, cri: &Cri, command: &[&str]) -> Result<String> {
        self.start_config(cri, &self.container(command))
    }

    /// File of a container's log.
    pub fn log_file(&self, cri: &Cri, container: &str) -> Result<PathBuf> {
        Ok(cri.container_status(container)?.log_path.into())
    }

    /// Waits until the container's log holds `wanted`; returns its text.
    pub fn await_log(&self, cri: &Cri, container: &str, wanted: &str) -> Result<String> {
        let file = self.log_file(cri, container)?;
        let read = || fs::read_to_string(&file).unwrap_or_default();
        eventually(
            &format!("{wanted:?} in the log"),
            self.bench.seconds(15),
            || {
                let text = read();
                Ok(text.contains(wanted).then_some(text))
            },
        )
        .with_context(|| format!("log: {}", read()))
    }

    /// Waits until the container has exited; returns its status.
    pub fn await_exit(&self, cri: &Cri, container: &str) -> Result<ContainerStatus> {
        eventually("the container exits", self.bench.seconds(15), || {
            let status = cri.container_status(container)?;
            Ok((status.state() == ContainerState::ContainerExited).then_some(status))
        })
    }

    /// Stops and removes the pod.
    pub fn remove(&self, cri: &Cri) -> Result<()> {
        cri.stop_pod(&self.id)?;
        cri.remove_pod(&self.id)
    }
}
