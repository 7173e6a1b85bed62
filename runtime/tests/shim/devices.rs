//! Devices of the node that containers ask for, on a loop device.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::Case;
use crate::case::{Bundle, Node, block_on};
use crate::containerd::refusal;
use crate::sandbox::{add, kill, member, remove, up};

pub const CASES: &[Case] = &[
    ("devices_become_disks_of_the_pod", shared),
    ("devices_of_a_single_container", single),
    ("devices_that_were_not_asked_for_stay_out", privileged),
    ("devices_that_cannot_be_had_are_named", missing),
    ("devices_below_a_disk_are_told_of", below),
];

/// A block device of the node.
struct Loop {
    path: PathBuf,
    number: (u32, u32),
}

impl Loop {
    fn new(node: &Node) -> Option<Self> {
        let file = node.path("disk.img");
        std::fs::write(&file, vec![0; 1 << 20]).unwrap();
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&file)
            .output();
        let Some(made) = made.ok().filter(|made| made.status.success()) else {
            println!("skipped: no loop device");
            return None;
        };
        let path = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
        let number = path.metadata().unwrap().rdev();
        let number = (rustix::fs::major(number), rustix::fs::minor(number));
        Some(Self { path, number })
    }

    fn entry(&self, path: &str) -> Value {
        json!({"path": path, "type": "b", "major": self.number.0, "minor": self.number.1})
    }

    fn rule(&self, access: &str) -> Value {
        json!({"allow": true, "type": "b", "major": self.number.0, "minor": self.number.1, "access": access})
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

fn with(bundle: Bundle, devices: Value, rules: &[Value]) -> Bundle {
    bundle.with(|spec| {
        spec["linux"]["devices"] = devices;
        let mut all = vec![json!({"allow": false, "access": "rwm"})];
        all.extend(rules.iter().cloned());
        spec["linux"]["resources"] = json!({"devices": all});
    })
}

fn shared() {
    block_on(async {
        let node = Node::new().await;
        let Some(disk) = Loop::new(&node) else { return };
        let shim = up(&node, "d1").await;
        let own = |id: &str, serial: &str, access: &str| {
            let words = ["devices", "list:/dev/xvda", serial];
            let bundle = member(&node, id, "d1", &words);
            with(
                bundle,
                json!([disk.entry("/dev/xvda")]),
                &[disk.rule(access)],
            )
        };
        add(&node, &shim, &own("a", "disk:disk-1", "rwm")).await;
        // The same disk; and another one, which cannot be written to.
        add(&node, &shim, &own("b", "disk:disk-1", "rwm")).await;
        add(&node, &shim, &own("c", "disk:disk-2", "rm")).await;
        for id in ["a", "b"] {
            kill(&shim, id).await;
            shim.delete(id, "").await.unwrap();
        }
        // It has gone with the last who used it.
        add(&node, &shim, &own("d", "disk:disk-3", "rwm")).await;
        // A mounted node of it, with the rules for it and without.
        let mounted = |id: &str, words: &[&str], rules: &[Value]| {
            let bundle = member(&node, id, "d1", words);
            with(bundle, json!([]), rules).with(|spec| {
                spec["mounts"] = json!([{
                    "destination": "/v", "type": "bind", "source": disk.path, "options": ["rbind"],
                }]);
            })
        };
        let words = ["devices", "mount:disk-3", "disk:disk-3"];
        add(&node, &shim, &mounted("e", &words, &[disk.rule("rwm")])).await;
        add(&node, &shim, &mounted("f", &["devices", "mount:"], &[])).await;
        for id in ["c", "d", "e", "f", "d1"] {
            kill(&shim, id).await;
        }
        for id in ["c", "d", "e", "f"] {
            shim.delete(id, "").await.unwrap();
        }
        remove(&node, &shim, "d1").await;
    });
}

fn single() {
    block_on(async {
        let node = Node::new().await;
        let Some(disk) = Loop::new(&node) else { return };
        let words = [
            "devices",
            "list:/dev/a",
            "list:/dev/b",
            "list:/dev/fuse",
            "disk:disk-1",
            "name:fuse",
        ];
        let fuse = json!({"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229});
        let devices = json!([disk.entry("/dev/a"), disk.entry("/dev/b"), fuse]);
        let bundle = with(node.bundle("d2", &words), devices, &[disk.rule("rwm")]);
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        shim.run("d2", "").await.unwrap();
        kill(&shim, "d2").await;
        remove(&node, &shim, "d2").await;
    });
}

fn privileged() {
    block_on(async {
        let node = Node::new().await;
        let Some(disk) = Loop::new(&node) else { return };
        let of_node = disk.path.to_str().unwrap();
        let no_use = json!({"path": "/dev/null", "type": "c", "major": 1, "minor": 3});
        let all = json!({"allow": true, "access": "rwm"});
        let shim = up(&node, "d3").await;
        let devices = json!([no_use, disk.entry(of_node)]);
        let bundle = member(&node, "a", "d3", &["devices", "all"]);
        add(
            &node,
            &shim,
            &with(bundle, devices, std::slice::from_ref(&all)),
        )
        .await;
        // Asked for at a path of its own, beside the node's.
        let devices = json!([disk.entry("/dev/asked"), no_use, disk.entry(of_node)]);
        let words = ["devices", "list:/dev/asked", "disk:disk-1", "all"];
        let bundle = member(&node, "b", "d3", &words);
        add(&node, &shim, &with(bundle, devices, &[all])).await;
        for id in ["a", "b", "d3"] {
            kill(&shim, id).await;
        }
        for id in ["a", "b"] {
            shim.delete(id, "").await.unwrap();
        }
        remove(&node, &shim, "d3").await;
    });
}

fn below() {
    block_on(async {
        let node = Node::new().await;
        let Some(disk) = Loop::new(&node) else { return };
        let shim = up(&node, "d5").await;
        let mut words = vec![format!("{}:{}=disk-1", disk.number.0, disk.number.1)];
        // What its file is on, unless that is in memory.
        let on = node.path("disk.img").metadata().unwrap().dev();
        let on = format!("{}:{}", rustix::fs::major(on), rustix::fs::minor(on));
        match Path::new("/sys/dev/block").join(&on).exists() {
            true => words.push(format!("{on}=disk-1")),
            false => println!("skipped: {on} is no block device"),
        }
        let words: Vec<&str> = std::iter::once("stands-on")
            .chain(words.iter().map(String::as_str))
            .collect();
        let own = |id: &str, block_io: Value| {
            let devices = json!([disk.entry("/dev/xvda")]);
            let bundle = member(&node, id, "d5", &words);
            let bundle = with(bundle, devices, &[disk.rule("rwm")]);
            bundle.with(|spec| spec["linux"]["resources"]["blockIO"] = block_io)
        };
        let throttle = json!([{"major": disk.number.0, "minor": disk.number.1, "rate": 1000}]);
        let throttle = json!({"throttleReadBpsDevice": throttle});
        add(&node, &shim, &own("a", throttle.clone())).await;
        // Nobody is told where nothing is said of I/O, or there is no disk.
        let without = with(member(&node, "c", "d5", &words), json!([]), &[]);
        let without = without.with(|spec| spec["linux"]["resources"]["blockIO"] = throttle.clone());
        for bundle in [own("b", json!({"weight": 0})), without] {
            assert_eq!(node.start(&bundle).await.address, shim.address);
            let refused = shim.create(&bundle.request()).await;
            assert_eq!(
                refusal(refused),
                (ttrpc::Code::INVALID_ARGUMENT, String::new())
            );
        }
        for id in ["a", "d5"] {
            kill(&shim, id).await;
        }
        shim.delete("a", "").await.unwrap();
        remove(&node, &shim, "d5").await;
    });
}

fn missing() {
    block_on(async {
        let node = Node::new().await;
        let shim = up(&node, "d4").await;
        let volume = node.path("odd");
        make_node(&volume);
        let bundle = member(&node, "a", "d4", &["sleep"]).with(|spec| {
            spec["mounts"] = json!([{
                "destination": "/v", "type": "bind", "source": volume, "options": ["rbind"],
            }]);
        });
        assert_eq!(node.start(&bundle).await.address, shim.address);
        let refused = shim.create(&bundle.request()).await;
        let (code, said) = refusal(refused);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(said.contains(volume.to_str().unwrap()), "{said}");
        kill(&shim, "d4").await;
        remove(&node, &shim, "d4").await;
    });
}

/// Of a character device that nobody has.
fn make_node(path: &Path) {
    let kind = rustix::fs::FileType::CharacterDevice;
    let number = rustix::fs::makedev(4000, 1);
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, number).unwrap();
}
