//! Bundles as an attacker would make them: each is taken or refused, soon, with
//! one clear error, and nothing is left of it.

use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ttrpc::Code;

use crate::Case;
use crate::case::{Node, block_on};
use crate::containerd::refusal;
use crate::lifecycle::kill;

pub const CASES: &[Case] = &[
    ("hostile_numbers", numbers),
    ("hostile_sizes", sizes),
    ("hostile_texts_that_are_no_specs", no_specs),
    ("hostile_names", names),
    ("hostile_links", links),
];

/// What containerd waits for at least.
const SOON: Duration = Duration::from_secs(20);

/// Creates it, and removes what came of it; the refusal, if it was one.
async fn outcome(node: &Node, change: impl FnOnce(&mut Value)) -> Option<(Code, String)> {
    let bundle = node.bundle("h", &["sleep"]).with(change);
    let shim = match node.try_start(&bundle).await {
        Ok(shim) => shim,
        Err(said) => {
            node.assert_clean();
            return Some((Code::INVALID_ARGUMENT, said));
        }
    };
    let began = Instant::now();
    let refused = match shim.create(&bundle.request()).await {
        Ok(_) => None,
        answer => Some(refusal(answer)),
    };
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    if refused.is_none() {
        kill(&shim, "h", "", 9).await.unwrap();
        shim.wait("h", "").await.unwrap();
        shim.delete("h", "").await.unwrap();
    }
    shim.shut_down("h").await;
    shim.assert_gone().await;
    node.assert_clean();
    if let Some((_, said)) = &refused {
        assert!(said.len() < 8 << 10, "{} bytes are said", said.len());
    }
    refused
}

fn bind(source: &str, destination: &str) -> Value {
    json!({"type": "bind", "source": source, "destination": destination, "options": ["rbind", "ro"]})
}

/// Limits and numbers that cannot be.
fn numbers() {
    block_on(async {
        let node = Node::new().await;
        let most = i64::MAX;
        let resources = [
            json!({"memory": {"limit": most, "swap": most}}),
            json!({"memory": {"limit": i64::MIN}}),
            json!({"memory": {"limit": -2}}),
            json!({"cpu": {"quota": most, "period": 1}}),
            json!({"cpu": {"quota": 1, "period": 0}}),
            json!({"cpu": {"quota": most, "period": u64::MAX, "shares": u64::MAX}}),
            json!({"cpu": {"quota": i64::MIN}}),
            json!({"cpu": {"cpus": "0-4294967295"}}),
            json!({"pids": {"limit": i64::MIN}}),
            json!({"hugepageLimits": [{"pageSize": "2MB", "limit": u64::MAX}]}),
            json!({"hugepageLimits": vec![json!({"pageSize": "2MB", "limit": u64::MAX / 2}); 9]}),
            json!({"hugepageLimits": [{"pageSize": "-1ZB", "limit": 1}]}),
            json!({"blockIO": {"weight": 65535, "throttleReadBpsDevice":
                [{"major": most, "minor": -1, "rate": u64::MAX}]}}),
            json!({"devices": [{"allow": true, "type": "b", "major": most, "minor": i64::MIN, "access": "rwm"}]}),
        ];
        for resources in resources {
            let of = resources.clone();
            let refused = outcome(&node, |spec| spec["linux"]["resources"] = of).await;
            if let Some((code, said)) = refused {
                assert_eq!(code, Code::INVALID_ARGUMENT, "{resources}: {said}");
            }
        }
        let devices = json!([{"path": "/dev/x", "type": "b", "major": most, "minor": most},
            {"path": "/dev/y", "type": "c", "major": -1, "minor": -1}]);
        outcome(&node, |spec| spec["linux"]["devices"] = devices).await;
        let refused = outcome(&node, |spec| {
            spec["process"]["oomScoreAdj"] = json!(1_000_000)
        });
        refused.await;
    });
}

/// More of everything than anybody needs.
fn sizes() {
    block_on(async {
        let node = Node::new().await;
        let volume = node.path("volume");
        std::fs::create_dir(&volume).unwrap();
        let volume = volume.to_str().unwrap();
        let mounts: Vec<_> = (0..10_000)
            .map(|n| bind(volume, &format!("/m/{n}")))
            .collect();
        let refused = outcome(&node, |spec| spec["mounts"] = mounts.into()).await;
        assert_eq!(refused, None, "one volume, many mounts");
        let lines = |bytes: usize| vec![format!("A={}", "x".repeat(1022)); bytes / 1024];
        let refused = outcome(&node, |spec| spec["process"]["env"] = lines(1 << 20).into());
        assert_eq!(refused.await, None, "1 MiB of environment");
        let refused = outcome(&node, |spec| spec["hostname"] = "h".repeat(1 << 20).into());
        refused.await;
    });
}

/// containerd hears of these before there is a shim.
fn no_specs() {
    block_on(async {
        let node = Node::new().await;
        let deep = (0..200).fold(json!(1), |deep, _| json!([deep]));
        type Change = Box<dyn FnOnce(&mut Value)>;
        let changes: [(&str, Change); 6] = [
            (
                "invalid type: floating point",
                Box::new(|spec| spec["linux"]["resources"] = json!({"memory": {"limit": 1e300}})),
            ),
            (
                "invalid type: string",
                Box::new(|spec| spec["linux"]["resources"] = json!({"memory": {"limit": "x"}})),
            ),
            (
                "/root is an array",
                Box::new(|spec| spec["root"] = json!(["rootfs"])),
            ),
            ("recursion limit", Box::new(|spec| spec["unknown"] = deep)),
            (
                "larger than",
                Box::new(|spec| spec["process"]["env"] = json!(["x".repeat(3 << 20)])),
            ),
            (
                "sandbox id",
                Box::new(|spec| {
                    spec["annotations"] = json!({"io.kubernetes.cri.container-type": "container",
                        "io.kubernetes.cri.sandbox-id": "../../etc"});
                }),
            ),
        ];
        for (words, change) in changes {
            let bundle = node.bundle("h", &["sleep"]).with(change);
            let refused = node.shim(&["-id", "h", "start"], &bundle.dir, b"");
            let said = String::from_utf8_lossy(&refused.stderr);
            assert!(
                !refused.status.success() && said.contains(words),
                "{words}: {said}"
            );
            node.assert_clean();
        }
    });
}

/// Names that are none, and odd ones that are.
fn names() {
    block_on(async {
        let node = Node::new().await;
        for name in [
            "new\nline",
            "sp ace\ttab",
            "back\\slash\\040",
            "ünï",
            "\u{1b}[31m",
            "a:b,c=d",
        ] {
            let volume = node.path(name);
            std::fs::create_dir(&volume).unwrap();
            let mount = bind(volume.to_str().unwrap(), &format!("/v/{name}"));
            let refused = outcome(&node, |spec| spec["mounts"] = json!([mount])).await;
            assert_eq!(refused, None, "{name:?}");
            let mount = bind(&format!("{}/missing", volume.display()), "/v");
            let refused = outcome(&node, |spec| spec["mounts"] = json!([mount])).await;
            assert_eq!(
                refused.map(|(code, _)| code),
                Some(Code::NOT_FOUND),
                "{name:?}"
            );
        }
        for (key, value) in [
            ("io.husk.vm.vcpus", "1\n2"),
            ("io.husk.vm.kernel", "/tmp/x"),
            ("io.husk.\n", ""),
            ("io.kubernetes.cri.sandbox-memory", "9999999999999999999999"),
        ] {
            let change = |spec: &mut Value| spec["annotations"] = json!({key: value});
            let refused = outcome(&node, change).await.map(|(code, _)| code);
            let is_ours = key.starts_with("io.husk.");
            assert_eq!(
                refused,
                is_ours.then_some(Code::INVALID_ARGUMENT),
                "{key:?}"
            );
        }
        for path in [
            "/../../escape",
            "../x",
            "a/../../b",
            "x:y:z:w",
            "/new\nline/../..",
        ] {
            let change = |spec: &mut Value| spec["linux"]["cgroupsPath"] = path.into();
            let refused = outcome(&node, change).await;
            assert!(refused.is_some(), "{path:?}");
        }
    });
}

/// Links that lead elsewhere.
fn links() {
    block_on(async {
        let node = Node::new().await;
        // Links in a circle, and a name of the shim's own process.
        let circle = node.path("circle");
        symlink(&circle, &circle).unwrap();
        for source in [
            circle.to_str().unwrap(),
            "/proc/self/fd/999",
            "/proc/self/fd/3/x",
        ] {
            let mount = bind(source, "/v");
            let refused = outcome(&node, |spec| spec["mounts"] = json!([mount])).await;
            assert!(refused.is_some(), "{source}");
        }
    });
}
