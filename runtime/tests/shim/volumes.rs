//! Volumes that the node changes while the guest has them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::json;

use crate::Case;
use crate::case::{Node, block_on};
use crate::lifecycle::finish;

pub const CASES: &[Case] = &[("volume_of_settings_follows_the_node", settings)];

/// As the kubelet changes it: all at once, by a link.
fn put(volume: &Path, version: &str, value: &str) {
    fs::create_dir_all(volume.join(version)).unwrap();
    fs::write(volume.join(version).join("key"), value).unwrap();
    symlink(version, volume.join("..new")).unwrap();
    fs::rename(volume.join("..new"), volume.join("..data")).unwrap();
}

fn settings() {
    block_on(async {
        let node = Node::new().await;
        let volume = node.path("pods/u/volumes/kubernetes.io~configmap/settings");
        put(&volume, "..1", "one");
        let container = |id: &str, wanted: &str| {
            node.bundle(id, &["settings", wanted]).with(|spec| {
                spec["mounts"] = json!([{
                    "destination": "/settings", "type": "bind",
                    "source": volume, "options": ["rbind", "ro"],
                }]);
            })
        };
        // It ends when it has seen what it wants to see.
        for (id, wanted) in [("a", "one"), ("b", "two")] {
            let bundle = container(id, wanted);
            let shim = node.start(&bundle).await;
            shim.create(&bundle.request()).await.unwrap();
            shim.run(id, "").await.unwrap();
            if wanted == "two" {
                put(&volume, "..2", "two");
                fs::remove_dir_all(volume.join("..1")).unwrap();
            }
            let waited = shim.wait(id, "").await;
            assert_eq!(waited.map(|end| end.exit_status), Ok(0), "{wanted}");
            finish(&node, &shim, id).await;
        }
        node.assert_clean();
    });
}
