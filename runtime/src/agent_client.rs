//! The agent in the guest: the only caller of the generated client.
//!
//! What it answers is an attacker's input: every call but the two that wait for
//! something to happen has a deadline, texts are cut and cleaned, and nothing
//! names a path or a process of the host.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use husk_protocol::agent::{
    self, AgentClient, ContainerRequest, CreateContainerRequest, CreateSandboxRequest,
    CreateSandboxResponse, DeleteContainerRequest, Empty, ExecRequest, ProcessInfo, ProcessRequest,
    ResizePtyRequest, SignalRequest, UpdateResourcesRequest,
};
use ttrpc::Code;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

use crate::clock;

/// Longest time for calls that only change state in the guest.
const QUICK: Duration = Duration::from_secs(10);

/// Longest time for calls that mount or execute something.
const SLOW: Duration = Duration::from_secs(60);

/// Longest text taken from the agent, characters.
const TEXT: usize = 2048;

/// Most processes listed.
const PROCESSES: usize = 32_768;

/// The pod's agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
}

/// How a process in the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 128 + signal when a signal ended it.
    pub code: u32,
    /// Wall clock, nanoseconds since the epoch.
    pub at_ns: u64,
}

/// A call to the agent that failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It answered that it could not.
    #[error("{message}")]
    Refused {
        /// Why, as ttrpc's code.
        code: Code,
        /// Why, in words.
        message: String,
    },
    /// It did not answer in time.
    #[error("the agent did not answer {0} in time")]
    Deadline(&'static str),
    /// The connection has ended.
    #[error("the connection to the agent has ended")]
    Gone,
    /// The connection could not be set up.
    #[error("agent's connection")]
    Connect(#[source] std::io::Error),
}

impl AgentError {
    /// What containerd is told.
    pub fn code(&self) -> Code {
        match self {
            Self::Refused { code, .. } => *code,
            Self::Deadline(_) => Code::DEADLINE_EXCEEDED,
            Self::Gone => Code::UNAVAILABLE,
            Self::Connect(_) => Code::UNKNOWN,
        }
    }

    fn new(what: &'static str, error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) if status.code() == Code::DEADLINE_EXCEEDED => {
                Self::Deadline(what)
            }
            ttrpc::Error::RpcStatus(status) => Self::Refused {
                code: status.code(),
                message: clean(&status.message),
            },
            error => {
                tracing::debug!(what, error = %error, "agent");
                Self::Gone
            }
        }
    }
}

impl Agent {
    /// Speaks over `stream`, on whose far end the agent serves once it runs.
    ///
    /// # Errors
    /// The stream cannot be polled.
    pub fn new(stream: UnixStream) -> Result<Self, AgentError> {
        let socket = Socket::try_from(stream).map_err(AgentError::Connect)?;
        Ok(Self {
            client: AgentClient::new(Client::new(socket)),
        })
    }

    /// Sets the sandbox up; may be asked before the guest has booted, so the
    /// caller says how long that may take.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn create_sandbox(
        &self,
        request: &CreateSandboxRequest,
        deadline: Duration,
    ) -> Result<CreateSandboxResponse, AgentError> {
        let mut response = self
            .client
            .create_sandbox(with_duration(deadline), request)
            .await
            .map_err(|error| AgentError::new("CreateSandbox", error))?;
        response.agent_version = clean(&response.agent_version);
        response.kernel_release = clean(&response.kernel_release);
        Ok(response)
    }

    /// Prepares a container.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn create_container(
        &self,
        request: &CreateContainerRequest,
    ) -> Result<(), AgentError> {
        self.client
            .create_container(with_duration(SLOW), request)
            .await
            .map_err(|error| AgentError::new("CreateContainer", error))?;
        Ok(())
    }

    /// Executes the container's program.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn start_container(&self, container: &str) -> Result<(), AgentError> {
        self.client
            .start_container(with_duration(SLOW), &of(container))
            .await
            .map_err(|error| AgentError::new("StartContainer", error))?;
        Ok(())
    }

    /// Executes another program in the container.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn exec(&self, request: &ExecRequest) -> Result<(), AgentError> {
        self.client
            .exec(with_duration(SLOW), request)
            .await
            .map_err(|error| AgentError::new("Exec", error))?;
        Ok(())
    }

    /// Returns when the process has ended.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn wait(&self, container: &str, exec: &str) -> Result<Exit, AgentError> {
        let response = self
            .client
            .wait(Context::default(), &process(container, exec))
            .await
            .map_err(|error| AgentError::new("Wait", error))?;
        Ok(Exit {
            code: response.exit_code,
            // The node's own clock: a guest's may be off, by accident or not.
            at_ns: clock::wall_ns(),
        })
    }

    /// Sends a signal to one process, or with `all` to the whole container.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn signal(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), AgentError> {
        let request = SignalRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..SignalRequest::default()
        };
        self.client
            .signal(with_duration(QUICK), &request)
            .await
            .map_err(|error| AgentError::new("Signal", error))?;
        Ok(())
    }

    /// Sets a terminal's size.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn resize_pty(
        &self,
        container: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> Result<(), AgentError> {
        let request = ResizePtyRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            width,
            height,
            ..ResizePtyRequest::default()
        };
        self.client
            .resize_pty(with_duration(QUICK), &request)
            .await
            .map_err(|error| AgentError::new("ResizePty", error))?;
        Ok(())
    }

    /// The container's processes, as the guest numbers them.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn list_processes(&self, container: &str) -> Result<Vec<ProcessInfo>, AgentError> {
        let mut response = self
            .client
            .list_processes(with_duration(QUICK), &of(container))
            .await
            .map_err(|error| AgentError::new("ListProcesses", error))?;
        response.processes.truncate(PROCESSES);
        Ok(response.processes)
    }

    /// The container's counters: `io.containerd.cgroups.v2.Metrics`, serialized.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn stats(&self, container: &str) -> Result<Vec<u8>, AgentError> {
        let response = self
            .client
            .stats(with_duration(QUICK), &of(container))
            .await
            .map_err(|error| AgentError::new("Stats", error))?;
        Ok(response.cgroup_v2_metrics)
    }

    /// Changes the container's limits.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn update_resources(
        &self,
        container: &str,
        oci_resources: Vec<u8>,
    ) -> Result<(), AgentError> {
        let request = UpdateResourcesRequest {
            container_id: container.to_owned(),
            oci_resources,
            ..UpdateResourcesRequest::default()
        };
        self.client
            .update_resources(with_duration(QUICK), &request)
            .await
            .map_err(|error| AgentError::new("UpdateResources", error))?;
        Ok(())
    }

    /// Freezes the container.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn pause(&self, container: &str) -> Result<(), AgentError> {
        self.client
            .pause(with_duration(QUICK), &of(container))
            .await
            .map_err(|error| AgentError::new("Pause", error))?;
        Ok(())
    }

    /// Thaws the container.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn resume(&self, container: &str) -> Result<(), AgentError> {
        self.client
            .resume(with_duration(QUICK), &of(container))
            .await
            .map_err(|error| AgentError::new("Resume", error))?;
        Ok(())
    }

    /// Ends what is left of the container and forgets it, and unmounts what the
    /// guest has mounted at paths of the shared tree that nobody uses any more.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn delete_container(
        &self,
        container: &str,
        unused_paths: Vec<String>,
    ) -> Result<(), AgentError> {
        let request = DeleteContainerRequest {
            container_id: container.to_owned(),
            unused_paths,
            ..DeleteContainerRequest::default()
        };
        self.client
            .delete_container(with_duration(QUICK), &request)
            .await
            .map_err(|error| AgentError::new("DeleteContainer", error))?;
        Ok(())
    }

    /// Forgets a process that has ended.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn delete_process(&self, container: &str, exec: &str) -> Result<(), AgentError> {
        self.client
            .delete_process(with_duration(QUICK), &process(container, exec))
            .await
            .map_err(|error| AgentError::new("DeleteProcess", error))?;
        Ok(())
    }

    /// Returns when something worth telling has happened.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn next_event(&self) -> Result<agent::Event, AgentError> {
        self.client
            .next_event(Context::default(), &Empty::default())
            .await
            .map_err(|error| AgentError::new("NextEvent", error))
    }

    /// Connects to a TCP port on the guest's localhost and carries the stream
    /// over `host_port`.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn dial(&self, port: u16, host_port: u32) -> Result<(), AgentError> {
        let request = agent::DialRequest {
            port: port.into(),
            host_port,
            ..agent::DialRequest::default()
        };
        self.client
            .dial(with_duration(QUICK), &request)
            .await
            .map_err(|error| AgentError::new("Dial", error))?;
        Ok(())
    }

    /// Finds devices that were plugged.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn rescan_devices(&self) -> Result<(), AgentError> {
        self.client
            .rescan_devices(with_duration(QUICK), &Empty::default())
            .await
            .map_err(|error| AgentError::new("RescanDevices", error))?;
        Ok(())
    }

    /// Lets go of a disk before it is unplugged.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn remove_disk(&self, serial: &str) -> Result<(), AgentError> {
        let mut request = agent::RemoveDeviceRequest::default();
        request.set_block_serial(serial.to_owned());
        self.client
            .remove_device(with_duration(QUICK), &request)
            .await
            .map_err(|error| AgentError::new("RemoveDevice", error))?;
        Ok(())
    }

    /// Ends every process, syncs and powers the guest off. The answer may be
    /// lost with the connection.
    pub async fn shut_down(&self, deadline: Duration) {
        let answer = self
            .client
            .shutdown(with_duration(deadline), &Empty::default())
            .await;
        if let Err(error) = answer {
            tracing::debug!(%error, "agent's shutdown");
        }
    }
}

fn of(container: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: container.to_owned(),
        ..ContainerRequest::default()
    }
}

fn process(container: &str, exec: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: container.to_owned(),
        exec_id: exec.to_owned(),
        ..ProcessRequest::default()
    }
}

/// Cuts a text and takes out what could act on a terminal or forge log lines.
fn clean(text: &str) -> String {
    text.chars()
        .take(TEXT)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
