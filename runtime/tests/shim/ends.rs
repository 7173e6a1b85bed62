//! How containers end that nobody treats well.

use std::fs;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{DeleteResponse, KillRequest, StateRequest, Status};
use containerd_shim_protos::protobuf::Message;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::Case;
use crate::case::{Node, block_on, is_alive};
use crate::containerd::{refusal, soon};
use crate::lifecycle::{added, finish, kill, running, status};

pub const CASES: &[Case] = &[
    ("end_of_the_machine_is_told", machine_dies),
    ("end_of_the_file_server_is_told", file_server_dies),
    ("end_of_the_shim_is_cleaned_up", shim_dies),
    ("end_of_what_nobody_waits_for", given_up),
    ("end_of_what_was_never_run", never_run),
    ("end_that_the_agent_does_not_tell", untold),
    ("end_despite_a_guest_that_ignores_kills", deaf),
    ("end_despite_a_vmm_that_takes_no_requests", deaf_vmm),
    ("end_of_a_vmm_that_answers_what_was_not_asked", chatty_vmm),
    ("end_of_an_added_process_alone", added_alone),
    ("end_asked_for_before_the_start_is_answered", killed_early),
    ("end_of_a_start_that_takes_for_ever", start_given_up),
    ("end_asked_for_twice", deleted_twice),
    ("end_is_cleaned_up_within_containerds_time", slowest_delete),
];

fn never_run() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("u", &["sleep"]);
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        let delete = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            shim.delete("u", "").await.unwrap()
        };
        let (end, deleted) = tokio::join!(shim.wait("u", ""), delete);
        assert_eq!((end.unwrap().exit_status, deleted.exit_status), (137, 137));
        node.events.wait_for("/tasks/delete", 1).await;
        let topics = node.events.topics();
        assert_eq!(topics[1..], ["/tasks/exit", "/tasks/delete"]);
        shim.shut_down("u").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}

fn untold() {
    block_on(async {
        let node = Node::new().await;
        let (_, shim) = running(&node, "w", &["enigma"]).await;
        assert_eq!(shim.wait("w", "").await.unwrap().exit_status, 255);
        node.events.wait_for("/tasks/exit", 1).await;
        finish(&node, &shim, "w").await;
    });
}

fn deaf() {
    block_on(async {
        let node = Node::new().await;
        let (_, shim) = running(&node, "k", &["deaf"]).await;
        let exec = added("k", "x", &["deaf"]);
        shim.task.exec(soon(), &exec).await.unwrap();
        shim.run("k", "x").await.unwrap();
        // One that was added is given up alone.
        kill(&shim, "k", "x", 9).await.unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        kill(&shim, "k", "", 9).await.unwrap();
        node.events
            .wait_until("/tasks/exit", 1, Duration::from_secs(30))
            .await;
        assert_eq!(status(&shim, "k").await, Status::RUNNING);
        node.events
            .wait_until("/tasks/exit", 2, Duration::from_secs(30))
            .await;
        let exits = node.events.exits();
        assert_eq!(exits, [("x".to_owned(), 137), ("k".to_owned(), 137)]);
        finish(&node, &shim, "k").await;
    });
}

fn deaf_vmm() {
    block_on(async {
        let node = Node::new().await;
        node.configure("kernel_parameters = 'fake.deaf'\n");
        let (bundle, shim) = running(&node, "v", &["sleep"]).await;
        // More requests than its socket holds.
        let stdout = bundle.fifo("out");
        let names: Vec<_> = (0..320).map(|number| format!("x{number}")).collect();
        for name in &names {
            let mut exec = added("v", name, &["echo", "x"]);
            exec.stdout.clone_from(&stdout);
            shim.task.exec(soon(), &exec).await.unwrap();
        }
        let starts = futures::future::join_all(names.iter().map(|name| shim.run("v", name)));
        let end = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            kill(&shim, "v", "", 9).await.unwrap();
            shim.wait("v", "").await.unwrap();
            let began = Instant::now();
            shim.delete("v", "").await.unwrap();
            assert!(began.elapsed() < Duration::from_secs(3));
        };
        let (starts, ()) = tokio::join!(starts, end);
        assert!(starts.iter().all(Result::is_err));
        shim.shut_down("v").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}

fn chatty_vmm() {
    block_on(async {
        let node = Node::new().await;
        node.configure("kernel_parameters = 'fake.chatty'\n");
        let (bundle, shim) = running(&node, "n", &["sleep"]).await;
        let mut exec = added("n", "x", &["sleep"]);
        exec.stdout = bundle.fifo("out");
        shim.task.exec(soon(), &exec).await.unwrap();
        // Which of the two the shim hears of first is chance.
        let _ = shim.run("n", "x").await;
        assert_eq!(shim.wait("n", "").await.unwrap().exit_status, 137);
        finish(&node, &shim, "n").await;
    });
}

fn machine_dies() {
    block_on(async {
        let node = Node::new().await;
        let (_, shim) = running(&node, "d", &["sleep"]).await;
        let request = StateRequest {
            id: "d".into(),
            ..StateRequest::default()
        };
        let state = shim.task.state(soon(), &request).await.unwrap();
        let began = Instant::now();
        let pid = rustix::process::Pid::from_raw(i32::try_from(state.pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        assert_eq!(shim.wait("d", "").await.unwrap().exit_status, 137);
        assert!(began.elapsed() < Duration::from_secs(2));
        node.events.wait_for("/tasks/exit", 1).await;
        assert_eq!(node.events.exits(), [("d".to_owned(), 137)]);
        let end = end_in_state(&node, "d");
        assert_eq!(end["reason"], "the VMM ended without a word");
        assert_eq!(end["kind"], "vmm-gone");
        assert_eq!(end["was_asked"], false);
        finish(&node, &shim, "d").await;
    });
}

/// What a pod's state says of its machine's end.
fn end_in_state(node: &Node, id: &str) -> Value {
    let file = node.state_dir().join("test").join(id).join("state.json");
    let state: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    state["end"].clone()
}

fn file_server_dies() {
    block_on(async {
        let node = Node::new().await;
        let (_, shim) = running(&node, "f", &["sleep"]).await;
        assert!(end_in_state(&node, "f").is_null());
        let file = node.state_dir().join("test/f/state.json");
        let state: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        let pid = i32::try_from(state["file_server"]["pid"].as_i64().unwrap()).unwrap();
        // It lets the guest know no more files than fit in its memory.
        let machine = &state["machine"];
        let mib = ["memory_mib", "pluggable_mib"].map(|name| machine[name].as_u64().unwrap());
        let nodes = format!("\0--nodes\0{}\0", (mib[0] + mib[1]) << 10);
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        assert!(command.contains(&nodes), "{command:?}, not {nodes:?}");
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        assert_eq!(shim.wait("f", "").await.unwrap().exit_status, 137);
        let end = end_in_state(&node, "f");
        assert_eq!(end["reason"], "the file server had ended");
        assert_eq!(end["kind"], "lost-file-server");
        assert_eq!(end["was_asked"], false);
        assert!(end["at_ns"].as_u64() > Some(1_600_000_000_000_000_000));
        finish(&node, &shim, "f").await;
    });
}

fn shim_dies() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim) = running(&node, "z", &["sleep"]).await;
        let state = std::fs::read(node.state_dir().join("test/z/state.json")).unwrap();
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
        let pid = |name: &str| i32::try_from(state[name]["pid"].as_i64().unwrap()).unwrap();
        let others = [pid("vmm"), pid("file_server")];
        assert!(others.into_iter().all(is_alive));
        let raw = rustix::process::Pid::from_raw(shim.pid).unwrap();
        rustix::process::kill_process(raw, rustix::process::Signal::KILL).unwrap();
        let dir = bundle.dir.display().to_string();
        let output = node.shim(&["-id", "z", "-bundle", &dir, "delete"], &bundle.dir, b"");
        assert!(output.status.success());
        let response = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(response.exit_status, 137);
        assert_eq!(i32::try_from(response.pid).unwrap(), others[0]);
        shim.assert_gone().await;
        assert!(!others.into_iter().any(is_alive));
        node.assert_clean();
    });
}

fn given_up() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("g", &["slow"]);
        let shim = node.start(&bundle).await;
        let hasty = ttrpc::context::with_duration(Duration::from_millis(200));
        assert!(shim.task.create(hasty, &bundle.request()).await.is_err());
        // What containerd does then, and it may come too early.
        assert_eq!(
            refusal(shim.delete("g", "").await).0,
            Code::FAILED_PRECONDITION
        );
        shim.shut_down("g").await;
        node.events.wait_for("/tasks/delete", 1).await;
        assert!(is_alive(shim.pid));
        // Its state is gone, and still it is found.
        let dir = bundle.dir.display().to_string();
        let output = node.shim(&["-id", "g", "-bundle", &dir, "delete"], &bundle.dir, b"");
        assert!(output.status.success());
        shim.assert_gone().await;
        node.assert_clean();
    });
}

fn added_alone() {
    block_on(async {
        let node = Node::new().await;
        let (_, shim) = running(&node, "a", &["sleep"]).await;
        shim.task
            .exec(soon(), &added("a", "x", &["sleep"]))
            .await
            .unwrap();
        // containerd says so of every process that it ends.
        let all = KillRequest {
            id: "a".into(),
            exec_id: "x".into(),
            signal: 9,
            all: true,
            ..KillRequest::default()
        };
        let answer = shim.task.kill(soon(), &all).await;
        assert_eq!(refusal(answer).0, Code::FAILED_PRECONDITION);
        shim.run("a", "x").await.unwrap();
        shim.task.kill(soon(), &all).await.unwrap();
        assert_eq!(shim.wait("a", "x").await.unwrap().exit_status, 137);
        assert_eq!(status(&shim, "a").await, Status::RUNNING);
        kill(&shim, "a", "", 9).await.unwrap();
        shim.wait("a", "").await.unwrap();
        finish(&node, &shim, "a").await;
    });
}

fn killed_early() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim) = running(&node, "b", &["sleep"]).await;
        let mut slow = added("b", "x", &["slow-cat"]);
        (slow.stdin, slow.stdout) = (bundle.fifo("in"), bundle.fifo("out"));
        shim.task.exec(soon(), &slow).await.unwrap();
        let hasty = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            kill(&shim, "b", "x", 9).await.unwrap();
        };
        let (started, ()) = tokio::join!(shim.run("b", "x"), hasty);
        started.unwrap();
        assert_eq!(shim.wait("b", "x").await.unwrap().exit_status, 137);
        kill(&shim, "b", "", 9).await.unwrap();
        shim.wait("b", "").await.unwrap();
        finish(&node, &shim, "b").await;
    });
}

fn start_given_up() {
    block_on(async {
        let node = Node::new().await;
        let (_, shim) = running(&node, "e", &["sleep"]).await;
        let stuck = added("e", "x", &["stuck"]);
        shim.task.exec(soon(), &stuck).await.unwrap();
        let hasty = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            kill(&shim, "e", "x", 9).await.unwrap();
        };
        let (started, ()) = tokio::join!(shim.run("e", "x"), hasty);
        assert!(refusal(started).1.contains("given up"));
        shim.delete("e", "x").await.unwrap();
        assert_eq!(node.events.exits(), []);
        kill(&shim, "e", "", 9).await.unwrap();
        shim.wait("e", "").await.unwrap();
        finish(&node, &shim, "e").await;
    });
}

fn deleted_twice() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim) = running(&node, "y", &["slow-to-go"]).await;
        kill(&shim, "y", "", 9).await.unwrap();
        shim.wait("y", "").await.unwrap();
        let hasty = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            // Neither is it there again, nor is it gone.
            assert_eq!(status(&shim, "y").await, Status::STOPPED);
            assert_eq!(shim.wait("y", "").await.unwrap().exit_status, 137);
            assert_eq!(refusal(kill(&shim, "y", "", 9).await).0, Code::NOT_FOUND);
            let answer = shim.create(&bundle.request()).await;
            assert_eq!(refusal(answer).0, Code::FAILED_PRECONDITION);
            shim.delete("y", "").await
        };
        let (first, second) = tokio::join!(shim.delete("y", ""), hasty);
        assert_eq!(first.unwrap(), second.unwrap());
        assert_eq!(refusal(shim.delete("y", "").await).0, Code::NOT_FOUND);
        node.events.wait_for("/tasks/delete", 1).await;
        shim.shut_down("y").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}

/// A pod's shim that neither answers nor ends, and a hook that goes on.
fn slowest_delete() {
    block_on(async {
        let node = Node::new().await;
        let ran = node.path("ran");
        let bundle = node.bundle("m", &["sleep"]).with(|spec| {
            let script = format!("echo ran > {}; exec sleep 100", ran.display());
            spec["hooks"] =
                json!({"poststop": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
            spec["annotations"] = json!({
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": "p",
            });
        });
        let mut deaf = std::process::Command::new("sh")
            .args(["-c", "read line", "sh", "-namespace", "test", "-id", "m"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", deaf.id())).unwrap();
        let (_, rest) = stat.rsplit_once(") ").unwrap();
        let ticks: u64 = rest.split(' ').nth(19).unwrap().parse().unwrap();
        let state = json!({
            "shim": {"pid": deaf.id(), "start_ticks": ticks}, "is_deleted": true,
        });
        let pod = node.state_dir().join("test/p");
        std::fs::create_dir_all(&pod).unwrap();
        std::fs::write(pod.join("state.json"), state.to_string()).unwrap();
        std::fs::write(bundle.dir.join("shim.pid"), deaf.id().to_string()).unwrap();
        std::fs::write(bundle.dir.join("husk-poststop"), "").unwrap();
        let dir = bundle.dir.display().to_string();
        let began = Instant::now();
        let output = node.shim(&["-id", "m", "-bundle", &dir, "delete"], &bundle.dir, b"");
        let took = began.elapsed();
        assert!(output.status.success());
        assert!(took < Duration::from_secs(5), "{took:?}");
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains("take too long"), "{errors}");
        assert_eq!(std::fs::read_to_string(&ran).unwrap(), "ran\n");
        assert!(!deaf.wait().unwrap().success());
    });
}
