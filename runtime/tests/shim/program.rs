//! The program's actions.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::ShutdownRequest;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim_async::TaskClient;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use serde_json::json;
use ttrpc::asynchronous::Client;

use crate::Case;
use crate::case::{Node, Shim, block_on, is_alive};
use crate::containerd::{connect, soon};
use crate::second_line::forbid;

pub const CASES: &[Case] = &[
    ("program_tells_version_and_info", version_and_info),
    ("program_refuses_unknown_flags", unknown_flags),
    ("program_answers_the_newer_protocol", newer_protocol),
    ("program_refuses_a_wrong_configuration", configuration),
    ("program_needs_the_pod_of_a_container", no_pod),
    ("program_deletes_what_was_never_there", delete_nothing),
    (
        "program_deletes_whatever_the_configuration",
        delete_misconfigured,
    ),
    ("program_deletes_a_socket_where_it_was_made", delete_socket),
    ("program_leaves_nothing_when_start_fails", start_fails),
    ("program_leaves_nothing_when_start_is_killed", start_killed),
    (
        "program_leaves_nothing_whenever_it_is_killed",
        killed_at_times,
    ),
    ("program_leaves_the_shim_that_serves", serves_already),
    ("program_tells_why_a_shim_cannot_serve", cannot_serve),
];

fn version_and_info() {
    block_on(async {
        let node = Node::new().await;
        let version = node.shim(&["-v"], &node.path(""), b"");
        assert!(String::from_utf8(version.stdout).unwrap().contains(" 0."));
        let info = node.shim(&["-info"], &node.path(""), b"");
        let info = RuntimeInfo::parse_from_bytes(&info.stdout).unwrap();
        assert_eq!(info.name, "io.containerd.husk.v2");
    });
}

fn unknown_flags() {
    block_on(async {
        let node = Node::new().await;
        let output = node.shim(&["-surprise", "start"], &node.path(""), b"");
        assert!(!output.status.success());
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains("-surprise"), "{errors}");
    });
}

fn newer_protocol() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("new", &["sleep"]);
        let output = node.shim(&["-id", "new", "start"], &bundle.dir, &params(&node, "new"));
        let shim = shim_at(&output.stdout, &bundle.dir).await;
        let dir = node.path("s").display().to_string();
        assert!(shim.address.contains(&dir), "{}", shim.address);
        shim.shut_down("new").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}

/// What containerd 2.3 asks with: sockets go to a directory of the node's.
fn params(node: &Node, id: &str) -> Vec<u8> {
    let params = BootstrapParams {
        instance_id: id.into(),
        namespace: "test".into(),
        containerd_ttrpc_address: node.events.path().display().to_string(),
        socket_dir: Some(node.path("s").display().to_string()),
        ..BootstrapParams::default()
    };
    params.write_to_bytes().unwrap()
}

/// containerd neither deletes nor knows what was left by a `start` that failed.
fn start_fails() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("f", &["sleep"]);
        std::fs::create_dir(bundle.dir.join(".shim.pid.new")).unwrap();
        let output = node.shim(&["-id", "f", "start"], &bundle.dir, &params(&node, "f"));
        assert!(!output.status.success());
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains("shim.pid"), "{errors}");
        assert_nothing_serves(&node);
    });
}

fn start_killed() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("k", &["sleep"]);
        // Nobody reads there: it waits when its shim has just begun.
        bundle.fifo(".address.new");
        let mut start = node.shim_process(&["-id", "k", "start"], &bundle.dir);
        let input = params(&node, "k");
        start.stdin.take().unwrap().write_all(&input).unwrap();
        let shim = wait_for("its shim", || child_of(start.id())).await;
        start.kill().unwrap();
        start.wait().unwrap();
        wait_for("its shim's end", || (!is_alive(shim)).then_some(())).await;
        assert_nothing_serves(&node);
    });
}

/// At whichever moment, unless it was done and a shim serves.
fn killed_at_times() {
    block_on(async {
        let node = Node::new().await;
        for delay in 0..30 {
            let id = format!("k{delay}");
            let bundle = node.bundle(&id, &["sleep"]);
            let mut start = node.shim_process(&["-id", &id, "start"], &bundle.dir);
            let input = params(&node, &id);
            start.stdin.take().unwrap().write_all(&input).unwrap();
            tokio::time::sleep(Duration::from_millis(delay)).await;
            let _ = start.kill();
            let output = start.wait_with_output().unwrap();
            if output.status.success() {
                shim_at(&output.stdout, &bundle.dir)
                    .await
                    .shut_down(&id)
                    .await;
            } else if let Ok(answer) = BootstrapResult::parse_from_bytes(&output.stdout) {
                // Its last word may have been that the shim is to serve.
                if let Ok(client) = Client::connect(&answer.address).await {
                    let shutdown = ShutdownRequest {
                        id,
                        ..ShutdownRequest::default()
                    };
                    let _ = TaskClient::new(client).shutdown(soon(), &shutdown).await;
                }
            }
        }
        wait_for("end of the sockets", || (sockets(&node) == 0).then_some(())).await;
        node.assert_clean();
    });
}

/// A second start finds that somebody serves, says so and lets it be.
fn serves_already() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("t", &["sleep"]);
        let input = params(&node, "t");
        let output = node.shim(&["-id", "t", "start"], &bundle.dir, &input);
        let again = node.shim(&["-id", "t", "start"], &bundle.dir, &input);
        assert!(!again.status.success());
        let errors = String::from_utf8(again.stderr).unwrap();
        assert!(errors.contains("Address already in use"), "{errors}");
        let shim = shim_at(&output.stdout, &bundle.dir).await;
        shim.shut_down("t").await;
        shim.assert_gone().await;
        assert_nothing_serves(&node);
    });
}

/// The shim that an answer of the newer protocol names.
async fn shim_at(answer: &[u8], bundle: &Path) -> Shim {
    let result = BootstrapResult::parse_from_bytes(answer).unwrap();
    assert_eq!((result.version, &*result.protocol), (3, "ttrpc"));
    let pid = std::fs::read_to_string(bundle.join("shim.pid")).unwrap();
    Shim {
        task: connect(&result.address).await,
        pid: pid.parse().unwrap(),
        address: result.address,
    }
}

/// containerd is told no address of a shim that does not come to serve.
fn cannot_serve() {
    let without_mounts = || {
        forbid(libc::SYS_unshare, libc::ENOSPC);
        block_on(async {
            let node = Node::new().await;
            let bundle = node.bundle("w", &["sleep"]);
            let input = params(&node, "w");
            let output = node.shim(&["-id", "w", "start"], &bundle.dir, &input);
            assert!(!output.status.success());
            assert!(output.stdout.is_empty());
            let errors = String::from_utf8(output.stderr).unwrap();
            assert!(
                errors.contains("making a mount namespace: No space left on device"),
                "{errors}"
            );
            assert_nothing_serves(&node);
        });
    };
    // The filter stays with the thread.
    std::thread::spawn(without_mounts).join().unwrap();
}

fn sockets(node: &Node) -> usize {
    std::fs::read_dir(node.path("s")).map_or(0, Iterator::count)
}

fn assert_nothing_serves(node: &Node) {
    assert_eq!(sockets(node), 0);
    node.assert_clean();
}

async fn wait_for<T>(what: &str, find: impl Fn() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "no {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn child_of(parent: u32) -> Option<i32> {
    let entries = std::fs::read_dir("/proc").unwrap();
    let mut pids = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.find(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        rest.split(' ').nth(1) == Some(&parent.to_string())
    })
}

fn configuration() {
    block_on(async {
        let node = Node::new().await;
        node.configure("kernal = '/k'\n");
        let bundle = node.bundle("wrong", &["sleep"]);
        let output = node.shim(&["-id", "wrong", "start"], &bundle.dir, b"");
        assert!(!output.status.success());
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains("kernal"), "{errors}");
        node.assert_clean();
    });
}

fn no_pod() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("member", &["sleep"]).with(|spec| {
            spec["annotations"] = json!({
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": "lost",
            });
        });
        let output = node.shim(&["-id", "member", "start"], &bundle.dir, b"");
        assert!(!output.status.success());
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains("lost"), "{errors}");
    });
}

fn delete_nothing() {
    block_on(async {
        use containerd_shim_protos::api::DeleteResponse;
        let node = Node::new().await;
        let output = node.shim(
            &["-id", "never", "-bundle", "/nowhere", "delete"],
            &node.path(""),
            b"",
        );
        assert!(output.status.success());
        let response = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(response.exit_status, 137);
        assert!(response.exited_at.seconds > 1_600_000_000);
    });
}

fn delete_misconfigured() {
    block_on(async {
        let node = Node::new().await;
        node.configure("kernal = '/k'\n");
        let arguments = ["-id", "p", "-bundle", "/nowhere", "delete"];
        let output = node.shim(&arguments, &node.path(""), b"");
        assert!(output.status.success());
        assert!(!output.stdout.is_empty());
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains("kernal"), "{errors}");
    });
}

fn delete_socket() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("gone", &["sleep"]);
        let output = node.shim(
            &["-id", "gone", "start"],
            &bundle.dir,
            &params(&node, "gone"),
        );
        assert!(output.status.success());
        assert_eq!(sockets(&node), 1);
        let dir = bundle.dir.display().to_string();
        let arguments = ["-id", "gone", "-bundle", &dir, "delete"];
        assert!(node.shim(&arguments, &bundle.dir, b"").status.success());
        assert_eq!(sockets(&node), 0);
        node.assert_clean();
    });
}
