//! Containers with users of their own.

use std::fs;

use serde_json::json;

use crate::Case;
use crate::case::{Node, block_on};
use crate::sandbox::{kill, remove};

pub const CASES: &[Case] = &[("users_of_a_container_are_mapped", mapped)];

/// The agent makes them, and the node shows files with their owners.
fn mapped() {
    block_on(async {
        let node = Node::new().await;
        let volume = tempfile::tempdir().unwrap();
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        let bundle = node.bundle("users", &["sleep"]).with(|spec| {
            // What the agent expects of that one.
            spec["hostname"] = "mapped".into();
            spec["linux"]["namespaces"] =
                json!([{"type": "pid"}, {"type": "network"}, {"type": "user"}]);
            spec["linux"]["uidMappings"] = map.clone();
            spec["linux"]["gidMappings"] = map.clone();
            spec["mounts"] = json!([{
                "destination": "/v", "type": "bind", "source": volume.path(),
                "options": ["rbind"], "uidMappings": map, "gidMappings": map,
            }]);
        });
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", shim.pid)).unwrap();
        let fields = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>());
        let shown = fields.filter(|fields| fields[4].ends_with("/.volumes/0"));
        let flags: Vec<_> = shown.map(|fields| fields[5]).collect();
        assert!(
            flags.len() == 1 && flags[0].split(',').any(|flag| flag == "idmapped"),
            "{mounts}"
        );
        shim.run("users", "").await.unwrap();
        kill(&shim, "users").await;
        remove(&node, &shim, "users").await;
    });
}
