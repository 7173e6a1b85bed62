//! Pods that begin as copies of a machine that was saved.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Case;
use crate::case::{Node, block_on};
use crate::containerd::refusal;
use crate::lifecycle::finish;

pub const CASES: &[Case] = &[
    ("template_is_made_and_used", made_and_used),
    ("template_that_is_damaged_is_made_again", damaged),
    ("template_that_cannot_be_made_is_told_of", not_made),
];

async fn node() -> Node {
    node_with("").await
}

async fn node_with(lines: &str) -> Node {
    let node = Node::new().await;
    configure(&node, lines);
    node
}

fn configure(node: &Node, lines: &str) {
    let dir = node.path("templates").display().to_string();
    let on = "template_max_age_seconds = 3600";
    node.configure(&format!("{lines}{on}\ntemplate_dir = {dir:?}\n"));
}

/// The directory of the template, once it is there and whoever made it is gone.
async fn made(node: &Node) -> PathBuf {
    let began = Instant::now();
    loop {
        let entries = fs::read_dir(node.path("templates"));
        let entries = entries.into_iter().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        if let [key, lock] = &*paths
            && lock.ends_with("lock")
            && key.extension().is_none()
        {
            return key.clone();
        }
        let waited = began.elapsed();
        assert!(waited < Duration::from_secs(30), "{paths:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What a pod of one container prints, and whether it began as a copy.
async fn pod(node: &Node, id: &str, command: &[&str]) -> (String, bool) {
    let bundle = node.bundle(id, command);
    let shim = node.start(&bundle).await;
    let mut request = bundle.request();
    request.stdout = bundle.fifo("out");
    let path = request.stdout.clone();
    let reader = tokio::task::spawn_blocking(move || fs::read_to_string(path).unwrap());
    shim.create(&request).await.unwrap();
    shim.run(id, "").await.unwrap();
    let state = fs::read(node.state_dir().join("test").join(id).join("state.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    shim.wait(id, "").await.unwrap();
    let said = reader.await.unwrap();
    finish(node, &shim, id).await;
    (said, state["machine"]["from_template"].as_bool().unwrap())
}

fn made_and_used() {
    block_on(async {
        let node = node().await;
        let cold = pod(&node, "a", &["plugged"]).await;
        assert_eq!(cold, ("0".to_owned(), false));
        let key = made(&node).await;
        for name in ["state", "memory"] {
            let mode = fs::metadata(key.join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o400, "{name}");
        }
        // It has what its pod needs, and the guest is told whose copy it is not.
        let copy = pod(&node, "b", &["plugged"]).await;
        assert_eq!(copy, ("384".to_owned(), true));
        // A new kernel is another template's.
        configure(&node, "kernel = '/dev/zero'\n");
        assert!(!pod(&node, "c", &["echo", "x"]).await.1);
        let began = Instant::now();
        while made(&node).await == key {
            assert!(began.elapsed() < Duration::from_secs(30), "the old one");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(pod(&node, "d", &["echo", "x"]).await.1);
    });
}

fn damaged() {
    block_on(async {
        let node = node().await;
        assert!(!pod(&node, "a", &["echo", "x"]).await.1);
        let key = made(&node).await;
        fs::write(key.join("state"), "nonsense").unwrap();
        let bundle = node.bundle("b", &["echo", "x"]);
        let shim = node.start(&bundle).await;
        let (_, message) = refusal(shim.create(&bundle.request()).await);
        assert!(message.contains("no saved machine"), "{message}");
        shim.shut_down("b").await;
        shim.assert_gone().await;
        node.assert_clean();
        assert!(!key.exists());
        assert!(!pod(&node, "c", &["echo", "x"]).await.1);
        made(&node).await;
        assert!(pod(&node, "d", &["echo", "x"]).await.1);
    });
}

fn not_made() {
    block_on(async {
        let node = node_with("kernel_parameters = 'fake.unsaved'\n").await;
        assert!(!pod(&node, "a", &["echo", "x"]).await.1);
        let failed = node.path("templates").join("failed");
        let began = Instant::now();
        while fs::metadata(&failed).map_or(0, |file| file.len()) == 0 {
            assert!(began.elapsed() < Duration::from_secs(30));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let why = fs::read_to_string(failed).unwrap();
        assert!(
            why.contains("save the machine") && why.contains("not to be"),
            "{why}"
        );
        assert_eq!(fs::read_dir(node.path("templates")).unwrap().count(), 2);
        assert!(!pod(&node, "b", &["echo", "x"]).await.1);
    });
}
