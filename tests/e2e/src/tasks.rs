//! containerd's task service, asked directly.

use std::path::PathBuf;
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
        let mut request = tonic::Request::new(api::ListTasksRequest::default());
        request.metadata_mut().insert(
            "containerd-namespace",
            AsciiMetadataValue::from_static(NAMESPACE),
        );
        let mut client = self.client.clone();
        let answer = self
            .runtime
            .block_on(async { tokio::time::timeout(self.deadline, client.list(request)).await })?;
        Ok(answer
            .map_err(|status| anyhow::anyhow!("list tasks: {}", status.message()))?
            .into_inner()
            .tasks)
    }
}
