//! A container that is a pod of its own.

use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, ResumeRequest, StateRequest, StatsRequest, Status,
};
use containerd_shim_protos::protobuf::Message;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::Code;

use crate::Case;
use crate::case::{Bundle, Node, Shim, block_on, is_alive};
use crate::containerd::{connect, refusal, soon};

pub const CASES: &[Case] = &[
    ("life_from_create_to_delete", whole_life),
    ("life_streams_are_whole", streams),
    ("life_of_added_processes", execs),
    ("life_pauses_and_tells", pause_and_queries),
    ("life_states_hold", states),
    ("life_out_of_memory_is_told", out_of_memory),
    ("life_sees_an_early_end_of_input", input_closed_early),
    ("life_leaves_no_ports_behind", failed_execs),
    ("life_outlives_containerd", containerd_restarts),
    ("life_without_events", no_events),
    ("end_of_the_machine_is_told", machine_dies),
    ("end_of_the_shim_is_cleaned_up", shim_dies),
    ("end_of_what_nobody_waits_for", given_up),
    ("end_of_what_was_never_run", never_run),
    ("end_that_the_agent_does_not_tell", untold),
    ("end_despite_a_guest_that_ignores_kills", deaf),
    ("end_despite_a_vmm_that_takes_no_requests", deaf_vmm),
];

async fn running(node: &Node, id: &str, command: &[&str]) -> (Bundle, Shim) {
    let bundle = node.bundle(id, command);
    let shim = node.start(&bundle).await;
    shim.create(&bundle.request()).await.unwrap();
    shim.run(id, "").await.unwrap();
    (bundle, shim)
}

async fn finish(node: &Node, shim: &Shim, id: &str) {
    shim.delete(id, "").await.unwrap();
    shim.shut_down(id).await;
    shim.assert_gone().await;
    node.assert_clean();
}

async fn kill(shim: &Shim, id: &str, exec: &str, signal: u32) -> ttrpc::Result<()> {
    let request = KillRequest {
        id: id.to_owned(),
        exec_id: exec.to_owned(),
        signal,
        ..KillRequest::default()
    };
    shim.task.kill(soon(), &request).await.map(drop)
}

async fn status(shim: &Shim, id: &str) -> Status {
    let request = StateRequest {
        id: id.to_owned(),
        ..StateRequest::default()
    };
    let state = shim.task.state(soon(), &request).await.unwrap();
    state.status.unwrap()
}

fn whole_life() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("t1", &["exit", "3"]);
        let shim = node.start(&bundle).await;
        let created = shim.create(&bundle.request()).await.unwrap();
        assert!(is_alive(i32::try_from(created.pid).unwrap()));
        assert_eq!(status(&shim, "t1").await, Status::CREATED);
        assert_eq!(shim.run("t1", "").await.unwrap(), created.pid);
        let end = shim.wait("t1", "").await.unwrap();
        assert_eq!(end.exit_status, 3);
        // The node's time and not the guest's, which is long past.
        assert!(end.exited_at.seconds > 1_600_000_000);
        assert_eq!(status(&shim, "t1").await, Status::STOPPED);
        let deleted = shim.delete("t1", "").await.unwrap();
        assert_eq!((deleted.exit_status, deleted.pid), (3, created.pid));
        node.events.wait_for("/tasks/delete", 1).await;
        assert_eq!(
            node.events.topics(),
            [
                "/tasks/create",
                "/tasks/start",
                "/tasks/exit",
                "/tasks/delete"
            ]
        );
        assert_eq!(node.events.exits(), [("t1".to_owned(), 3)]);
        assert!(!is_alive(i32::try_from(created.pid).unwrap()));
        node.assert_clean();
        shim.shut_down("t1").await;
        shim.assert_gone().await;
    });
}

fn streams() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("s", &["cat"]);
        let shim = node.start(&bundle).await;
        let mut request = bundle.request();
        request.stdin = bundle.fifo("in");
        request.stdout = bundle.fifo("out");
        shim.create(&request).await.unwrap();
        shim.run("s", "").await.unwrap();
        let text: Vec<u8> = (0..4_u32 << 20).map(|n| (n / 251) as u8).collect();
        let (path, input) = (request.stdin.clone(), text.clone());
        let writer = tokio::task::spawn_blocking(move || {
            std::fs::File::options()
                .write(true)
                .open(path)
                .unwrap()
                .write_all(&input)
                .unwrap();
        });
        let path = request.stdout.clone();
        let reader = tokio::task::spawn_blocking(move || {
            let mut output = Vec::new();
            let mut file = std::fs::File::open(path).unwrap();
            file.read_to_end(&mut output).unwrap();
            output
        });
        writer.await.unwrap();
        let request = CloseIORequest {
            id: "s".into(),
            stdin: true,
            ..CloseIORequest::default()
        };
        shim.task.close_io(soon(), &request).await.unwrap();
        assert_eq!(shim.wait("s", "").await.unwrap().exit_status, 0);
        assert!(reader.await.unwrap() == text, "output differs");
        finish(&node, &shim, "s").await;
    });
}

fn execs() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim) = running(&node, "e", &["sleep"]).await;
        let request = |exec: &str, command: &[&str]| added("e", exec, command);
        let mut first = request("x1", &["complain", "no"]);
        first.stderr = bundle.fifo("err");
        shim.task.exec(soon(), &first).await.unwrap();
        let (code, _) = refusal(shim.task.exec(soon(), &first).await);
        assert_eq!(code, Code::ALREADY_EXISTS);
        // Open before there is a writer, as containerd does.
        let mut errors = std::fs::File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&first.stderr)
            .unwrap();
        shim.run("e", "x1").await.unwrap();
        assert_eq!(shim.wait("e", "x1").await.unwrap().exit_status, 0);
        let mut text = String::new();
        errors.read_to_string(&mut text).unwrap();
        assert_eq!(text, "no");
        shim.delete("e", "x1").await.unwrap();
        assert_eq!(refusal(shim.delete("e", "x1").await).0, Code::NOT_FOUND);

        shim.task
            .exec(soon(), &request("x2", &["missing"]))
            .await
            .unwrap();
        assert_eq!(refusal(shim.run("e", "x2").await).0, Code::NOT_FOUND);
        shim.delete("e", "x2").await.unwrap();

        // One that still runs ends with the container, and is told before it.
        shim.task
            .exec(soon(), &request("x3", &["sleep"]))
            .await
            .unwrap();
        shim.run("e", "x3").await.unwrap();
        let all = KillRequest {
            id: "e".into(),
            signal: 9,
            all: true,
            ..KillRequest::default()
        };
        shim.task.kill(soon(), &all).await.unwrap();
        assert_eq!(shim.wait("e", "").await.unwrap().exit_status, 137);
        node.events.wait_for("/tasks/exit", 3).await;
        let exits = node.events.exits();
        assert_eq!(
            exits,
            [
                ("x1".to_owned(), 0),
                ("x3".to_owned(), 137),
                ("e".to_owned(), 137)
            ]
        );
        let topics = node.events.topics();
        let count = |topic: &str| topics.iter().filter(|t| *t == topic).count();
        assert_eq!(count("/tasks/exec-added"), 3);
        assert_eq!(count("/tasks/exec-started"), 2);
        finish(&node, &shim, "e").await;
    });
}

fn pause_and_queries() {
    block_on(async {
        let node = Node::new().await;
        let (_, shim) = running(&node, "q", &["sleep"]).await;
        let id = || "q".to_owned();
        let pause = PauseRequest {
            id: id(),
            ..PauseRequest::default()
        };
        let resume = ResumeRequest {
            id: id(),
            ..ResumeRequest::default()
        };
        assert_eq!(
            refusal(shim.task.resume(soon(), &resume).await).0,
            Code::FAILED_PRECONDITION
        );
        shim.task.pause(soon(), &pause).await.unwrap();
        assert_eq!(status(&shim, "q").await, Status::PAUSED);
        shim.task.resume(soon(), &resume).await.unwrap();
        assert_eq!(status(&shim, "q").await, Status::RUNNING);
        let topics = node.events.topics();
        assert!(topics.contains(&"/tasks/paused".to_owned()), "{topics:?}");
        node.events.wait_for("/tasks/resumed", 1).await;

        let pids = PidsRequest {
            id: id(),
            ..PidsRequest::default()
        };
        let pids = shim.task.pids(soon(), &pids).await.unwrap();
        // The node's, whatever the guest may say.
        let machine = i32::try_from(pids.processes[0].pid).unwrap();
        assert!(is_alive(machine) && pids.processes.len() == 1);
        let stats = StatsRequest {
            id: id(),
            ..StatsRequest::default()
        };
        let stats = shim
            .task
            .stats(soon(), &stats)
            .await
            .unwrap()
            .stats
            .unwrap();
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        assert_eq!(stats.value, [0x0a, 2, 0x08, 5]);
        let who = ConnectRequest {
            id: id(),
            ..ConnectRequest::default()
        };
        let who = shim.task.connect(soon(), &who).await.unwrap();
        assert_eq!(i32::try_from(who.shim_pid).unwrap(), shim.pid);
        let checkpoint = CheckpointTaskRequest {
            id: id(),
            ..CheckpointTaskRequest::default()
        };
        let (code, _) = refusal(shim.task.checkpoint(soon(), &checkpoint).await);
        assert_eq!(code, Code::UNIMPLEMENTED);

        kill(&shim, "q", "", 15).await.unwrap();
        assert_eq!(shim.wait("q", "").await.unwrap().exit_status, 143);
        assert_eq!(refusal(kill(&shim, "q", "", 15).await).0, Code::NOT_FOUND);
        finish(&node, &shim, "q").await;
    });
}

fn states() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim) = running(&node, "h", &["sleep"]).await;
        for (answer, code) in [
            (shim.run("h", "").await.map(drop), Code::FAILED_PRECONDITION),
            (
                shim.delete("h", "").await.map(drop),
                Code::FAILED_PRECONDITION,
            ),
            (
                shim.create(&bundle.request()).await.map(drop),
                Code::ALREADY_EXISTS,
            ),
            (shim.run("other", "").await.map(drop), Code::NOT_FOUND),
            (shim.run("h", "other").await.map(drop), Code::NOT_FOUND),
            (kill(&shim, "h", "other", 9).await, Code::NOT_FOUND),
        ] {
            assert_eq!(refusal(answer).0, code);
        }
        let mut other = bundle.request();
        other.id = "../h".into();
        assert_eq!(refusal(shim.create(&other).await).0, Code::INVALID_ARGUMENT);
        // Not while there is a task.
        shim.shut_down("h").await;
        kill(&shim, "h", "", 9).await.unwrap();
        shim.wait("h", "").await.unwrap();
        finish(&node, &shim, "h").await;
    });
}

fn out_of_memory() {
    block_on(async {
        let node = Node::new().await;
        let (_, shim) = running(&node, "o", &["oom"]).await;
        assert_eq!(shim.wait("o", "").await.unwrap().exit_status, 137);
        node.events.wait_for("/tasks/exit", 1).await;
        // Once, though the agent tells it twice, and before the end.
        let topics = node.events.topics();
        assert_eq!(topics[2..], ["/tasks/oom", "/tasks/exit"], "{topics:?}");
        assert_eq!(node.events.ooms(), ["o"]);
        finish(&node, &shim, "o").await;
    });
}

fn added(container: &str, exec: &str, command: &[&str]) -> ExecProcessRequest {
    ExecProcessRequest {
        id: container.to_owned(),
        exec_id: exec.to_owned(),
        spec: MessageField::some(Any {
            value: json!({"args": command}).to_string().into_bytes(),
            ..Any::default()
        }),
        ..ExecProcessRequest::default()
    }
}

fn input_closed_early() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim) = running(&node, "i", &["sleep"]).await;
        let mut cat = added("i", "x", &["slow-cat"]);
        cat.stdin = bundle.fifo("in");
        cat.stdout = bundle.fifo("out");
        shim.task.exec(soon(), &cat).await.unwrap();
        let client = async {
            // Gets through once the shim has opened the other end, and the guest
            // has not answered yet.
            let path = cat.stdin.clone();
            let write = tokio::task::spawn_blocking(move || std::fs::write(path, "x"));
            write.await.unwrap().unwrap();
            let request = CloseIORequest {
                id: "i".into(),
                exec_id: "x".into(),
                stdin: true,
                ..CloseIORequest::default()
            };
            shim.task.close_io(soon(), &request).await.unwrap();
        };
        let (started, ()) = tokio::join!(shim.run("i", "x"), client);
        started.unwrap();
        assert_eq!(shim.wait("i", "x").await.unwrap().exit_status, 0);
        kill(&shim, "i", "", 9).await.unwrap();
        shim.wait("i", "").await.unwrap();
        finish(&node, &shim, "i").await;
    });
}

fn failed_execs() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim) = running(&node, "f", &["sleep"]).await;
        let request = StateRequest {
            id: "f".into(),
            ..StateRequest::default()
        };
        let state = shim.task.state(soon(), &request).await.unwrap();
        let open = || {
            let path = format!("/proc/{}/fd", state.pid);
            std::fs::read_dir(path).unwrap().count()
        };
        let before = open();
        for number in 0..5 {
            let name = format!("x{number}");
            let mut exec = added("f", &name, &["missing"]);
            exec.stdout = bundle.fifo(&name);
            shim.task.exec(soon(), &exec).await.unwrap();
            assert_eq!(refusal(shim.run("f", &name).await).0, Code::NOT_FOUND);
            shim.delete("f", &name).await.unwrap();
        }
        assert_eq!(open(), before);
        kill(&shim, "f", "", 9).await.unwrap();
        shim.wait("f", "").await.unwrap();
        finish(&node, &shim, "f").await;
    });
}

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

fn containerd_restarts() {
    block_on(async {
        let mut node = Node::new().await;
        let (_, shim) = running(&node, "r", &["sleep"]).await;
        node.events.wait_for("/tasks/start", 1).await;
        node.events.stop().await;
        // A new client finds the container and ends it; nobody takes events.
        let again = Shim {
            task: connect(&shim.address).await,
            pid: shim.pid,
            address: shim.address.clone(),
        };
        assert_eq!(status(&again, "r").await, Status::RUNNING);
        kill(&again, "r", "", 9).await.unwrap();
        again.wait("r", "").await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        node.events.resume().await;
        node.events.wait_for("/tasks/exit", 1).await;
        assert_eq!(node.events.exits(), [("r".to_owned(), 137)]);
        finish(&node, &again, "r").await;
        node.events.wait_for("/tasks/delete", 1).await;
    });
}

fn no_events() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("n", &["exit", "0"]);
        // CRI-O passes an empty address.
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_containerd-shim-husk-v2"))
            .args(["-namespace", "test", "-address", "/n", "-id", "n", "start"])
            .env("HUSK_CONFIG", node.path("config.toml"))
            .env("TTRPC_ADDRESS", "")
            .current_dir(&bundle.dir)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        let address = String::from_utf8(output.stdout).unwrap();
        let pid = std::fs::read_to_string(bundle.dir.join("shim.pid")).unwrap();
        let shim = Shim {
            task: connect(&address).await,
            pid: pid.parse().unwrap(),
            address,
        };
        shim.create(&bundle.request()).await.unwrap();
        shim.run("n", "").await.unwrap();
        assert_eq!(shim.wait("n", "").await.unwrap().exit_status, 0);
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
        finish(&node, &shim, "d").await;
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
