//! CRI-O: no address of its own, none for events, its own annotations, and the
//! Task service by its older name.

use std::process::{Command, Stdio};

use containerd_shim_protos::api::{
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, KillRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, Status, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim_async::Client;
use serde_json::json;
use ttrpc::proto::Request;

use crate::Case;
use crate::case::{Bundle, Node, Shim, block_on};
use crate::containerd::connect;

pub const CASES: &[Case] = &[
    ("crio_calls_the_older_service", older_service),
    ("crio_is_told_by_files_and_signals", files_and_signals),
];

const SERVICE: &str = "containerd.task.v2.Task";

/// As `runtime_type = "vm"` has it.
fn start(node: &Node, bundle: &Bundle) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_containerd-shim-husk-v2"))
        .args([
            "-namespace",
            "default",
            "-address",
            "",
            "-publish-binary",
            "/usr/bin/crio",
        ])
        .args(["-id", &bundle.id, "-debug", "start"])
        .env("HUSK_CONFIG", node.path("config.toml"))
        .env("TTRPC_ADDRESS", "")
        .current_dir(&bundle.dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    // It takes both outputs together for the address.
    assert_eq!(errors, "");
    String::from_utf8(output.stdout).unwrap()
}

/// The shim of a new pod, and a client as CRI-O is one.
async fn start_pod(node: &Node, pod: &Bundle) -> (Shim, Client) {
    let address = start(node, pod);
    let client = Client::connect(&address).await.unwrap();
    let pid = std::fs::read_to_string(pod.dir.join("shim.pid")).unwrap();
    let shim = Shim {
        task: connect(&address).await,
        pid: pid.parse().unwrap(),
        address,
    };
    (shim, client)
}

async fn call<T: Message>(client: &Client, method: &str, message: &impl Message) -> T {
    let answer = try_call(client, method, message).await;
    answer.unwrap_or_else(|error| panic!("{method}: {error}"))
}

async fn try_call<T: Message>(
    client: &Client,
    method: &str,
    message: &impl Message,
) -> ttrpc::Result<T> {
    let request = Request {
        service: SERVICE.to_owned(),
        method: method.to_owned(),
        timeout_nano: 20_000_000_000,
        payload: message.write_to_bytes().unwrap(),
        ..Request::default()
    };
    let answer = client.request(request).await?;
    Ok(T::parse_from_bytes(&answer.payload).unwrap())
}

async fn create_and_start(client: &Client, bundle: &Bundle) {
    let created: CreateTaskResponse = call(client, "Create", &bundle.request()).await;
    assert_ne!(created.pid, 0);
    let start = StartRequest {
        id: bundle.id.clone(),
        ..StartRequest::default()
    };
    let started: StartResponse = call(client, "Start", &start).await;
    assert_eq!(started.pid, created.pid);
    assert_eq!(status(client, &bundle.id).await, Status::RUNNING);
}

async fn status(client: &Client, id: &str) -> Status {
    let state = StateRequest {
        id: id.to_owned(),
        ..StateRequest::default()
    };
    let state: StateResponse = call(client, "State", &state).await;
    state.status.enum_value().unwrap()
}

async fn kill(client: &Client, id: &str, signal: u32) -> ttrpc::Result<Empty> {
    let kill = KillRequest {
        id: id.to_owned(),
        signal,
        ..KillRequest::default()
    };
    try_call(client, "Kill", &kill).await
}

/// Waits for the end and deletes what is left; the exit code.
async fn finish(client: &Client, id: &str) -> u32 {
    let wait = WaitRequest {
        id: id.to_owned(),
        ..WaitRequest::default()
    };
    let ended: WaitResponse = call(client, "Wait", &wait).await;
    let delete = DeleteRequest {
        id: id.to_owned(),
        ..DeleteRequest::default()
    };
    // Whether it is there; CRI-O asks so before it restarts anything.
    assert!(kill(client, id, 0).await.is_err());
    let deleted: DeleteResponse = call(client, "Delete", &delete).await;
    assert_eq!(deleted.exit_status, ended.exit_status);
    ended.exit_status
}

/// CRI-O says it after each container, whatever else is in the pod.
async fn shut_down(client: &Client, id: &str) {
    let shutdown = ShutdownRequest {
        id: id.to_owned(),
        ..ShutdownRequest::default()
    };
    let _: Empty = call(client, "Shutdown", &shutdown).await;
}

/// A pod's id that nobody else on this machine has: CRI-O names no address of its own,
/// so the shim's socket is told apart by namespace and id alone.
fn pod_id(word: &str) -> String {
    format!("{word}-{}", std::process::id())
}

fn annotated(node: &Node, pod: &str, id: &str, kind: &str, command: &[&str]) -> Bundle {
    node.bundle(id, command).with(|spec| {
        spec["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": kind,
            "io.kubernetes.cri-o.SandboxID": pod,
            "io.kubernetes.cri-o.ContainerName": id,
        });
    })
}

fn older_service() {
    block_on(async {
        let node = Node::new().await;
        let id = pod_id("pod");
        let pod = annotated(&node, &id, &id, "sandbox", &["/pause"]);
        let member = annotated(&node, &id, "member", "container", &["sleep"]);
        let (shim, client) = start_pod(&node, &pod).await;
        for bundle in [&pod, &member] {
            if bundle.id == "member" {
                assert_eq!(start(&node, bundle), shim.address);
            }
            create_and_start(&client, bundle).await;
        }
        for bundle in [&member, &pod] {
            kill(&client, &bundle.id, 9).await.unwrap();
            assert_eq!(finish(&client, &bundle.id).await, 137);
        }
        shut_down(&client, &id).await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}

/// The address where it looks after its own restart, the end of memory, whether a
/// container lives; a pod whose container is shut down.
fn files_and_signals() {
    block_on(async {
        let node = Node::new().await;
        let id = pod_id("eaten");
        let pod = annotated(&node, &id, &id, "sandbox", &["/pause"]);
        let eater = annotated(&node, &id, "eater", "container", &["oom"]);
        let (shim, client) = start_pod(&node, &pod).await;
        create_and_start(&client, &pod).await;
        start(&node, &eater);
        for bundle in [&pod, &eater] {
            let file = std::fs::read_to_string(bundle.dir.join("address"));
            assert_eq!(file.unwrap(), shim.address);
        }
        let _: CreateTaskResponse = call(&client, "Create", &eater.request()).await;
        let start = StartRequest {
            id: eater.id.clone(),
            ..StartRequest::default()
        };
        let _: StartResponse = call(&client, "Start", &start).await;
        assert_eq!(finish(&client, "eater").await, 137);
        assert!(eater.dir.join("oom").exists());
        assert!(!pod.dir.join("oom").exists());
        shut_down(&client, "eater").await;

        assert_eq!(status(&client, &id).await, Status::RUNNING);
        kill(&client, &id, 0).await.unwrap();
        kill(&client, &id, 9).await.unwrap();
        assert_eq!(finish(&client, &id).await, 137);
        shut_down(&client, &id).await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}
