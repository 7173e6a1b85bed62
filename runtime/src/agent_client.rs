//! The agent in the guest: the only caller of the generated client.
//!
//! What it answers is an attacker's input: every call but the two that wait for
//! something to happen has a deadline, texts are cut and cleaned, and nothing
//! names a path or a process of the host.

use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use husk_protocol::agent::{
    self, AgentClient, ContainerRequest, CreateContainerRequest, CreateSandboxRequest,
    CreateSandboxResponse, DeleteContainerRequest, Empty, ExecRequest, ProcessRequest,
    ResizePtyRequest, ShellClient, SignalRequest, UpdateResourcesRequest,
};
use husk_protocol::{deadline, limit};
use husk_vmm_spec::MacAddress;
use protobuf::Message;
use tokio::time::timeout;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

use crate::clock;
use crate::config::Patience;

mod error;
mod metrics;
mod outbox;
mod shell;

pub use error::AgentError;
use outbox::Outbox;

/// Longest time for calls that only change state in the guest.
const QUICK: Duration = Duration::from_secs(10);

/// Longest time for the end of a container: its processes are killed, its disks
/// written.
const ENDING: Duration = Duration::from_secs(30);

/// Longest time for calls that mount or execute something.
const SLOW: Duration = deadline::MAKING;

/// ttrpc has its own limit, which tells a late answer as a lost connection: it
/// comes behind ours.
const MARGIN: Duration = Duration::from_secs(5);

/// Room for what ttrpc adds to a message, bytes.
const ENVELOPE: u64 = 4096;

/// Longest text taken from the agent, characters.
const TEXT: usize = 2048;

/// The largest code that a process can end with, by itself or by a signal.
const EXIT_CODE_MOST: u32 = 255;

/// The pod's agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    shells: ShellClient,
    patience: Patience,
}

/// How a process in the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 128 + signal when a signal ended it.
    pub code: u32,
    /// Wall clock, nanoseconds since the epoch.
    pub at_ns: u64,
}

/// What the agent tells of a process that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// How it ended.
    pub exit: Exit,
    /// Memory ran out in its container before.
    pub oom_killed: bool,
    /// How much it wrote; none: nobody told.
    pub written: Option<Written>,
}

/// Bytes of output, by the guest's account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// As standard output.
    pub stdout: u64,
    /// As standard error.
    pub stderr: u64,
}

impl Exit {
    /// Told this moment, by the node's own clock: a guest's may be off, by
    /// accident or not.
    pub fn now(code: u32) -> Self {
        Self {
            code,
            at_ns: clock::wall_ns(),
        }
    }
}

impl From<Exit> for End {
    /// Nobody told more.
    fn from(exit: Exit) -> Self {
        Self {
            exit,
            oom_killed: false,
            written: None,
        }
    }
}

impl Agent {
    /// Speaks over `stream`, on whose far end the agent serves once it runs, and
    /// waits for answers with `patience`.
    ///
    /// # Errors
    /// The stream cannot be polled.
    pub fn new(stream: UnixStream, patience: Patience) -> Result<Self, AgentError> {
        let stream = Outbox::new(stream).map_err(AgentError::Connect)?;
        let client = Client::new(Socket::new(stream));
        Ok(Self {
            client: AgentClient::new(client.clone()),
            shells: ShellClient::new(client),
            patience,
        })
    }

    /// How long things may take.
    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// Has `ask` ask, which on a quick node takes `usual` at most.
    async fn answer<T, F>(
        &self,
        call: &'static str,
        usual: Duration,
        ask: impl FnOnce(Context) -> F,
    ) -> Result<T, AgentError>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        within(call, self.patience.of(usual), ask).await
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
        let ask = |context| self.client.create_sandbox(context, request);
        let mut response = within("CreateSandbox", deadline, ask).await?;
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
        check_size("CreateContainer", request)?;
        let ask = |context| self.client.create_container(context, request);
        self.answer("CreateContainer", SLOW, ask).await?;
        Ok(())
    }

    /// Executes the container's program.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn start_container(&self, container: &str) -> Result<(), AgentError> {
        let request = of(container);
        let ask = |context| self.client.start_container(context, &request);
        self.answer("StartContainer", SLOW, ask).await?;
        Ok(())
    }

    /// Executes another program in the container.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn exec(&self, request: &ExecRequest) -> Result<(), AgentError> {
        check_size("Exec", request)?;
        let ask = |context| self.client.exec(context, request);
        self.answer("Exec", SLOW, ask).await?;
        Ok(())
    }

    /// Returns when the process has ended.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn wait(&self, container: &str, exec: &str) -> Result<End, AgentError> {
        let response = self
            .client
            .wait(Context::default(), &process(container, exec))
            .await
            .map_err(|error| AgentError::new("Wait", error))?;
        Ok(End {
            exit: Exit::now(response.exit_code.min(EXIT_CODE_MOST)),
            oom_killed: response.oom_killed,
            written: Some(Written {
                stdout: response.stdout_bytes,
                stderr: response.stderr_bytes,
            }),
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
        let ask = |context| self.client.signal(context, &request);
        self.answer("Signal", QUICK, ask).await?;
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
        let ask = |context| self.client.resize_pty(context, &request);
        self.answer("ResizePty", QUICK, ask).await?;
        Ok(())
    }

    /// The container's counters: `io.containerd.cgroups.v2.Metrics`, serialized.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn stats(&self, container: &str) -> Result<Vec<u8>, AgentError> {
        let request = of(container);
        let ask = |context| self.client.stats(context, &request);
        let response = self.answer("Stats", QUICK, ask).await?;
        let metrics = metrics::checked(&response.cgroup_v2_metrics);
        metrics.map_err(|source| AgentError::Garbled {
            call: "Stats",
            source,
        })
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
        check_size("UpdateResources", &request)?;
        let ask = |context| self.client.update_resources(context, &request);
        self.answer("UpdateResources", QUICK, ask).await?;
        Ok(())
    }

    /// Freezes the container.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn pause(&self, container: &str) -> Result<(), AgentError> {
        let request = of(container);
        let ask = |context| self.client.pause(context, &request);
        self.answer("Pause", QUICK, ask).await?;
        Ok(())
    }

    /// Thaws the container.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn resume(&self, container: &str) -> Result<(), AgentError> {
        let request = of(container);
        let ask = |context| self.client.resume(context, &request);
        self.answer("Resume", QUICK, ask).await?;
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
        let ask = |context| self.client.delete_container(context, &request);
        self.answer("DeleteContainer", ENDING, ask).await?;
        Ok(())
    }

    /// Forgets a process that has ended.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn delete_process(&self, container: &str, exec: &str) -> Result<(), AgentError> {
        let request = process(container, exec);
        let ask = |context| self.client.delete_process(context, &request);
        self.answer("DeleteProcess", QUICK, ask).await?;
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
        let ask = |context| self.client.dial(context, &request);
        self.answer("Dial", QUICK, ask).await?;
        Ok(())
    }

    /// Listens for DNS on an address of the guest's localhost and carries what it
    /// is asked over `host_port`.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn serve_names(&self, address: Ipv4Addr, host_port: u32) -> Result<(), AgentError> {
        let request = agent::ServeNamesRequest {
            address: address.to_string(),
            host_port,
            ..agent::ServeNamesRequest::default()
        };
        let ask = |context| self.client.serve_names(context, &request);
        self.answer("ServeNames", QUICK, ask).await?;
        Ok(())
    }

    /// Gives a volume of the guest's own these files.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn set_volume(
        &self,
        volume: &str,
        entries: Vec<agent::VolumeEntry>,
    ) -> Result<(), AgentError> {
        let request = agent::SetVolumeRequest {
            volume_id: volume.to_owned(),
            entries,
            ..agent::SetVolumeRequest::default()
        };
        check_size("SetVolume", &request)?;
        let ask = |context| self.client.set_volume(context, &request);
        self.answer("SetVolume", QUICK, ask).await?;
        Ok(())
    }

    /// Takes such a volume away.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn remove_volume(&self, volume: &str) -> Result<(), AgentError> {
        let request = agent::RemoveVolumeRequest {
            volume_id: volume.to_owned(),
            ..agent::RemoveVolumeRequest::default()
        };
        let ask = |context| self.client.remove_volume(context, &request);
        self.answer("RemoveVolume", QUICK, ask).await?;
        Ok(())
    }

    /// Brings vCPUs on- or offline until there are so many.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn set_vcpus(&self, vcpus: u8) -> Result<(), AgentError> {
        let request = agent::SetVcpusRequest {
            vcpus: vcpus.into(),
            ..agent::SetVcpusRequest::default()
        };
        let ask = |context| self.client.set_vcpus(context, &request);
        self.answer("SetVcpus", QUICK, ask).await?;
        Ok(())
    }

    /// Finds devices that were plugged.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn rescan_devices(&self) -> Result<(), AgentError> {
        let request = Empty::default();
        let ask = |context| self.client.rescan_devices(context, &request);
        self.answer("RescanDevices", QUICK, ask).await?;
        Ok(())
    }

    /// Tells the guest what is new in its network, late interfaces included.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn update_network(&self, network: agent::Network) -> Result<(), AgentError> {
        let request = agent::UpdateNetworkRequest {
            network: Some(network).into(),
            ..agent::UpdateNetworkRequest::default()
        };
        let ask = |context| self.client.update_network(context, &request);
        self.answer("UpdateNetwork", SLOW, ask).await?;
        Ok(())
    }

    /// Lets go of a network interface before it is unplugged.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn remove_interface(&self, mac: MacAddress) -> Result<(), AgentError> {
        let mut request = agent::RemoveDeviceRequest::default();
        request.set_hardware_address(mac.0.to_vec());
        let ask = |context| self.client.remove_device(context, &request);
        self.answer("RemoveDevice", QUICK, ask).await?;
        Ok(())
    }

    /// Takes back a VLAN.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn remove_vlan(&self, name: &str) -> Result<(), AgentError> {
        let mut request = agent::RemoveDeviceRequest::default();
        request.set_vlan(name.to_owned());
        let ask = |context| self.client.remove_device(context, &request);
        self.answer("RemoveDevice", QUICK, ask).await?;
        Ok(())
    }

    /// Lets go of a disk before it is unplugged.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn remove_disk(&self, serial: &str) -> Result<(), AgentError> {
        let mut request = agent::RemoveDeviceRequest::default();
        request.set_block_serial(serial.to_owned());
        let ask = |context| self.client.remove_device(context, &request);
        self.answer("RemoveDevice", QUICK, ask).await?;
        Ok(())
    }

    /// Lets go of a PCI device of the node before it is unplugged.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn remove_pci(&self, slot: u8) -> Result<(), AgentError> {
        let mut request = agent::RemoveDeviceRequest::default();
        request.set_pci_slot(slot.into());
        let ask = |context| self.client.remove_device(context, &request);
        self.answer("RemoveDevice", QUICK, ask).await?;
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

async fn within<T, F>(
    call: &'static str,
    limit: Duration,
    ask: impl FnOnce(Context) -> F,
) -> Result<T, AgentError>
where
    F: Future<Output = ttrpc::Result<T>>,
{
    match timeout(limit, ask(with_duration(limit + MARGIN))).await {
        Ok(answer) => answer.map_err(|error| AgentError::new(call, error)),
        Err(_) => Err(AgentError::Deadline {
            call,
            seconds: limit.as_secs(),
        }),
    }
}

/// Refuses what ttrpc would only call a lost connection.
fn check_size(call: &'static str, message: &impl Message) -> Result<(), AgentError> {
    let bytes = message.compute_size();
    if bytes.saturating_add(ENVELOPE) > limit::MESSAGE_BYTES as u64 {
        return Err(AgentError::TooLarge { call, bytes });
    }
    Ok(())
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
pub fn clean(text: &str) -> String {
    text.chars()
        .take(TEXT)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
