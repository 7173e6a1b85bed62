//! A container that is a pod of its own.

use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, ResumeRequest, StateRequest, StatsRequest, Status,
};
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
    ("life_has_hooks", hooks),
    ("life_has_hooks_that_outlive_the_shim", hooks_without_shim),
    ("life_may_be_refused_by_a_hook", refused_by_a_hook),
];

pub async fn running(node: &Node, id: &str, command: &[&str]) -> (Bundle, Shim) {
    let bundle = node.bundle(id, command);
    let shim = node.start(&bundle).await;
    shim.create(&bundle.request()).await.unwrap();
    shim.run(id, "").await.unwrap();
    (bundle, shim)
}

pub async fn finish(node: &Node, shim: &Shim, id: &str) {
    shim.delete(id, "").await.unwrap();
    shim.shut_down(id).await;
    shim.assert_gone().await;
    node.assert_clean();
}

pub async fn kill(shim: &Shim, id: &str, exec: &str, signal: u32) -> ttrpc::Result<()> {
    let request = KillRequest {
        id: id.to_owned(),
        exec_id: exec.to_owned(),
        signal,
        ..KillRequest::default()
    };
    shim.task.kill(soon(), &request).await.map(drop)
}

pub async fn status(shim: &Shim, id: &str) -> Status {
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

pub fn added(container: &str, exec: &str, command: &[&str]) -> ExecProcessRequest {
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

pub fn hook(script: &str) -> serde_json::Value {
    json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
}

fn hooks() {
    block_on(async {
        let node = Node::new().await;
        let log = node.path("hooks");
        let writes = |turn: &str| {
            let mounts = "readlink /proc/self/ns/mnt; pwd";
            let log = log.display();
            hook(&format!("(echo {turn}; {mounts}; cat) >> {log}"))
        };
        let bundle = node.bundle("h1", &["sleep"]).with(|spec| {
            spec["hooks"] = json!({
                "prestart": writes("prestart"), "createRuntime": writes("createRuntime"),
                "poststart": writes("poststart"), "poststop": writes("poststop"),
            });
        });
        let logged = || std::fs::read_to_string(&log).unwrap();
        let shim = node.start(&bundle).await;
        let pid = shim.create(&bundle.request()).await.unwrap().pid;
        let text = logged();
        assert!(
            text.starts_with("prestart\n") && text.contains("createRuntime\n"),
            "{text}"
        );
        assert_eq!(text.matches(&format!("\"pid\":{pid}")).count(), 2, "{text}");
        assert!(!text.contains("poststart"), "{text}");
        shim.run("h1", "").await.unwrap();
        assert!(logged().contains("poststart\n"), "{}", logged());
        kill(&shim, "h1", "", 9).await.unwrap();
        shim.wait("h1", "").await.unwrap();
        assert!(!logged().contains("poststop"), "{}", logged());
        shim.delete("h1", "").await.unwrap();
        assert!(logged().contains("poststop\n"), "{}", logged());
        // All were among the node's mounts, in the bundle.
        let mounts = std::fs::read_link("/proc/self/ns/mnt").unwrap();
        let place = format!("{}\n{}\n", mounts.display(), bundle.dir.display());
        assert_eq!(logged().matches(&place).count(), 4, "{}", logged());
        shim.shut_down("h1").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}

fn hooks_without_shim() {
    block_on(async {
        let node = Node::new().await;
        let log = node.path("hooks");
        let bundle = node.bundle("h3", &["sleep"]).with(|spec| {
            let script = format!("cat >> {}", log.display());
            spec["hooks"] = json!({"poststop": hook(&script)});
        });
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        shim.run("h3", "").await.unwrap();
        let raw = rustix::process::Pid::from_raw(shim.pid).unwrap();
        rustix::process::kill_process(raw, rustix::process::Signal::KILL).unwrap();
        let dir = node.path("bundles").join("h3");
        let path = dir.display().to_string();
        for _ in 0..2 {
            let output = node.shim(&["-id", "h3", "-bundle", &path, "delete"], &dir, b"");
            assert!(output.status.success());
            let told: serde_json::Value =
                serde_json::from_str(&std::fs::read_to_string(&log).unwrap()).unwrap();
            assert_eq!(
                (&told["id"], &told["status"]),
                (&json!("h3"), &json!("stopped"))
            );
        }
        shim.assert_gone().await;
        node.assert_clean();
    });
}

fn refused_by_a_hook() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("h2", &["sleep"]).with(|spec| {
            spec["hooks"] = json!({"createRuntime": hook("echo not today >&2; exit 1")});
        });
        let shim = node.start(&bundle).await;
        let (_, message) = refusal(shim.create(&bundle.request()).await);
        let expected = "createRuntime hook /bin/sh: exit status: 1: not today";
        assert!(message.contains(expected), "{message}");
        shim.shut_down("h2").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}
