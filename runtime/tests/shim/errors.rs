//! Bad input: one clear error, and nothing is left.

use containerd_shim_protos::types::mount::Mount;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::Case;
use crate::case::{Bundle, Node, block_on};
use crate::containerd::refusal;

pub const CASES: &[Case] = &[
    ("error_names_a_missing_kernel", missing_kernel),
    ("error_names_a_missing_vmm", missing_vmm),
    ("error_names_a_wrong_spec", wrong_specs),
    ("error_names_a_missing_root", missing_root),
    ("error_tells_the_guests_panic", panic),
    ("error_tells_where_a_boot_got_stuck", stuck),
    ("error_passes_on_the_agents_refusal", agent_refuses),
    ("error_of_a_missing_command_comes_at_once", missing_command),
];

/// Expects that the bundle cannot be created, for this reason.
pub async fn expect(node: &Node, bundle: &Bundle, code: Code, words: &str) {
    let shim = node.start(bundle).await;
    let (found, message) = refusal(shim.create(&bundle.request()).await);
    assert_eq!((found, message.contains(words)), (code, true), "{message}");
    // As containerd does it.
    assert!(shim.delete(&bundle.id, "").await.is_err());
    shim.shut_down(&bundle.id).await;
    shim.assert_gone().await;
    node.assert_clean();
}

fn missing_kernel() {
    block_on(async {
        let node = Node::new().await;
        node.configure("kernel = '/no/such/kernel'\n");
        let bundle = node.bundle("k", &["sleep"]);
        expect(
            &node,
            &bundle,
            Code::UNKNOWN,
            "guest kernel /no/such/kernel: No such file",
        )
        .await;
    });
}

fn missing_vmm() {
    block_on(async {
        let node = Node::new().await;
        node.configure("vmm = '/no/such/vmm'\n");
        let bundle = node.bundle("v", &["sleep"]);
        expect(&node, &bundle, Code::UNKNOWN, "VMM /no/such/vmm").await;
    });
}

fn wrong_specs() {
    block_on(async {
        let node = Node::new().await;
        type Change = fn(&mut Value);
        let cases: [(&str, Change); 6] = [
            ("memory limit 1 is impossible", |spec| {
                spec["linux"]["resources"] = json!({"memory": {"limit": 1}});
            }),
            ("MiB of memory; this node has", |spec| {
                spec["linux"]["resources"] = json!({"memory": {"limit": 1_u64 << 41}});
            }),
            ("io.husk.vm.cpus", |spec| {
                spec["annotations"] = json!({"io.husk.vm.cpus": "1"});
            }),
            ("io.husk.vm.vcpus", |spec| {
                spec["annotations"] = json!({"io.husk.vm.vcpus": "many"});
            }),
            ("network namespace", |spec| {
                spec["linux"]["namespaces"] = json!([{"type": "pid"}]);
            }),
            ("/no/such/volume", |spec| {
                spec["mounts"] = json!([{
                    "destination": "/v", "type": "bind",
                    "source": "/no/such/volume", "options": ["rbind"],
                }]);
            }),
        ];
        for (words, change) in cases {
            let bundle = node.bundle("spec", &["sleep"]).with(change);
            let code = if words.starts_with("/no") {
                Code::NOT_FOUND
            } else {
                Code::INVALID_ARGUMENT
            };
            expect(&node, &bundle, code, words).await;
        }
    });
}

fn missing_root() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("root", &["sleep"]);
        std::fs::remove_dir(bundle.dir.join("rootfs")).unwrap();
        expect(&node, &bundle, Code::NOT_FOUND, "rootfs").await;

        let bundle = node.bundle("overlay", &["sleep"]);
        let shim = node.start(&bundle).await;
        let mut request = bundle.request();
        request.rootfs = vec![Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec!["lowerdir=/no/such/a:/no/such/b".into()],
            ..Mount::default()
        }];
        let (_, message) = refusal(shim.create(&request).await);
        assert!(message.contains("type overlay"), "{message}");
        shim.shut_down("overlay").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}

fn panic() {
    block_on(async {
        let node = Node::new().await;
        node.configure("kernel_parameters = 'fake.panic'\n");
        let bundle = node.bundle("p", &["sleep"]);
        expect(
            &node,
            &bundle,
            Code::UNKNOWN,
            "the guest's kernel panicked; its console's last lines: \
             Kernel panic - not syncing: pretended",
        )
        .await;
    });
}

fn stuck() {
    block_on(async {
        let node = Node::new().await;
        node.configure("boot_timeout_seconds = 3\n");
        let bundle = node
            .bundle("b", &["sleep"])
            .with(|spec| spec["hostname"] = "stuck".into());
        expect(
            &node,
            &bundle,
            Code::UNKNOWN,
            "the guest was not ready after 3 s (boot_timeout_seconds); \
             its console's last lines: waiting for a disk",
        )
        .await;
    });
}

fn agent_refuses() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node
            .bundle("a", &["sleep"])
            .with(|spec| spec["hostname"] = "refused".into());
        expect(&node, &bundle, Code::INTERNAL, "the sandbox is refused").await;
    });
}

fn missing_command() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("m", &["missing"]);
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        let (code, message) = refusal(shim.run("m", "").await);
        assert_eq!(code, Code::NOT_FOUND);
        assert!(message.contains("not found in $PATH"), "{message}");
        shim.delete("m", "").await.unwrap();
        shim.shut_down("m").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}
