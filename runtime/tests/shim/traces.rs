//! What is written down of requests that containerd traces.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use containerd_shim_protos::api::{DeleteRequest, ExecProcessRequest, StartRequest};
use husk_node::trace::{FILE, Line, Request};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::context::Context;

use crate::Case;
use crate::case::{Node, Shim, block_on};
use crate::containerd::soon;
use crate::lifecycle::hook;
use crate::sandbox::{member, remove, up};

pub const CASES: &[Case] = &[
    ("traces_have_what_is_asked_for", requests),
    ("traces_have_a_start_that_fails", failed_start),
    ("traces_of_nobody_leave_nothing", untraced),
];

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn traced(parents: &[&str]) -> Context {
    let mut context = soon();
    for parent in parents {
        context.add("traceparent".into(), (*parent).to_owned());
    }
    context
}

fn file(node: &Node, pod: &str) -> PathBuf {
    node.state_dir().join("test").join(pod).join(FILE)
}

fn lines(mut file: &File) -> Vec<Line> {
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    let line = |line| serde_json::from_str(line).unwrap();
    text.lines().map(line).collect()
}

fn requests_of(lines: &[Line]) -> Vec<&Request> {
    let lines = lines.iter().filter_map(|line| match line {
        Line::Request(request) => Some(request),
        Line::Timeline(_) => None,
    });
    lines.collect()
}

async fn run(shim: &Shim, id: &str, exec: &str, parent: &str) {
    let request = StartRequest {
        id: id.into(),
        exec_id: exec.into(),
        ..StartRequest::default()
    };
    shim.task.start(traced(&[parent]), &request).await.unwrap();
}

fn requests() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("t", &["sleep"]);
        let shim = node.start(&bundle).await;
        let created = shim.task.create(traced(&[PARENT]), &bundle.request()).await;
        created.unwrap();
        let file = File::open(file(&node, "t")).unwrap();
        run(&shim, "t", "", PARENT).await;
        let exec = ExecProcessRequest {
            id: "t".into(),
            exec_id: "e".into(),
            spec: MessageField::some(Any {
                value: json!({ "args": ["sleep"] }).to_string().into_bytes(),
                ..Any::default()
            }),
            ..ExecProcessRequest::default()
        };
        shim.task.exec(traced(&[PARENT]), &exec).await.unwrap();
        run(&shim, "t", "e", PARENT).await;
        let refused = shim.task.exec(traced(&[PARENT]), &exec).await;
        refused.unwrap_err();
        crate::lifecycle::kill(&shim, "t", "", 9).await.unwrap();
        shim.wait("t", "").await.unwrap();
        let delete = DeleteRequest {
            id: "t".into(),
            ..DeleteRequest::default()
        };
        shim.task.delete(traced(&[PARENT]), &delete).await.unwrap();
        shim.shut_down("t").await;
        shim.assert_gone().await;
        node.assert_clean();

        // Whoever has it open reads what was written before it went.
        let lines = lines(&file);
        let requests = requests_of(&lines);
        let told: Vec<_> = requests
            .iter()
            .map(|r| (&r.method[..], &r.container[..], &r.exec[..]))
            .collect();
        assert_eq!(
            told,
            [
                ("Create", "t", ""),
                ("Start", "t", ""),
                ("Exec", "t", "e"),
                ("Start", "t", "e"),
                ("Exec", "t", "e"),
                ("Delete", "t", ""),
            ]
        );
        let mut at = 0;
        for request in &requests {
            assert_eq!(request.parent.to_string(), PARENT);
            assert!(at < request.begin_ns && request.begin_ns < request.end_ns);
            at = request.end_ns;
            let ends = request.stages.iter().map(|stage| stage.end_ns);
            assert!(ends.clone().is_sorted() && ends.clone().all(|end| end <= at));
        }
        let stages = |request: &Request| {
            let stages = request.stages.iter();
            stages.map(|stage| stage.what.clone()).collect::<Vec<_>>()
        };
        assert_eq!(stages(requests[1]), ["network", "start"]);
        assert_eq!(stages(requests[3]), ["streams", "exec"]);
        let error = requests[4].error.as_deref();
        assert_eq!(error, Some("process e exists already"));
        // The timeline comes before the request in which it was made.
        let place = lines
            .iter()
            .position(|line| matches!(line, Line::Request(_)));
        let Line::Timeline(timeline) = &lines[place.unwrap() - 1] else {
            panic!("{lines:?}");
        };
        let create = requests[0];
        assert!(create.begin_ns < timeline.request_ns);
        assert!(timeline.container_created_ns < create.end_ns);
        let began = timeline.agent_began_ns;
        assert!(timeline.guest_entered_ns < began && began <= timeline.agent_ready_ns);
    });
}

fn failed_start() {
    block_on(async {
        let node = Node::new().await;
        // What is written goes with the pod, right after; another name stays.
        let (path, kept) = (file(&node, "f"), node.path("kept"));
        let (from, to) = (path.display(), kept.display());
        let script = format!("touch {from} && ln {from} {to}; echo not today >&2; exit 1");
        let bundle = node.bundle("f", &["sleep"]).with(|spec| {
            spec["hooks"] = json!({"createRuntime": hook(&script)});
        });
        let shim = node.start(&bundle).await;
        let created = shim.task.create(traced(&[PARENT]), &bundle.request()).await;
        created.unwrap_err();
        assert!(!path.exists());
        let lines = lines(&File::open(kept).unwrap());
        let [request] = requests_of(&lines)[..] else {
            panic!("{lines:?}");
        };
        let error = request.error.as_deref().unwrap();
        assert!(error.contains("not today"), "{error}");
        shim.shut_down("f").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}

fn untraced() {
    block_on(async {
        let node = Node::new().await;
        let shim = up(&node, "p").await;
        let path = file(&node, "p");
        for (name, parents) in [
            ("a", vec![]),
            ("b", vec![PARENT, PARENT]),
            (
                "c",
                vec!["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"],
            ),
        ] {
            let bundle = member(&node, name, "p", &["sleep"]);
            assert_eq!(node.start(&bundle).await.address, shim.address);
            let created = shim.task.create(traced(&parents), &bundle.request()).await;
            created.unwrap();
            assert!(!path.exists(), "{name}");
        }
        // Somebody traces, and this is not to be recorded.
        let unsampled = PARENT.replace("-01", "-00");
        run(&shim, "a", "", &unsampled).await;
        let lines = lines(&File::open(&path).unwrap());
        assert!(requests_of(&lines).is_empty(), "{lines:?}");
        run(&shim, "b", "", PARENT).await;
        let lines = self::lines(&File::open(&path).unwrap());
        assert_eq!(requests_of(&lines).len(), 1);
        for name in ["c", "a", "b"] {
            crate::sandbox::kill(&shim, name).await;
            shim.delete(name, "").await.unwrap();
        }
        crate::sandbox::kill(&shim, "p").await;
        remove(&node, &shim, "p").await;
    });
}
