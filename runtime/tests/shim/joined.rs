//! Containers that ask for another's network, as `docker run --network
//! container:NAME` has it.

use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::Case;
use crate::case::{Bundle, Node, Shim, block_on};
use crate::containerd::refusal;
use crate::sandbox::{add, kill, remove};

pub const CASES: &[Case] = &[
    ("network_of_another_container_is_joined", joined),
    ("network_of_nobody_is_not_joined", apart),
    ("processes_of_another_container_are_joined", processes),
    (
        "processes_of_another_machine_are_not_joined",
        other_processes,
    ),
];

fn with_network(node: &Node, id: &str, path: &str) -> Bundle {
    node.bundle(id, &["sleep"]).with(|spec| {
        spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "network", "path": path}]);
    })
}

async fn first(node: &Node, id: &str) -> (Shim, u32) {
    let bundle = node.bundle(id, &["sleep"]);
    let shim = node.start(&bundle).await;
    shim.create(&bundle.request()).await.unwrap();
    let pid = shim.run(id, "").await.unwrap();
    (shim, pid)
}

/// The second is in the same machine, and may be the last that is there.
fn joined() {
    block_on(async {
        let node = Node::new().await;
        let (shim, pid) = first(&node, "web").await;
        let path = format!("/proc/{pid}/ns/net");
        add(&node, &shim, &with_network(&node, "side", &path)).await;
        kill(&shim, "web").await;
        shim.delete("web", "").await.unwrap();
        // containerd asks after each.
        shim.shut_down("web").await;
        kill(&shim, "side").await;
        remove(&node, &shim, "side").await;
    });
}

/// A network that no machine has is the container's own, but for the node's.
fn apart() {
    block_on(async {
        let node = Node::new().await;
        let mut holder = Command::new("unshare")
            .args(["--net", "sleep", "100"])
            .spawn()
            .unwrap();
        let theirs = format!("/proc/{}/ns/net", holder.id());
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        while std::fs::read_link(&theirs).unwrap() == own {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let (web, _) = first(&node, "web").await;
        let bundle = with_network(&node, "alone", &theirs);
        let alone = node.start(&bundle).await;
        assert_ne!(alone.address, web.address);
        alone.shut_down("alone").await;
        alone.assert_gone().await;
        kill(&web, "web").await;
        remove(&node, &web, "web").await;
        let bundle = with_network(&node, "late", "/proc/self/ns/net");
        let refused = node.shim(&["-id", "late", "start"], &bundle.dir, b"");
        let errors = String::from_utf8_lossy(&refused.stderr);
        assert!(errors.contains("host's network"), "{errors}");
        node.assert_clean();
        holder.kill().unwrap();
        holder.wait().unwrap();
    });
}

/// As `--network container:web --pid container:web` has it.
fn with_pids(node: &Node, id: &str, of_network: u32, path: &str, words: &[&str]) -> Bundle {
    node.bundle(id, words).with(|spec| {
        spec["linux"]["namespaces"] = json!([
            {"type": "pid", "path": path},
            {"type": "network", "path": format!("/proc/{of_network}/ns/net")},
        ]);
    })
}

fn processes() {
    block_on(async {
        let node = Node::new().await;
        let (shim, pid) = first(&node, "web").await;
        let path = format!("/proc/{pid}/ns/pid");
        let words = ["joins", "/run/husk/containers/web"];
        let side = with_pids(&node, "side", pid, &path, &words);
        add(&node, &shim, &side).await;
        // Of somebody else on the node.
        let path = format!("/proc/{}/ns/pid", std::process::id());
        let stranger = with_pids(&node, "stranger", pid, &path, &["sleep"]);
        assert_eq!(node.start(&stranger).await.address, shim.address);
        let (code, said) = refusal(shim.create(&stranger.request()).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(said.contains(&path), "{said}");
        for id in ["side", "web"] {
            kill(&shim, id).await;
        }
        shim.delete("side", "").await.unwrap();
        remove(&node, &shim, "web").await;
    });
}

fn other_processes() {
    block_on(async {
        let node = Node::new().await;
        let (web, pid) = first(&node, "web").await;
        let path = format!("/proc/{pid}/ns/pid");
        let alone = node.bundle("alone", &["sleep"]).with(|spec| {
            spec["linux"]["namespaces"][0]["path"] = path.clone().into();
        });
        let shim = node.start(&alone).await;
        let (code, said) = refusal(shim.create(&alone.request()).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(said.contains(&path), "{said}");
        shim.shut_down("alone").await;
        shim.assert_gone().await;
        kill(&web, "web").await;
        remove(&node, &web, "web").await;
    });
}
