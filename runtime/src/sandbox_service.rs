//! containerd's Sandbox service, for nodes whose CRI has `sandboxer = "shim"`:
//! the pod without a pause container.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::Status;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use tokio::sync::watch;
use tokio::time::timeout;
use ttrpc::Result;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::agent_client::Exit;
use crate::clock;
use crate::error::Error;
use crate::id::Id;
use crate::pod::{PodHandle, SandboxRequest};
use crate::pod_config;
use crate::task_service::METRICS;

/// CRI's names of a pod's states.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// `SIGTERM` and `SIGKILL` of signal(7).
const TERMINATE: u32 = 15;
const KILL: u32 = 9;

/// How long a pod may take to stop when containerd does not say.
const PATIENCE: Duration = Duration::from_secs(10);

/// Tells how the pod ends.
type Ends = watch::Receiver<Option<Exit>>;

/// The service of one pod.
#[derive(Clone)]
pub struct SandboxService {
    pod: PodHandle,
}

impl SandboxService {
    /// Serves `pod`.
    pub fn new(pod: PodHandle) -> Self {
        Self { pod }
    }

    /// The service under its name.
    pub fn services(&self) -> HashMap<String, Service> {
        create_sandbox(Arc::new(self.clone()))
    }

    async fn stop(&self, request: StopSandboxRequest) -> std::result::Result<(), Error> {
        let id = request.sandbox_id;
        let patience = match request.timeout_secs {
            0 => PATIENCE,
            seconds => Duration::from_secs(seconds.into()),
        };
        let watched = id.clone();
        let mut end = self
            .pod
            .ask(move |pod, reply| pod.watch(&watched, "", reply))
            .await?;
        self.kill(&id, TERMINATE).await?;
        let ended = async |end: &mut Ends| end.wait_for(Option::is_some).await.is_ok();
        if timeout(patience, ended(&mut end)).await.is_err() {
            self.kill(&id, KILL).await?;
            if self.check_let_go().await.is_err() {
                // It is told in time, whether or not the VMM ends.
                ended(&mut end).await;
            }
        }
        self.check_let_go().await
    }

    async fn check_let_go(&self) -> std::result::Result<(), Error> {
        self.pod.ask(|pod, reply| pod.check_let_go(reply)).await
    }

    async fn kill(&self, id: &str, signal: u32) -> std::result::Result<(), Error> {
        let id = id.to_owned();
        let killed = self
            .pod
            .ask(move |pod, reply| pod.kill(id, String::new(), signal, false, reply))
            .await;
        match killed {
            Err(Error::Finished) => Ok(()),
            other => other,
        }
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        context: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        let id = Id::new("sandbox id", &request.sandbox_id).map_err(Error::from)?;
        let options = request.options.unwrap_or_default();
        let mut pod = pod_config::read(&options.value, id.as_str()).map_err(Error::from)?;
        pod.netns =
            Some(PathBuf::from(request.netns_path)).filter(|path| !path.as_os_str().is_empty());
        let sandbox = SandboxRequest {
            id,
            bundle: PathBuf::from(request.bundle_path),
            pod,
        };
        let trace = self
            .pod
            .trace(context, "CreateSandbox", [&request.sandbox_id, ""]);
        self.pod
            .ask_in(trace, |pod, reply| pod.create_sandbox(sandbox, reply))
            .await
            .inspect_err(|error| tracing::error!(id = request.sandbox_id, "create: {error}"))?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        context: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> Result<StartSandboxResponse> {
        let id = request.sandbox_id;
        let trace = self.pod.trace(context, "StartSandbox", [&id, ""]);
        let pid = self
            .pod
            .ask_in(trace, move |pod, reply| {
                pod.start_process(id, String::new(), reply)
            })
            .await?;
        Ok(StartSandboxResponse {
            pid,
            created_at: MessageField::some(clock::timestamp(clock::wall_ns())),
            ..StartSandboxResponse::default()
        })
    }

    async fn platform(
        &self,
        _context: &TtrpcContext,
        _request: PlatformRequest,
    ) -> Result<PlatformResponse> {
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        "linux".clone_into(&mut platform.os);
        "amd64".clone_into(&mut platform.architecture);
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        context: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> Result<StopSandboxResponse> {
        let names = [&request.sandbox_id, ""];
        let trace = self.pod.trace(context, "StopSandbox", names);
        let stopped = self.stop(request).await;
        if let Some(trace) = trace {
            trace.end(stopped.as_ref().err());
        }
        stopped?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _context: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> Result<WaitSandboxResponse> {
        let id = request.sandbox_id;
        let mut end = self
            .pod
            .ask(move |pod, reply| pod.watch(&id, "", reply))
            .await?;
        let exit = end
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| *exit)
            .ok_or(Error::ShuttingDown)?;
        // The pod's volumes are others' from here on.
        self.pod.ask(|pod, reply| pod.await_let_go(reply)).await?;
        Ok(WaitSandboxResponse {
            exit_status: exit.code,
            exited_at: MessageField::some(clock::timestamp(exit.at_ns)),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _context: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> Result<SandboxStatusResponse> {
        let id = request.sandbox_id.clone();
        let report = self
            .pod
            .ask(move |pod, reply| pod.report(&id, "", reply))
            .await?;
        // To a containerd that starts again the other would be as good as its end.
        let is_over = report.status == Status::STOPPED && self.check_let_go().await.is_ok();
        let state = if is_over { NOT_READY } else { READY };
        let exit = report.exit.filter(|_| is_over);
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: report.pid,
            state: state.to_owned(),
            created_at: MessageField::some(clock::timestamp(report.created_ns)),
            exited_at: exit.map(|exit| clock::timestamp(exit.at_ns)).into(),
            ..SandboxStatusResponse::default()
        })
    }

    async fn ping_sandbox(
        &self,
        _context: &TtrpcContext,
        request: PingRequest,
    ) -> Result<PingResponse> {
        let id = request.sandbox_id;
        self.pod
            .ask(move |pod, reply| pod.task_pid(&id, reply))
            .await?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _context: &TtrpcContext,
        _request: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        self.pod
            .ask(|pod, reply| pod.shut_down_sandbox(reply))
            .await?;
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _context: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        let id = request.sandbox_id.clone();
        let value = self.pod.ask(move |pod, reply| pod.stats(id, reply)).await?;
        let mut response = SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = request.sandbox_id;
        metrics.timestamp = MessageField::some(clock::timestamp(clock::wall_ns()));
        metrics.data = MessageField::some(Any {
            type_url: METRICS.to_owned(),
            value,
            ..Any::default()
        });
        Ok(response)
    }
}
