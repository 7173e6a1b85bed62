//! Pods that begin as copies of a machine that was saved.

use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use husk_node::verified;
use serde_json::{Value, json};

use crate::Case;
use crate::case::{Bundle, Node, block_on};
use crate::containerd::refusal;
use crate::faults::PARAMETER;
use crate::lifecycle::finish;

pub const CASES: &[Case] = &[
    ("template_is_made_and_used", made_and_used),
    ("template_is_of_the_size_of_its_pods", sizes),
    ("template_that_is_damaged_is_made_again", damaged),
    ("template_that_cannot_be_made_is_told_of", not_made),
    ("template_whose_copies_do_not_start_is_not_kept", no_copy),
    ("template_outlives_a_pod_that_is_refused", refused),
    ("template_of_a_maker_that_was_killed_is_made_later", killed),
    ("template_is_doubted_where_a_copy_is_killed", copy_killed),
];

async fn node() -> Node {
    node_with("").await
}

async fn node_with(lines: &str) -> Node {
    let node = Node::new().await;
    configure(&node, lines);
    node
}

pub fn configure(node: &Node, lines: &str) {
    node.configure(&format!("{lines}template_max_age_seconds = 3600\n"));
}

/// The directory of the template, once it is there and whoever made it is gone.
pub async fn made(node: &Node) -> PathBuf {
    let began = Instant::now();
    loop {
        let entries = fs::read_dir(node.path("templates"));
        let entries = entries.into_iter().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        let is_aside = |path: &PathBuf| path.ends_with("theirs") || extension(path) == "discarded";
        paths.retain(|path| !is_aside(path) && !path.ends_with(verified::FILE));
        paths.sort();
        if let [key, lock] = &*paths
            && lock.ends_with("lock")
            && key.extension().is_none()
            && key.is_dir()
        {
            return key.clone();
        }
        let waited = began.elapsed();
        assert!(waited < Duration::from_secs(30), "{paths:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn extension(path: &Path) -> &str {
    path.extension().and_then(|is| is.to_str()).unwrap_or("")
}

/// The file that says why there is none.
fn failed(node: &Node) -> Option<PathBuf> {
    let entries = fs::read_dir(node.path("templates")).into_iter().flatten();
    let mut paths = entries.map(|entry| entry.unwrap().path());
    paths.find(|path| extension(path) == "failed")
}

/// What a pod of one container prints, and whether it began as a copy.
async fn pod(node: &Node, id: &str, command: &[&str]) -> (String, bool) {
    pod_of(node, &node.bundle(id, command)).await
}

/// Likewise, of its bundle.
async fn pod_of(node: &Node, bundle: &Bundle) -> (String, bool) {
    let id = &bundle.id;
    let shim = node.start(bundle).await;
    let mut request = bundle.request();
    request.stdout = bundle.fifo("out");
    // Open before the shim writes: it need not wait for who reads.
    let output = fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&request.stdout)
        .unwrap();
    shim.create(&request).await.unwrap();
    shim.run(id, "").await.unwrap();
    let state = fs::read(node.state_dir().join("test").join(id).join("state.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    shim.wait(id, "").await.unwrap();
    rustix::io::ioctl_fionbio(&output, false).unwrap();
    let said = tokio::task::spawn_blocking(|| std::io::read_to_string(output).unwrap());
    let said = said.await.unwrap();
    finish(node, &shim, id).await;
    (said, state["machine"]["from_template"].as_bool().unwrap())
}

fn made_and_used() {
    block_on(async {
        let node = node().await;
        // An operator may have named a directory that others use as well.
        let theirs = node.path("templates").join("theirs");
        fs::create_dir_all(&theirs).unwrap();
        let cold = pod(&node, "a", &["plugged"]).await;
        assert_eq!(cold, ("0 of 0".to_owned(), false));
        let key = made(&node).await;
        for name in ["state", "memory"] {
            let mode = fs::metadata(key.join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o400, "{name}");
        }
        // It has what its pod needs, and the guest is told whose copy it is not.
        let copy = pod(&node, "b", &["plugged"]).await;
        assert_eq!(copy, ("0 of 0".to_owned(), true));
        // A new kernel is another template's.
        node.put_image("newer", "newer");
        let newer = node.path("image/newer").display().to_string();
        configure(&node, &format!("kernel = {newer:?}\n"));
        assert!(!pod(&node, "c", &["echo", "x"]).await.1);
        let began = Instant::now();
        while made(&node).await == key {
            assert!(began.elapsed() < Duration::from_secs(30), "the old one");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(pod(&node, "d", &["echo", "x"]).await.1);
        assert!(theirs.exists());
    });
}

/// A pod that is smaller than most has another template, and takes what is there
/// while the better one is not.
fn sizes() {
    block_on(async {
        let node = node().await;
        let sized = |id: &str, mib: &str| {
            node.bundle(id, &["plugged"]).with(|spec| {
                spec["annotations"] = json!({"io.husk.vm.memory_mib": mib});
            })
        };
        assert!(!pod_of(&node, &sized("a", "256")).await.1);
        let small = made(&node).await;
        let copy = pod_of(&node, &sized("b", "256")).await;
        assert_eq!(copy, ("128 of 128".to_owned(), true));
        let copy = pod(&node, "c", &["plugged"]).await;
        assert_eq!(copy, ("384 of 384".to_owned(), true));
        let began = Instant::now();
        while node
            .shim(&["template"], &node.path(""), b"")
            .status
            .success()
        {
            let entries = fs::read_dir(node.path("templates")).unwrap();
            let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
            paths.retain(|path| extension(path).is_empty() && path.is_dir());
            if paths.len() == 2 && paths.contains(&small) {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "{paths:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let copy = pod(&node, "d", &["plugged"]).await;
        assert_eq!(copy, ("0 of 0".to_owned(), true));
        let copy = pod_of(&node, &sized("e", "640")).await;
        assert_eq!(copy, ("128 of 128".to_owned(), true));
        // What cannot be plugged and is not counted is not begun with.
        assert!(!pod_of(&node, &sized("f", "600")).await.1);
    });
}

fn damaged() {
    block_on(async {
        let node = node().await;
        assert!(!pod(&node, "a", &["echo", "x"]).await.1);
        let key = made(&node).await;
        fs::write(key.join("state"), "nonsense").unwrap();
        // What the VMM cannot do may be what the pod asked for; not twice running.
        for kept in [true, false] {
            let bundle = node.bundle("b", &["echo", "x"]);
            let shim = node.start(&bundle).await;
            let (_, message) = refusal(shim.create(&bundle.request()).await);
            assert!(message.contains("no saved machine"), "{message}");
            shim.shut_down("b").await;
            shim.assert_gone().await;
            node.assert_clean();
            assert_eq!(key.exists(), kept);
        }
        assert!(!pod(&node, "c", &["echo", "x"]).await.1);
        made(&node).await;
        assert!(pod(&node, "d", &["echo", "x"]).await.1);
    });
}

/// How many files there are beside the record of what was booted.
fn left(node: &Node) -> usize {
    let entries = fs::read_dir(node.path("templates")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name());
    names.filter(|name| name != verified::FILE).count()
}

/// Why there is none, once that is known.
async fn why_not(node: &Node, word: &str) -> String {
    let began = Instant::now();
    loop {
        let why = failed(node).map(|path| fs::read_to_string(path).unwrap_or_default());
        let why = why.unwrap_or_default();
        if why.contains(word) {
            return why;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{why:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn not_made() {
    block_on(async {
        let node = node_with("kernel_parameters = 'fake.unsaved'\n").await;
        assert!(!pod(&node, "a", &["echo", "x"]).await.1);
        let why = why_not(&node, "save the machine").await;
        assert!(why.contains("not to be"), "{why}");
        assert_eq!(left(&node), 2);
        assert!(!pod(&node, "b", &["echo", "x"]).await.1);
        // An operator who has mended it has one made at once.
        configure(&node, "");
        assert!(
            node.shim(&["template", "512"], &node.path(""), b"")
                .status
                .success()
        );
        made(&node).await;
        assert!(pod(&node, "c", &["echo", "x"]).await.1);
    });
}

fn no_copy() {
    block_on(async {
        let node = node_with("kernel_parameters = 'fake.uncopied'\n").await;
        assert!(!pod(&node, "a", &["echo", "x"]).await.1);
        let why = why_not(&node, "a copy of the machine").await;
        assert!(why.contains("does not go on"), "{why}");
        assert_eq!(left(&node), 2);
        assert!(!pod(&node, "b", &["echo", "x"]).await.1);
    });
}

fn refused() {
    block_on(async {
        let node = node().await;
        assert!(!pod(&node, "a", &["echo", "x"]).await.1);
        let key = made(&node).await;
        // Twice running, it may be the template.
        for (kept, other) in [(true, "c"), (true, "d"), (true, "-"), (false, "-")] {
            let bundle = node.bundle("b", &["echo", "x"]).with(|spec| {
                spec["hostname"] = "refused".into();
            });
            let shim = node.start(&bundle).await;
            let (_, message) = refusal(shim.create(&bundle.request()).await);
            assert!(message.contains("the sandbox is refused"), "{message}");
            shim.shut_down("b").await;
            shim.assert_gone().await;
            node.assert_clean();
            assert_eq!(key.exists(), kept);
            if other != "-" {
                assert!(pod(&node, other, &["echo", "x"]).await.1);
            }
        }
    });
}

fn copy_killed() {
    block_on(async {
        let fault = format!("kernel_parameters = '{PARAMETER}copy'\n");
        let node = node_with(&fault).await;
        assert!(!pod(&node, "a", &["echo", "x"]).await.1);
        let key = made(&node).await;
        // Once it may be anything.
        for kept in [true, false] {
            let bundle = node.bundle("b", &["echo", "x"]);
            let shim = node.start(&bundle).await;
            let (_, message) = refusal(shim.create(&bundle.request()).await);
            assert!(message.contains("ended without a word"), "{message}");
            shim.shut_down("b").await;
            shim.assert_gone().await;
            node.assert_clean();
            assert_eq!(key.exists(), kept);
        }
        assert!(!pod(&node, "c", &["echo", "x"]).await.1);
    });
}

/// The process that makes one for this node.
fn maker(node: &Node) -> Option<i32> {
    let config = format!("HUSK_CONFIG={}", node.path("").display());
    let mut pids = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: i32 = entry.unwrap().file_name().to_str()?.parse().ok()?;
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let is_maker = read("cmdline").ends_with(b"\0template\x00512\0");
        let variables = String::from_utf8(read("environ")).unwrap_or_default();
        let is_of_node = variables.split('\0').any(|line| line.starts_with(&config));
        (is_maker && is_of_node).then_some(pid)
    });
    pids.next()
}

fn killed() {
    block_on(async {
        let node = node().await;
        assert!(!pod(&node, "a", &["echo", "x"]).await.1);
        why_not(&node, "is being made").await;
        let pid = maker(&node).expect("no maker");
        let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        assert_eq!(score, "1000\n");
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let began = Instant::now();
        while maker(&node).is_some() {
            assert!(began.elapsed() < Duration::from_secs(10));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Nobody tries at once what was just killed.
        assert!(!pod(&node, "b", &["echo", "x"]).await.1);
        assert_eq!(maker(&node), None);
        let failed = fs::File::options()
            .write(true)
            .open(failed(&node).unwrap())
            .unwrap();
        let old = std::time::SystemTime::now() - Duration::from_secs(3600);
        failed.set_modified(old).unwrap();
        assert!(!pod(&node, "c", &["echo", "x"]).await.1);
        made(&node).await;
        assert!(pod(&node, "d", &["echo", "x"]).await.1);
    });
}
