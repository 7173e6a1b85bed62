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

pub const CASES: &[Case] = &[("crio_calls_the_older_service", older_service)];

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
            "",
        ])
        .args(["-id", &bundle.id, "start"])
        .env("HUSK_CONFIG", node.path("config.toml"))
        .env("TTRPC_ADDRESS", "")
        .current_dir(&bundle.dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

async fn call<T: Message>(client: &Client, method: &str, message: &impl Message) -> T {
    let request = Request {
        service: SERVICE.to_owned(),
        method: method.to_owned(),
        timeout_nano: 20_000_000_000,
        payload: message.write_to_bytes().unwrap(),
        ..Request::default()
    };
    let answer = client.request(request).await;
    let answer = answer.unwrap_or_else(|error| panic!("{method}: {error}"));
    T::parse_from_bytes(&answer.payload).unwrap()
}

fn annotated(node: &Node, id: &str, kind: &str, command: &[&str]) -> Bundle {
    node.bundle(id, command).with(|spec| {
        spec["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": kind,
            "io.kubernetes.cri-o.SandboxID": "pod",
            "io.kubernetes.cri-o.ContainerName": id,
        });
    })
}

fn older_service() {
    block_on(async {
        let node = Node::new().await;
        let pod = annotated(&node, "pod", "sandbox", &["/pause"]);
        let member = annotated(&node, "member", "container", &["sleep"]);
        let address = start(&node, &pod);
        let pid = std::fs::read_to_string(pod.dir.join("shim.pid")).unwrap();
        let shim = Shim {
            task: connect(&address).await,
            pid: pid.parse().unwrap(),
            address: address.clone(),
        };
        let client = Client::connect(&address).await.unwrap();
        for bundle in [&pod, &member] {
            if bundle.id == "member" {
                assert_eq!(start(&node, bundle), address);
            }
            let created: CreateTaskResponse = call(&client, "Create", &bundle.request()).await;
            assert_ne!(created.pid, 0);
            let start = StartRequest {
                id: bundle.id.clone(),
                ..StartRequest::default()
            };
            let started: StartResponse = call(&client, "Start", &start).await;
            assert_eq!(started.pid, created.pid);
            let state = StateRequest {
                id: bundle.id.clone(),
                ..StateRequest::default()
            };
            let state: StateResponse = call(&client, "State", &state).await;
            assert_eq!(state.status.enum_value(), Ok(Status::RUNNING));
        }
        for (bundle, code) in [(&member, 137), (&pod, 137)] {
            let id = bundle.id.clone();
            let kill = KillRequest {
                id: id.clone(),
                signal: 9,
                ..KillRequest::default()
            };
            let _: Empty = call(&client, "Kill", &kill).await;
            let wait = WaitRequest {
                id: id.clone(),
                ..WaitRequest::default()
            };
            let ended: WaitResponse = call(&client, "Wait", &wait).await;
            assert_eq!(ended.exit_status, code);
            let delete = DeleteRequest {
                id: id.clone(),
                ..DeleteRequest::default()
            };
            let deleted: DeleteResponse = call(&client, "Delete", &delete).await;
            assert_eq!(deleted.exit_status, code);
        }
        let shutdown = ShutdownRequest {
            id: "pod".to_owned(),
            ..ShutdownRequest::default()
        };
        let _: Empty = call(&client, "Shutdown", &shutdown).await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}
