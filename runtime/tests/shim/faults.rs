//! What can go wrong at a step of a start: one clear error, and nothing is left.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::json;
use ttrpc::Code;

use crate::Case;
use crate::case::{Bundle, Node, Shim, block_on};
use crate::containerd::refusal;
use crate::lifecycle::{finish, kill};

pub const CASES: &[Case] = &[
    ("fault_of_a_vmm_that_ends", vmm_ends),
    ("fault_of_an_agent_that_ends_or_refuses", agent_ends),
    ("fault_of_a_file_server", file_server),
    ("fault_of_a_tap_whose_name_is_taken", taken_tap),
    ("fault_of_a_full_disk", full_disk),
];

/// Kernel parameter that has the pretended VMM fail, and when.
pub const PARAMETER: &str = "fake.fault=";

/// As containerd tries it, and then removes it, and with it the pod; the refusal,
/// if it was one.
pub async fn outcome(shim: &Shim, bundle: &Bundle) -> Option<(Code, String)> {
    let refused = attempt(shim, bundle).await;
    shim.shut_down(&bundle.id).await;
    shim.assert_gone().await;
    refused
}

/// Likewise, of a container alone.
pub async fn attempt(shim: &Shim, bundle: &Bundle) -> Option<(Code, String)> {
    let began = Instant::now();
    let created = shim.create(&bundle.request()).await;
    assert!(began.elapsed() < Duration::from_secs(30));
    let id = bundle.id.as_str();
    let refused = match created {
        Err(_) => Some(refusal(created)),
        Ok(_) => match shim.run(id, "").await {
            Ok(_) => {
                kill(shim, id, "", 9).await.unwrap();
                shim.wait(id, "").await.unwrap();
                None
            }
            refused => Some(refusal(refused)),
        },
    };
    // There may be nothing to delete.
    let _ = shim.delete(id, "").await;
    if let Some((_, message)) = &refused {
        assert!(!message.contains('\n'), "{message}");
        assert!(!message.contains("panicked at"), "{message}");
    }
    refused
}

/// It fails with these words, and without the fault there is none.
async fn expect(node: &Node, bundle: &Bundle, words: &str) {
    let shim = node.start(bundle).await;
    let (_, message) = outcome(&shim, bundle).await.expect("it should have failed");
    assert!(message.contains(words), "{message:?} lacks {words:?}");
    node.assert_clean();
}

fn vmm_ends() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("v", &["sleep"]);
        // Before it takes its specification, with it, and when the machine runs.
        node.configure("vmm = '/bin/false'\n");
        expect(&node, &bundle, "VMM").await;
        for when in ["spec", "started"] {
            node.configure(&format!("kernel_parameters = '{PARAMETER}{when}'\n"));
            expect(&node, &bundle, "the VMM ended without a word").await;
        }
        node.configure("");
        let shim = node.start(&bundle).await;
        assert_eq!(outcome(&shim, &bundle).await, None);
        node.assert_clean();
    });
}

fn agent_ends() {
    block_on(async {
        let node = Node::new().await;
        node.configure(&format!("kernel_parameters = '{PARAMETER}hang_up'\n"));
        expect(&node, &node.bundle("a", &["sleep"]), "agent").await;
        node.configure("");
        for (command, words) in [
            ("uncreatable", "the container is refused"),
            ("unstartable", "the start is refused"),
        ] {
            expect(&node, &node.bundle(command, &[command]), words).await;
        }
    });
}

fn file_server() {
    block_on(async {
        let node = Node::new().await;
        node.configure("file_server = '/no/such/server'\n");
        let bundle = node.bundle("f", &["sleep"]);
        expect(&node, &bundle, "file server /no/such/server").await;
        // One that ends at once takes the machine with it, whenever that is seen.
        node.configure("file_server = '/bin/false'\n");
        let bundle = node.bundle("g", &["sleep"]);
        let shim = node.start(&bundle).await;
        if shim.create(&bundle.request()).await.is_ok() {
            let began = Instant::now();
            let _ = shim.run("g", "").await;
            shim.wait("g", "").await.unwrap();
            assert!(began.elapsed() < Duration::from_secs(30));
            finish(&node, &shim, "g").await;
        } else {
            shim.shut_down("g").await;
            shim.assert_gone().await;
        }
        node.assert_clean();
    });
}

/// A network namespace; its holder.
fn namespace(script: &str) -> (Child, String) {
    let script = format!("{script} && exec sleep 100");
    let holder = Command::new("unshare")
        .args(["--net", "sh", "-ec", &script])
        .spawn()
        .unwrap();
    let comm = format!("/proc/{}/comm", holder.id());
    let began = Instant::now();
    while fs::read_to_string(&comm).unwrap() != "sleep\n" {
        assert!(began.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(10));
    }
    let path = format!("/proc/{}/ns/net", holder.id());
    (holder, path)
}

fn taken_tap() {
    block_on(async {
        let node = Node::new().await;
        // Interfaces have the numbers that they are given here.
        let (mut holder, path) = namespace(
            "ip link add eth0 index 77 address 02:00:00:00:00:07 type veth peer name other && \
             ip address add 10.7.0.2/24 dev eth0 && ip link set eth0 up && \
             ip link add husk77 type veth peer name another",
        );
        let bundle = node.bundle("t", &["sleep"]).with(|spec| {
            spec["linux"]["namespaces"] =
                json!([{"type": "pid"}, {"type": "network", "path": path}]);
        });
        expect(&node, &bundle, "husk77").await;
        // What was there is there.
        let mut links = Command::new("nsenter");
        let links = links
            .arg(format!("--net={path}"))
            .args(["ip", "-o", "link"]);
        let links = String::from_utf8(links.output().unwrap().stdout).unwrap();
        assert_eq!(links.lines().count(), 5, "{links}");
        holder.kill().unwrap();
        holder.wait().unwrap();
    });
}

/// A small file system, until it is dropped.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]);
        assert!(mount.arg(&path).status().unwrap().success());
        Self(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Wherever the last block or the last name goes.
fn full_disk() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("d", &["sleep"]);
        let (mut failed, mut worked) = (0, 0);
        let blocks = (1..4).map(|pages| format!("size={}k", pages * 4));
        let names = (1..10).map(|names| format!("nr_inodes={names}"));
        for options in blocks.chain(names) {
            let small = Small::mount(node.state_dir(), &options);
            match node.try_start(&bundle).await {
                // The shim's own program tells it.
                Err(why) => {
                    assert!(why.contains("No space left"), "{options}: {why}");
                    failed += 1;
                }
                Ok(shim) => match outcome(&shim, &bundle).await {
                    None => worked += 1,
                    Some((_, message)) => {
                        assert!(message.contains("No space left"), "{options}: {message}");
                        failed += 1;
                    }
                },
            }
            let left: Vec<_> = fs::read_dir(&small.0).unwrap().collect();
            assert!(left.is_empty(), "{options}: {left:?}");
            drop(small);
            node.assert_clean();
        }
        assert!(failed > 2, "{failed} failed, {worked} worked");
        let shim = node.start(&bundle).await;
        assert_eq!(outcome(&shim, &bundle).await, None);
        node.assert_clean();
    });
}
