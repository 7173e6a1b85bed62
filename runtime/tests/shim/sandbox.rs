//! A pod of Kubernetes.

use std::time::{Duration, Instant};

use containerd_shim_protos::api::{KillRequest, StateRequest, StatsRequest};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PlatformRequest, SandboxStatusRequest, ShutdownSandboxRequest,
    StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::Client;
use serde_json::json;
use ttrpc::Code;

use crate::Case;
use crate::agent::FLOOD;
use crate::case::{Bundle, Node, Shim, block_on, is_alive};
use crate::containerd::{refusal, soon};

pub const CASES: &[Case] = &[
    ("pod_shares_one_shim", one_shim),
    ("pod_restarts_its_only_container", restart),
    ("pod_takes_its_containers_with_it", killed_at_once),
    ("pod_stays_until_its_last_deletion", deleted_at_once),
    ("pod_may_be_deleted_before_its_container", deleted_first),
    ("pod_of_a_dead_shim_goes_at_last", deleted_and_dead),
    ("pod_shares_a_volume_until_its_last_user", shared_volume),
    ("pod_of_the_sandbox_api", sandbox_api),
    ("pod_has_a_pid_for_each_container", pids),
];

fn pod(node: &Node, id: &str) -> Bundle {
    node.bundle(id, &["/pause"]).with(|spec| {
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-id": id,
        });
    })
}

pub fn member(node: &Node, id: &str, pod: &str, command: &[&str]) -> Bundle {
    node.bundle(id, command).with(|spec| {
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": pod,
        });
    })
}

pub async fn up(node: &Node, id: &str) -> Shim {
    let bundle = pod(node, id);
    let shim = node.start(&bundle).await;
    shim.create(&bundle.request()).await.unwrap();
    shim.run(id, "").await.unwrap();
    shim
}

pub async fn add(node: &Node, shim: &Shim, bundle: &Bundle) {
    assert_eq!(node.start(bundle).await.address, shim.address);
    shim.create(&bundle.request()).await.unwrap();
    shim.run(&bundle.id, "").await.unwrap();
}

pub async fn kill(shim: &Shim, id: &str) {
    let request = KillRequest {
        id: id.to_owned(),
        signal: 9,
        ..KillRequest::default()
    };
    shim.task.kill(soon(), &request).await.unwrap();
    assert_eq!(shim.wait(id, "").await.unwrap().exit_status, 137);
}

pub async fn remove(node: &Node, shim: &Shim, id: &str) {
    shim.delete(id, "").await.unwrap();
    shim.shut_down(id).await;
    shim.assert_gone().await;
    node.assert_clean();
}

fn one_shim() {
    block_on(async {
        let node = Node::new().await;
        let shim = up(&node, "p1").await;
        for id in ["a", "b"] {
            add(&node, &shim, &member(&node, id, "p1", &["sleep"])).await;
        }
        // It has no processes of its own.
        let stats = StatsRequest {
            id: "p1".into(),
            ..StatsRequest::default()
        };
        let stats = shim
            .task
            .stats(soon(), &stats)
            .await
            .unwrap()
            .stats
            .unwrap();
        Metrics::parse_from_bytes(&stats.value).unwrap();
        for id in ["a", "b"] {
            kill(&shim, id).await;
            shim.delete(id, "").await.unwrap();
            // containerd asks after each.
            shim.shut_down(id).await;
        }
        kill(&shim, "p1").await;
        let late = member(&node, "late", "p1", &["sleep"]);
        let (code, message) = refusal(shim.create(&late.request()).await);
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        remove(&node, &shim, "p1").await;
    });
}

fn restart() {
    block_on(async {
        let node = Node::new().await;
        let shim = up(&node, "p2").await;
        for _ in 0..3 {
            let bundle = member(&node, "c", "p2", &["exit", "1"]);
            add(&node, &shim, &bundle).await;
            assert_eq!(shim.wait("c", "").await.unwrap().exit_status, 1);
            shim.delete("c", "").await.unwrap();
        }
        kill(&shim, "p2").await;
        remove(&node, &shim, "p2").await;
    });
}

fn shared_volume() {
    block_on(async {
        let node = Node::new().await;
        let shim = up(&node, "p6").await;
        let volume = node.path("volume");
        std::fs::create_dir(&volume).unwrap();
        let shared = "/run/husk/shared/.volumes/0";
        let user = |id: &str, volumes: &[&str]| {
            let root = format!("/run/husk/shared/{id}/rootfs");
            let command = [&["leaves", &root], volumes].concat();
            member(&node, id, "p6", &command).with(|spec| {
                spec["mounts"] = json!([{
                    "destination": "/v", "type": "bind",
                    "source": volume, "options": ["rbind", "rw"],
                }]);
            })
        };
        add(&node, &shim, &user("a", &[])).await;
        add(&node, &shim, &user("b", &[shared])).await;
        for id in ["a", "b"] {
            kill(&shim, id).await;
            shim.delete(id, "").await.unwrap();
        }
        // The guest was satisfied.
        add(&node, &shim, &member(&node, "c", "p6", &["sleep"])).await;
        for id in ["c", "p6"] {
            kill(&shim, id).await;
        }
        shim.delete("c", "").await.unwrap();
        remove(&node, &shim, "p6").await;
    });
}

fn killed_at_once() {
    block_on(async {
        let node = Node::new().await;
        let shim = up(&node, "p3").await;
        add(&node, &shim, &member(&node, "c3", "p3", &["sleep"])).await;
        kill(&shim, "p3").await;
        assert_eq!(shim.wait("c3", "").await.unwrap().exit_status, 137);
        node.events.wait_for("/tasks/exit", 2).await;
        let ids: Vec<_> = node.events.exits().into_iter().map(|(id, _)| id).collect();
        assert_eq!(ids, ["c3", "p3"]);
        shim.delete("c3", "").await.unwrap();
        remove(&node, &shim, "p3").await;
    });
}

fn deleted_first() {
    block_on(async {
        let node = Node::new().await;
        let shim = up(&node, "p7").await;
        add(&node, &shim, &member(&node, "c7", "p7", &["sleep"])).await;
        kill(&shim, "p7").await;
        assert_eq!(shim.wait("p7", "").await.unwrap().exit_status, 137);
        shim.delete("p7", "").await.unwrap();
        // containerd closes its connection, and then does this.
        let dir = node.path("bundles").join("p7");
        let bundle = dir.display().to_string();
        let output = node.shim(&["-id", "p7", "-bundle", &bundle, "delete"], &dir, b"");
        assert!(output.status.success());
        assert_eq!(shim.wait("c7", "").await.unwrap().exit_status, 137);
        shim.delete("c7", "").await.unwrap();
        node.events.wait_for("/tasks/delete", 2).await;
        shim.shut_down("c7").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}

fn deleted_and_dead() {
    block_on(async {
        let node = Node::new().await;
        let shim = up(&node, "p8").await;
        add(&node, &shim, &member(&node, "c8", "p8", &["sleep"])).await;
        kill(&shim, "p8").await;
        shim.delete("p8", "").await.unwrap();
        let delete = |id: &str| {
            let dir = node.path("bundles").join(id);
            let bundle = dir.display().to_string();
            let output = node.shim(&["-id", id, "-bundle", &bundle, "delete"], &dir, b"");
            assert!(output.status.success());
        };
        delete("p8");
        assert!(node.state_dir().join("test/p8").exists());
        let raw = rustix::process::Pid::from_raw(shim.pid).unwrap();
        rustix::process::kill_process(raw, rustix::process::Signal::KILL).unwrap();
        // containerd sees its connection close, which may be before the process
        // is seen to have ended; it does not ask for the pod again.
        let path = shim.address.strip_prefix("unix://").unwrap();
        while std::os::unix::net::UnixStream::connect(path).is_ok() {}
        delete("c8");
        shim.assert_gone().await;
        node.assert_clean();
    });
}

fn deleted_at_once() {
    block_on(async {
        let node = Node::new().await;
        let shim = up(&node, "p5").await;
        let volume = node.path("volume");
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(volume.join("file"), "precious").unwrap();
        let bundle = member(&node, "c5", "p5", &["flood"]).with(|spec| {
            spec["mounts"] = json!([{
                "destination": "/v", "type": "bind",
                "source": volume, "options": ["rbind", "rw"],
            }]);
        });
        let mut request = bundle.request();
        request.stdout = bundle.fifo("out");
        shim.create(&request).await.unwrap();
        shim.run("c5", "").await.unwrap();
        assert_eq!(shim.wait("c5", "").await.unwrap().exit_status, 0);
        kill(&shim, "p5").await;
        // Both at once, and nobody has read the container's output yet.
        let read_late = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(node.state_dir().join("test/p5/state.json").exists());
            let path = request.stdout.clone();
            let read = tokio::task::spawn_blocking(move || std::fs::read(path).unwrap());
            assert_eq!(read.await.unwrap().len(), FLOOD);
        };
        let (first, last, ()) =
            tokio::join!(shim.delete("c5", ""), shim.delete("p5", ""), read_late);
        first.unwrap();
        last.unwrap();
        let kept = std::fs::read_to_string(volume.join("file")).unwrap();
        assert_eq!(kept, "precious");
        shim.shut_down("p5").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}

/// By which containerd says whose PID namespace another shall join.
fn pids() {
    block_on(async {
        let node = Node::new().await;
        let bundle = pod(&node, "p9");
        let shim = node.start(&bundle).await;
        let of_pod = shim.create(&bundle.request()).await.unwrap().pid;
        shim.run("p9", "").await.unwrap();
        let mut pids = vec![of_pod];
        for id in ["a", "b"] {
            let bundle = member(&node, id, "p9", &["sleep"]);
            let pid = shim.create(&bundle.request()).await.unwrap().pid;
            assert_eq!(shim.run(id, "").await.unwrap(), pid);
            let state = StateRequest {
                id: id.to_owned(),
                ..StateRequest::default()
            };
            assert_eq!(shim.task.state(soon(), &state).await.unwrap().pid, pid);
            assert!(!pids.contains(&pid), "{pid} in {pids:?}");
            assert!(is_alive(pid.cast_signed()));
            pids.push(pid);
        }
        let debugger = |id: &str, pid: u32, path: &str| {
            member(&node, id, "p9", &["joins", path]).with(|spec| {
                spec["linux"]["namespaces"][0]["path"] = format!("/proc/{pid}/ns/pid").into();
            })
        };
        let of_b = "/run/husk/containers/b";
        add(&node, &shim, &debugger("d1", pids[2], of_b)).await;
        // That of the pod, which its containers share.
        let of_all = format!("/proc/{of_pod}/ns/pid");
        add(&node, &shim, &debugger("d2", of_pod, &of_all)).await;
        for id in ["a", "b", "d1", "d2"] {
            kill(&shim, id).await;
            let deleted = shim.delete(id, "").await.unwrap();
            let known = pids.iter().skip(1).find(|pid| **pid == deleted.pid);
            assert_eq!(known.is_some(), !id.starts_with('d'), "{id}");
        }
        let began = Instant::now();
        while pids[1..].iter().any(|pid| is_alive(pid.cast_signed())) {
            assert!(began.elapsed() < Duration::from_secs(5));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        kill(&shim, "p9").await;
        remove(&node, &shim, "p9").await;
    });
}

fn sandbox_api() {
    block_on(async {
        let node = Node::new().await;
        // Without a spec, as containerd makes its bundle.
        let bundle = node.bundle("p4", &[]);
        std::fs::remove_file(bundle.dir.join("config.json")).unwrap();
        let shim = node.start(&bundle).await;
        let sandbox = SandboxClient::new(Client::connect(&shim.address).await.unwrap());
        let sandbox_id = || "p4".to_owned();
        let create = CreateSandboxRequest {
            sandbox_id: sandbox_id(),
            bundle_path: bundle.dir.display().to_string(),
            ..CreateSandboxRequest::default()
        };
        sandbox.create_sandbox(soon(), &create).await.unwrap();
        let start = StartSandboxRequest {
            sandbox_id: sandbox_id(),
            ..StartSandboxRequest::default()
        };
        let started = sandbox.start_sandbox(soon(), &start).await.unwrap();
        let status = SandboxStatusRequest {
            sandbox_id: sandbox_id(),
            ..SandboxStatusRequest::default()
        };
        let told = sandbox.sandbox_status(soon(), &status).await.unwrap();
        assert_eq!((&*told.state, told.pid), ("SANDBOX_READY", started.pid));
        let platform = PlatformRequest::default();
        let platform = sandbox.platform(soon(), &platform).await.unwrap().platform;
        assert_eq!(platform.os, "linux");

        let member = member(&node, "c4", "p4", &["sleep"]);
        shim.create(&member.request()).await.unwrap();
        shim.run("c4", "").await.unwrap();
        kill(&shim, "c4").await;
        shim.delete("c4", "").await.unwrap();

        let stop = StopSandboxRequest {
            sandbox_id: sandbox_id(),
            ..StopSandboxRequest::default()
        };
        sandbox.stop_sandbox(soon(), &stop).await.unwrap();
        let wait = WaitSandboxRequest {
            sandbox_id: sandbox_id(),
            ..WaitSandboxRequest::default()
        };
        let end = sandbox.wait_sandbox(soon(), &wait).await.unwrap();
        assert_eq!(end.exit_status, 143);
        let told = sandbox.sandbox_status(soon(), &status).await.unwrap();
        assert_eq!(told.state, "SANDBOX_NOTREADY");
        // A second time changes nothing.
        sandbox.stop_sandbox(soon(), &stop).await.unwrap();
        let end = ShutdownSandboxRequest {
            sandbox_id: sandbox_id(),
            ..ShutdownSandboxRequest::default()
        };
        sandbox.shutdown_sandbox(soon(), &end).await.unwrap();
        shim.assert_gone().await;
        node.assert_clean();
    });
}
