//! The requests of `agent.proto`: parse, call, map the error.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use husk_protocol::agent::{
    Agent, ContainerRequest, CreateContainerRequest, CreateContainerResponse, CreateSandboxRequest,
    CreateSandboxResponse, DeleteContainerRequest, DialRequest, Empty, Event, ExecRequest,
    ExecResponse, ListProcessesResponse, OomEvent, ProcessInfo, ProcessRequest,
    RemoveDeviceRequest, RemoveVolumeRequest, ResizePtyRequest, ServeNamesRequest, SetVcpusRequest,
    SetVcpusResponse, SetVolumeRequest, SignalRequest, StatsResponse, UpdateNetworkRequest,
    UpdateResourcesRequest, WaitResponse, event, remove_device_request::Device,
};
use tokio::sync::Notify;
use ttrpc::r#async::TtrpcContext;

use crate::error::{Doing, Error};
use crate::sandbox::{Sandbox, check_id, parse};
use crate::{clock, device, events, forward, names, netlink, oci, pci, storage};

/// Answers the shim.
#[derive(Debug)]
pub struct Service {
    /// The pod.
    pub sandbox: Arc<Sandbox>,
    /// When this agent started, since boot.
    pub started_ns: u64,
    /// Rung when the guest shall end.
    pub shutdown: Arc<Notify>,
}

/// Runs to its end even if the caller no longer waits: half of a creation or
/// deletion is worse than all of it.
pub async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::spawn(work).await;
    done.map_err(std::io::Error::other)
        .doing("finish", "the request")?
}

#[async_trait]
impl Agent for Service {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        to_the_end(async move { sandbox.create(request).await }).await?;
        Ok(CreateSandboxResponse {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            agent_started_ns: self.started_ns,
            sandbox_ready_ns: clock::since_boot_ns(),
            ..Default::default()
        })
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: UpdateNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        to_the_end(async move { sandbox.update_network(&request.network).await }).await?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let pid = to_the_end(async move { sandbox.create_container(request).await }).await?;
        Ok(CreateContainerResponse {
            pid: pid.cast_unsigned(),
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        self.sandbox.memory().wait().await;
        to_the_end(async move { container.start().await }).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<ExecResponse> {
        check_id(&request.exec_id)?;
        let container = self.sandbox.container(&request.container_id)?;
        let process: oci::Process = parse("oci_process", &request.oci_process)?;
        let sandbox = Arc::clone(&self.sandbox);
        let made = to_the_end(async move {
            let streams = request.streams.unwrap_or_default();
            let around = sandbox.around();
            container
                .exec(
                    &request.exec_id,
                    process,
                    &streams,
                    request.terminal,
                    around,
                )
                .await
        });
        Ok(ExecResponse {
            pid: made.await?.pid().cast_unsigned(),
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let container = self.sandbox.container(&request.container_id)?;
        let ended = container.process(&request.exec_id)?.wait().await?;
        let at = ended
            .exit
            .at
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        Ok(WaitResponse {
            exit_code: ended.exit.code,
            stdout_bytes: ended.stdout,
            stderr_bytes: ended.stderr,
            exited_at_ns: u64::try_from(at.as_nanos()).unwrap_or(u64::MAX),
            oom_killed: container.was_oom_killed(),
            ..Default::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        let signal = i32::try_from(request.signal).unwrap_or(i32::MAX);
        // Who names one process means no other.
        if request.all && request.exec_id.is_empty() {
            container.signal_all(signal)?;
        } else {
            container.signal(&request.exec_id, signal)?;
        }
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let process = container.process(&request.exec_id)?;
        process.resize(cells(request.width), cells(request.height))?;
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let processes = self.sandbox.container(&request.container_id)?.processes()?;
        let info = |(pid, exec_id): (i32, String)| ProcessInfo {
            pid: pid.cast_unsigned(),
            exec_id,
            ..Default::default()
        };
        Ok(ListProcessesResponse {
            processes: processes.into_iter().map(info).collect(),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<StatsResponse> {
        Ok(StatsResponse {
            cgroup_v2_metrics: self.sandbox.container(&request.container_id)?.stats()?,
            ..Default::default()
        })
    }

    async fn update_resources(
        &self,
        _: &TtrpcContext,
        request: UpdateResourcesRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        let resources: oci::Resources = parse("oci_resources", &request.oci_resources)?;
        blocking(move || container.update(&resources)).await?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        to_the_end(async move { container.pause().await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        to_the_end(async move { container.resume().await }).await?;
        Ok(Empty::new())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: DeleteContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        to_the_end(async move {
            let deleted = sandbox.delete_container(&request.container_id).await;
            storage::unmount_shared(request.unused_paths).await?;
            deleted
        })
        .await?;
        Ok(Empty::new())
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        to_the_end(async move { container.delete_process(&request.exec_id).await }).await?;
        Ok(Empty::new())
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Event> {
        let kind = self.sandbox.next_event().await.map(|event| match event {
            events::Event::OutOfMemory { container_id } => event::Kind::Oom(OomEvent {
                container_id,
                ..Default::default()
            }),
        });
        Ok(Event {
            kind,
            ..Default::default()
        })
    }

    async fn dial(&self, _: &TtrpcContext, request: DialRequest) -> ttrpc::Result<Empty> {
        let dialler = &self.sandbox.around().dialler;
        forward::dial(dialler, request.port, request.host_port).await?;
        Ok(Empty::new())
    }

    async fn serve_names(
        &self,
        _: &TtrpcContext,
        request: ServeNamesRequest,
    ) -> ttrpc::Result<Empty> {
        let dialler = &self.sandbox.around().dialler;
        names::serve(dialler, &request.address, request.host_port).await?;
        Ok(Empty::new())
    }

    async fn rescan_devices(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        device::rescan().await.map_err(Error::from)?;
        Ok(Empty::new())
    }

    async fn remove_device(
        &self,
        _: &TtrpcContext,
        request: RemoveDeviceRequest,
    ) -> ttrpc::Result<Empty> {
        // On this thread, which is in the pod's network namespace.
        if let Some(Device::Vlan(name)) = &request.device {
            netlink::remove_vlan(name).map_err(Error::from)?;
            return Ok(Empty::new());
        }
        if let Some(Device::PciSlot(slot)) = request.device {
            let name = || format!("in PCI slot {slot}");
            let function = pci::function(slot).ok_or_else(|| Error::NoDevice { device: name() })?;
            blocking(move || Ok(device::remove_function(&function)?)).await?;
            return Ok(Empty::new());
        }
        let device = find_device(&request).await?;
        blocking(move || Ok(device::remove(&device)?)).await?;
        Ok(Empty::new())
    }

    async fn set_volume(
        &self,
        _: &TtrpcContext,
        request: SetVolumeRequest,
    ) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        let set = move || sandbox.mirrors().set(&request.volume_id, request.entries);
        blocking(set).await?;
        Ok(Empty::new())
    }

    async fn remove_volume(
        &self,
        _: &TtrpcContext,
        request: RemoveVolumeRequest,
    ) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        blocking(move || sandbox.mirrors().remove(&request.volume_id)).await?;
        Ok(Empty::new())
    }

    async fn set_vcpus(
        &self,
        _: &TtrpcContext,
        request: SetVcpusRequest,
    ) -> ttrpc::Result<SetVcpusResponse> {
        let online = move || device::set_vcpus(request.vcpus).map_err(Error::from);
        Ok(SetVcpusResponse {
            vcpus: blocking(online).await?,
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.shutdown.notify_one();
        Ok(Empty::new())
    }
}

/// Writes to /sys probe or remove whole devices, or take memory back, before
/// they return.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(std::io::Error::other)
        .doing("finish", "the request")?
}

/// The directory in /sys of the virtio device that a request names.
async fn find_device(request: &RemoveDeviceRequest) -> Result<PathBuf, Error> {
    let of = |entry: PathBuf| entry.join("device");
    let (name, device) = match &request.device {
        Some(Device::BlockSerial(serial)) => {
            let block = storage::find_present_disk(serial).await?;
            (serial.clone(), block.map(|block| of(block.directory())))
        }
        Some(Device::HardwareAddress(address)) => {
            let device = netlink::find_device(address)?;
            let device = device.map(|name| device::on_virtio_bus(&name));
            (format!("{address:02x?}"), device)
        }
        Some(Device::FsTag(tag)) => (tag.clone(), device::find_virtio_fs(tag).map(of)),
        _ => (String::new(), None),
    };
    device.ok_or(Error::NoDevice { device: name })
}
