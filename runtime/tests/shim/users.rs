//! Users: those that containers have of their own, and those that a pod's processes
//! are on the node.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Case;
use crate::case::{Bundle, Node, Shim, block_on, processes};
use crate::containerd::connect;
use crate::sandbox::{kill, remove};

pub const CASES: &[Case] = &[
    ("users_of_a_container_are_mapped", mapped),
    ("users_of_two_pods_are_never_the_same", nobody_twice),
];

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

/// Nor where shims do not see each other's processes, as on nodes that are containers
/// of one machine, so that theirs have the same numbers.
fn nobody_twice() {
    const FIRST: u32 = 70_000;
    block_on(async {
        let nodes = [Node::new().await, Node::new().await];
        let bundles = nodes.each_ref().map(|node| {
            node.configure(&format!("first_uid = {FIRST}\n"));
            node.bundle("p", &["sleep"])
        });
        let mut apart = Vec::new();
        for (node, bundle) in nodes.iter().zip(&bundles) {
            let (machine, shim) = start_apart(node, bundle).await;
            shim.create(&bundle.request()).await.unwrap();
            apart.push((machine, shim));
        }
        let numbers = bundles
            .each_ref()
            .map(|bundle| fs::read_to_string(bundle.dir.join("shim.pid")).unwrap());
        assert_eq!(numbers[0], numbers[1]);

        let mut uids = BTreeSet::new();
        for (pid, parent) in processes(|words| words.contains(&"--uid".to_owned())) {
            if !apart.iter().any(|(_, shim)| shim.pid == parent) {
                continue;
            }
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
            let words: Vec<_> = line.split('\0').collect();
            let id = |name| {
                let at = words.iter().position(|word| *word == name).unwrap();
                words[at + 1].parse::<u32>().unwrap()
            };
            let namespace = fs::metadata(format!("/proc/{pid}/ns/pid")).unwrap();
            let offset = u32::try_from(namespace.ino() - 0xf000_0000).unwrap();
            assert_eq!([id("--uid"), id("--gid")], [FIRST + offset; 2]);
            uids.insert(id("--uid"));
        }
        // A VMM and a file server each.
        assert_eq!(uids.len(), 4, "{uids:?}");
        for (node, (mut machine, shim)) in nodes.iter().zip(apart) {
            shim.run("p", "").await.unwrap();
            kill(&shim, "p").await;
            remove(node, &shim, "p").await;
            drop(machine.stdin.take());
            machine.wait().unwrap();
        }
    });
}

/// Starts a shim in a PID namespace of its own, which is there until the process is
/// told to end.
async fn start_apart(node: &Node, bundle: &Bundle) -> (Child, Shim) {
    let start = node.shim_command(&["-id", &bundle.id, "start"], &bundle.dir);
    let variables = start.get_envs();
    let machine = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["sh", "-c", "\"$@\" < /dev/null && read -r _", "sh"])
        .arg(start.get_program())
        .args(start.get_args())
        .envs(variables.filter_map(|(name, value)| Some((name, value?))))
        .current_dir(&bundle.dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    let address = loop {
        match fs::read_to_string(bundle.dir.join("address")) {
            Ok(address) if !address.is_empty() => break address,
            _ => assert!(began.elapsed() < Duration::from_secs(10), "no address"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    // As it is numbered here.
    let dir = node.path("").display().to_string();
    let is_shim = |words: &[String]| {
        words[0].ends_with("containerd-shim-husk-v2")
            && words.iter().any(|word| word.contains(&dir))
            && !words.contains(&"start".to_owned())
    };
    let found = processes(|words| !words.is_empty() && is_shim(words));
    let [(pid, _)] = found[..] else {
        panic!("{found:?}");
    };
    let task = connect(&address).await;
    (machine, Shim { task, pid, address })
}
