//! containerd's Task service: take the request apart, ask the pod, put the
//! answer together.

use std::collections::HashMap;
use std::path::PathBuf;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::{EnumOrUnknown, Message};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use ttrpc::Result;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::clock;
use crate::error::Error;
use crate::id::Id;
use crate::pod::{CreateRequest, ExecRequest, PodHandle};
use crate::stdio::StdioPaths;

/// The name under which containerd 2 asks; before, it was v2, with the same
/// messages.
const V3: &str = "containerd.task.v3.Task";

/// The name under which containerd 1 and CRI-O ask.
const V2: &str = "containerd.task.v2.Task";

/// Type of the counters.
pub const METRICS: &str = "io.containerd.cgroups.v2.Metrics";

/// Type of what is told about a process that was added.
const PROCESS_DETAILS: &str = "containerd.runc.v1.ProcessDetails";

/// The service of one pod.
#[derive(Clone)]
pub struct TaskService {
    pod: PodHandle,
}

impl TaskService {
    /// Serves `pod`.
    pub fn new(pod: PodHandle) -> Self {
        Self { pod }
    }

    /// The service under both its names.
    pub fn services(&self) -> HashMap<String, Service> {
        let named = |name: &str| {
            let mut services = create_task(std::sync::Arc::new(self.clone()));
            services
                .remove(V3)
                .map(|service| (name.to_owned(), service))
        };
        [V2, V3].into_iter().filter_map(named).collect()
    }
}

fn paths(stdin: String, stdout: String, stderr: String, terminal: bool) -> StdioPaths {
    StdioPaths {
        stdin,
        stdout,
        stderr,
        terminal,
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        context: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(Error::Unsupported("restoring a checkpoint").into());
        }
        let create = CreateRequest {
            id: Id::new("container id", &request.id).map_err(Error::from)?,
            bundle: PathBuf::from(request.bundle),
            rootfs: request.rootfs,
            paths: paths(
                request.stdin,
                request.stdout,
                request.stderr,
                request.terminal,
            ),
        };
        let trace = self.pod.trace(context, "Create", [&request.id, ""]);
        let pid = self
            .pod
            .ask_in(trace, |pod, reply| pod.create(create, reply))
            .await
            .inspect_err(|error| tracing::error!(id = request.id, "create: {error}"))?;
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }

    async fn start(&self, context: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let trace = self
            .pod
            .trace(context, "Start", [&request.id, &request.exec_id]);
        let pid = self
            .pod
            .ask_in(trace, |pod, reply| {
                pod.start_process(request.id, request.exec_id, reply)
            })
            .await?;
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    async fn state(&self, _context: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let StateRequest { id, exec_id, .. } = request;
        let (asked_id, asked_exec) = (id.clone(), exec_id.clone());
        let report = self
            .pod
            .ask(move |pod, reply| pod.report(&asked_id, &asked_exec, reply))
            .await?;
        Ok(StateResponse {
            id,
            exec_id,
            bundle: report.bundle.display().to_string(),
            pid: report.pid,
            status: EnumOrUnknown::new(report.status),
            stdin: report.paths.stdin,
            stdout: report.paths.stdout,
            stderr: report.paths.stderr,
            terminal: report.paths.terminal,
            exit_status: report.exit.map_or(0, |exit| exit.code),
            exited_at: report.exit.map(|exit| clock::timestamp(exit.at_ns)).into(),
            ..StateResponse::default()
        })
    }

    async fn exec(&self, context: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let trace = self
            .pod
            .trace(context, "Exec", [&request.id, &request.exec_id]);
        let spec = request
            .spec
            .into_option()
            .ok_or(Error::Argument("the process has no spec"))?;
        let exec = ExecRequest {
            container: request.id,
            exec: Id::new("process id", &request.exec_id).map_err(Error::from)?,
            spec: spec.value,
            paths: paths(
                request.stdin,
                request.stdout,
                request.stderr,
                request.terminal,
            ),
        };
        self.pod
            .ask_in(trace, |pod, reply| pod.exec(exec, reply))
            .await?;
        Ok(Empty::default())
    }

    async fn resize_pty(
        &self,
        _context: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> Result<Empty> {
        let size = (request.width, request.height);
        self.pod
            .ask(move |pod, reply| pod.resize_pty(request.id, request.exec_id, size, reply))
            .await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _context: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        if request.stdin {
            self.pod
                .ask(move |pod, reply| pod.close_input(&request.id, &request.exec_id, reply))
                .await?;
        }
        Ok(Empty::default())
    }

    async fn kill(&self, context: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        let trace = self
            .pod
            .trace(context, "Kill", [&request.id, &request.exec_id]);
        self.pod
            .ask_in(trace, move |pod, reply| {
                pod.kill(
                    request.id,
                    request.exec_id,
                    request.signal,
                    request.all,
                    reply,
                );
            })
            .await?;
        Ok(Empty::default())
    }

    async fn wait(&self, _context: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let mut end = self
            .pod
            .ask(move |pod, reply| pod.watch(&request.id, &request.exec_id, reply))
            .await?;
        let exit = end
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| *exit)
            .ok_or(Error::ShuttingDown)?;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: MessageField::some(clock::timestamp(exit.at_ns)),
            ..WaitResponse::default()
        })
    }

    async fn delete(
        &self,
        context: &TtrpcContext,
        request: DeleteRequest,
    ) -> Result<DeleteResponse> {
        let trace = self
            .pod
            .trace(context, "Delete", [&request.id, &request.exec_id]);
        let deleted = self
            .pod
            .ask_in(trace, move |pod, reply| {
                pod.delete(request.id, request.exec_id, reply)
            })
            .await?;
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.code,
            exited_at: MessageField::some(clock::timestamp(deleted.exit.at_ns)),
            ..DeleteResponse::default()
        })
    }

    async fn pids(&self, _context: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        let (pid, names) = self
            .pod
            .ask(move |pod, reply| pod.processes(&request.id, reply))
            .await?;
        let processes = names
            .into_iter()
            .map(|name| ProcessInfo {
                pid,
                info: details(name).into(),
                ..ProcessInfo::default()
            })
            .collect();
        Ok(PidsResponse {
            processes,
            ..PidsResponse::default()
        })
    }

    async fn stats(&self, _context: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let value = self
            .pod
            .ask(move |pod, reply| pod.stats(request.id, reply))
            .await?;
        Ok(StatsResponse {
            stats: MessageField::some(Any {
                type_url: METRICS.to_owned(),
                value,
                ..Any::default()
            }),
            ..StatsResponse::default()
        })
    }

    async fn update(&self, context: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let trace = self.pod.trace(context, "Update", [&request.id, ""]);
        let resources = request
            .resources
            .into_option()
            .ok_or(Error::Argument("the update has no resources"))?;
        self.pod
            .ask_in(trace, move |pod, reply| {
                pod.update(request.id, resources.value, reply)
            })
            .await?;
        Ok(Empty::default())
    }

    async fn pause(&self, context: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        let trace = self.pod.trace(context, "Pause", [&request.id, ""]);
        self.pod
            .ask_in(trace, move |pod, reply| pod.pause(request.id, reply))
            .await?;
        Ok(Empty::default())
    }

    async fn resume(&self, context: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        let trace = self.pod.trace(context, "Resume", [&request.id, ""]);
        self.pod
            .ask_in(trace, move |pod, reply| pod.resume(request.id, reply))
            .await?;
        Ok(Empty::default())
    }

    async fn checkpoint(
        &self,
        _context: &TtrpcContext,
        _request: CheckpointTaskRequest,
    ) -> Result<Empty> {
        Err(Error::Unsupported("taking a checkpoint").into())
    }

    async fn connect(
        &self,
        _context: &TtrpcContext,
        request: ConnectRequest,
    ) -> Result<ConnectResponse> {
        let task_pid = self
            .pod
            .ask(move |pod, reply| pod.task_pid(&request.id, reply))
            .await?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _context: &TtrpcContext, request: ShutdownRequest) -> Result<Empty> {
        self.pod
            .ask(move |pod, reply| pod.shut_down(request.now, reply))
            .await?;
        Ok(Empty::default())
    }
}

/// Which of a container's processes were added.
fn details(exec_id: String) -> Option<Any> {
    if exec_id.is_empty() {
        return None;
    }
    let details = ProcessDetails {
        exec_id,
        ..ProcessDetails::default()
    };
    Some(Any {
        type_url: PROCESS_DETAILS.to_owned(),
        value: details.write_to_bytes().ok()?,
        ..Any::default()
    })
}
