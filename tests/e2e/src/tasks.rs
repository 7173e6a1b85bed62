//! containerd's task service, asked directly.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use tokio::runtime::Runtime;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Channel;

use crate::cri;
use crate::node::NAMESPACE;

/// Messages and client generated from `proto/tasks.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod api {
    tonic::include_proto!("containerd.services.tasks.v1");
}

use api::tasks_client::TasksClient;

/// One connection to the task service.
pub struct Tasks {
    runtime: Runtime,
    client: TasksClient<Channel>,
    deadline: Duration,
}

/// Calls the RPC `$method` in the cases' namespace and waits for its answer.
macro_rules! call {
    ($self:ident, $method:ident, $request:expr) => {{
        let mut request = tonic::Request::new($request);
        request.metadata_mut().insert(
            "containerd-namespace",
            AsciiMetadataValue::from_static(NAMESPACE),
        );
        let mut client = $self.client.clone();
        let answer = $self.runtime.block_on(async {
            tokio::time::timeout($self.deadline, client.$method(request)).await
        })?;
        let answer = answer.map(tonic::Response::into_inner);
        answer.map_err(|status| {
            anyhow::anyhow!("{} of a task: {}", stringify!($method), status.message())
        })
    }};
}

impl Tasks {
    /// Connects to the socket at `path`.
    pub fn connect(path: PathBuf, deadline: Duration) -> Result<Self> {
        let (runtime, channel) = cri::dial(path)?;
        Ok(Self {
            runtime,
            client: TasksClient::new(channel),
            deadline,
        })
    }

    /// Every task of the cases' namespace, as `ctr task ls` shows them.
    pub fn list(&self) -> Result<Vec<api::Process>> {
        let answer = call!(self, list, api::ListTasksRequest::default())?;
        Ok(answer.tasks)
    }

    /// Makes a container's task, not yet started, whose terminal writes to a fifo.
    pub fn create_on_terminal(
        &self,
        container: &str,
        rootfs: Vec<api::Mount>,
        output: &Path,
    ) -> Result<()> {
        let request = api::CreateTaskRequest {
            container_id: container.to_owned(),
            rootfs,
            stdout: output.display().to_string(),
            terminal: true,
            ..Default::default()
        };
        call!(self, create, request).map(drop)
    }

    /// Starts a task that was made.
    pub fn start(&self, container: &str) -> Result<()> {
        let request = api::StartRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        call!(self, start, request).map(drop)
    }

    /// Tells a task its terminal's size.
    pub fn resize(&self, container: &str, width: u32, height: u32) -> Result<()> {
        let request = api::ResizePtyRequest {
            container_id: container.to_owned(),
            width,
            height,
            ..Default::default()
        };
        call!(self, resize_pty, request).map(drop)
    }
}
