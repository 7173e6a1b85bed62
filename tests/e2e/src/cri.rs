//! A client of containerd's CRI, blocking, with a deadline on every call.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::runtime::{self, Runtime};
use tonic::transport::{Channel, Endpoint, Uri};

/// Messages and client generated from `proto/cri.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod api {
    tonic::include_proto!("runtime.v1");
}

use api::runtime_service_client::RuntimeServiceClient;

/// One connection to the CRI.
pub struct Cri {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
    deadline: Duration,
}

/// Calls the RPC `$method` and waits for its answer.
macro_rules! call {
    ($self:ident, $method:ident, $request:expr) => {{
        let (request, mut client) = ($request, $self.client.clone());
        $self.runtime.block_on(async {
            let answer = tokio::time::timeout($self.deadline, client.$method(request)).await;
            let answer = answer.with_context(|| {
                format!(
                    "{} not answered within {:?}",
                    stringify!($method),
                    $self.deadline
                )
            })?;
            // The message alone: a status' Debug form hides it in headers.
            answer.map(tonic::Response::into_inner).map_err(|status| {
                Refused {
                    call: stringify!($method),
                    code: status.code(),
                    message: status.message().to_owned(),
                }
                .into()
            })
        })
    }};
}

/// Connects to a gRPC socket.
pub fn dial(path: PathBuf) -> Result<(Runtime, Channel)> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // The address is only a name: every connection goes to the socket.
    let endpoint = Endpoint::from_static("http://containerd.socket");
    let channel = runtime.block_on(endpoint.connect_with_connector(tower::service_fn(
        move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        },
    )))?;
    Ok((runtime, channel))
}

/// An error that the CRI answered with.
#[derive(Debug)]
pub struct Refused {
    /// The RPC.
    pub call: &'static str,
    /// gRPC's code.
    pub code: tonic::Code,
    /// What containerd says.
    pub message: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "{}: {:?}: {}",
            self.call, self.code, self.message
        )
    }
}

impl std::error::Error for Refused {}

impl Cri {
    /// Connects to the socket at `path`.
    pub fn connect(path: PathBuf, deadline: Duration) -> Result<Self> {
        let (runtime, channel) = dial(path)?;
        Ok(Self {
            runtime,
            client: RuntimeServiceClient::new(channel),
            deadline,
        })
    }

    /// containerd's name and version.
    pub fn version(&self) -> Result<api::VersionResponse> {
        call!(self, version, api::VersionRequest::default())
    }

    /// The runtime's conditions and, verbosely, its configuration.
    pub fn status(&self) -> Result<api::StatusResponse> {
        call!(self, status, api::StatusRequest { verbose: true })
    }

    /// Starts a pod; returns its id.
    pub fn run_pod(&self, config: &api::PodSandboxConfig, handler: &str) -> Result<String> {
        let request = api::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let answer: Result<api::RunPodSandboxResponse> = call!(self, run_pod_sandbox, request);
        Ok(answer?.pod_sandbox_id)
    }

    /// Stops a pod with all its containers.
    pub fn stop_pod(&self, pod: &str) -> Result<()> {
        let request = api::StopPodSandboxRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        let answer: Result<api::StopPodSandboxResponse> = call!(self, stop_pod_sandbox, request);
        answer.map(drop)
    }

    /// Removes a pod with all its containers.
    pub fn remove_pod(&self, pod: &str) -> Result<()> {
        let request = api::RemovePodSandboxRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        let answer: Result<api::RemovePodSandboxResponse> =
            call!(self, remove_pod_sandbox, request);
        answer.map(drop)
    }

    /// A pod's status.
    pub fn pod_status(&self, pod: &str) -> Result<api::PodSandboxStatus> {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: pod.to_owned(),
            verbose: false,
        };
        let answer: Result<api::PodSandboxStatusResponse> =
            call!(self, pod_sandbox_status, request);
        answer?.status.context("a pod status without status")
    }

    /// Pods with all of `labels`.
    pub fn pods(&self, labels: &[(&str, &str)]) -> Result<Vec<api::PodSandbox>> {
        let filter = api::PodSandboxFilter {
            label_selector: labels
                .iter()
                .map(|(key, value)| ((*key).into(), (*value).into()))
                .collect(),
            ..Default::default()
        };
        let request = api::ListPodSandboxRequest {
            filter: Some(filter),
        };
        let answer: Result<api::ListPodSandboxResponse> = call!(self, list_pod_sandbox, request);
        Ok(answer?.items)
    }

    /// A pod's statistics.
    pub fn pod_stats(&self, pod: &str) -> Result<api::PodSandboxStats> {
        let request = api::PodSandboxStatsRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        let answer: Result<api::PodSandboxStatsResponse> = call!(self, pod_sandbox_stats, request);
        answer?.stats.context("an answer without statistics")
    }

    /// Creates a container in a pod; returns its id.
    pub fn create(
        &self,
        pod: &str,
        config: &api::ContainerConfig,
        pod_config: &api::PodSandboxConfig,
    ) -> Result<String> {
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(pod_config.clone()),
        };
        let answer: Result<api::CreateContainerResponse> = call!(self, create_container, request);
        Ok(answer?.container_id)
    }

    /// Starts a created container.
    pub fn start(&self, container: &str) -> Result<()> {
        let request = api::StartContainerRequest {
            container_id: container.to_owned(),
        };
        let answer: Result<api::StartContainerResponse> = call!(self, start_container, request);
        answer.map(drop)
    }

    /// Stops a container: SIGTERM, `grace_seconds`, SIGKILL.
    pub fn stop(&self, container: &str, grace_seconds: i64) -> Result<()> {
        let request = api::StopContainerRequest {
            container_id: container.to_owned(),
            timeout: grace_seconds,
        };
        let answer: Result<api::StopContainerResponse> = call!(self, stop_container, request);
        answer.map(drop)
    }

    /// Removes a container.
    pub fn remove(&self, container: &str) -> Result<()> {
        let request = api::RemoveContainerRequest {
            container_id: container.to_owned(),
        };
        let answer: Result<api::RemoveContainerResponse> = call!(self, remove_container, request);
        answer.map(drop)
    }

    /// Containers of a pod.
    pub fn containers(&self, pod: &str) -> Result<Vec<api::Container>> {
        let filter = api::ContainerFilter {
            pod_sandbox_id: pod.to_owned(),
            ..Default::default()
        };
        let request = api::ListContainersRequest {
            filter: Some(filter),
        };
        let answer: Result<api::ListContainersResponse> = call!(self, list_containers, request);
        Ok(answer?.containers)
    }

    /// A container's status.
    pub fn container_status(&self, container: &str) -> Result<api::ContainerStatus> {
        let request = api::ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        let answer: Result<api::ContainerStatusResponse> = call!(self, container_status, request);
        answer?.status.context("a container status without status")
    }

    /// A container's statistics.
    pub fn container_stats(&self, container: &str) -> Result<api::ContainerStats> {
        let request = api::ContainerStatsRequest {
            container_id: container.to_owned(),
        };
        let answer: Result<api::ContainerStatsResponse> = call!(self, container_stats, request);
        answer?.stats.context("an answer without statistics")
    }

    /// Changes a container's limits.
    pub fn update(&self, container: &str, resources: api::LinuxContainerResources) -> Result<()> {
        let request = api::UpdateContainerResourcesRequest {
            container_id: container.to_owned(),
            linux: Some(resources),
        };
        let answer: Result<api::UpdateContainerResourcesResponse> =
            call!(self, update_container_resources, request);
        answer.map(drop)
    }

    /// Tells containerd that a log file was rotated.
    pub fn reopen_log(&self, container: &str) -> Result<()> {
        let request = api::ReopenContainerLogRequest {
            container_id: container.to_owned(),
        };
        let answer: Result<api::ReopenContainerLogResponse> =
            call!(self, reopen_container_log, request);
        answer.map(drop)
    }

    /// Runs a command in a container to its end.
    pub fn exec_sync(
        &self,
        container: &str,
        command: &[&str],
        timeout_seconds: i64,
    ) -> Result<Executed> {
        let request = api::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.into()).collect(),
            timeout: timeout_seconds,
        };
        let answer: Result<api::ExecSyncResponse> = call!(self, exec_sync, request);
        let answer = answer?;
        Ok(Executed {
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
            code: answer.exit_code,
        })
    }

    /// URL of a command's streams.
    pub fn exec_url(&self, container: &str, command: &[&str], tty: bool) -> Result<String> {
        let request = api::ExecRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.into()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let answer: Result<api::ExecResponse> = call!(self, exec, request);
        Ok(answer?.url)
    }

    /// URL of a container's own streams.
    pub fn attach_url(&self, container: &str, tty: bool) -> Result<String> {
        let request = api::AttachRequest {
            container_id: container.to_owned(),
            stdin: true,
            tty,
            stdout: true,
            stderr: !tty,
        };
        let answer: Result<api::AttachResponse> = call!(self, attach, request);
        Ok(answer?.url)
    }

    /// URL of connections to a port of the pod's localhost.
    pub fn port_forward_url(&self, pod: &str, port: u16) -> Result<String> {
        let request = api::PortForwardRequest {
            pod_sandbox_id: pod.to_owned(),
            port: vec![port.into()],
        };
        let answer: Result<api::PortForwardResponse> = call!(self, port_forward, request);
        Ok(answer?.url)
    }
}

/// What a command run by ExecSync left.
#[derive(Debug)]
pub struct Executed {
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Its exit code.
    pub code: i32,
}

impl Executed {
    /// Its output, trimmed, if it exited with 0.
    pub fn ok(self) -> Result<String> {
        anyhow::ensure!(
            self.code == 0,
            "exit code {}: {}{}",
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self.stdout.trim().to_owned())
    }
}
