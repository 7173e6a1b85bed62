//! Pods whose cgroup is not left as easily as it was entered.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use serde_json::{Value, json};

use crate::Case;
use crate::case::{Bundle, Node, apart, block_on};
use crate::containerd::refusal;
use crate::lifecycle::{finish, kill};

pub const CASES: &[Case] = &[
    ("cgroup_is_left_though_its_origin_is_gone", origin_is_gone),
    ("cgroup_that_is_not_left_is_removed_later", not_left),
    ("cgroup_of_a_pod_before_is_removed", left_before),
    ("cgroup_has_all_of_its_pod", all_inside),
    ("cgroup_that_takes_nobody_is_named", takes_nobody),
];

/// Where shims look for cgroup v2.
const MOUNT: &str = "/sys/fs/cgroup";

/// A cgroup of the test's own.
struct Group {
    name: String,
}

impl Group {
    fn new(name: &str) -> Self {
        let name = format!("husk-shim-{name}-{}", std::process::id());
        let group = Self { name };
        fs::create_dir(group.dir()).unwrap();
        group
    }

    fn dir(&self) -> PathBuf {
        Path::new(MOUNT).join(&self.name)
    }

    /// A bundle with a cgroup below this one, and where that is to be.
    fn bundle(&self, node: &Node, id: &str) -> (Bundle, PathBuf) {
        let path = format!("/{}/{id}", self.name);
        let bundle = node.bundle(id, &["sleep"]);
        let bundle = bundle.with(|spec| spec["linux"]["cgroupsPath"] = json!(path));
        (bundle, self.dir().join(id))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.dir());
    }
}

/// Does `case` where cgroup v2 is mounted as on nodes, whatever this machine has
/// there.
fn with_cgroups<F: Future<Output = ()> + 'static>(case: fn() -> F) {
    apart(move || {
        // Shims see what is mounted here later, and nobody else does.
        let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
        mount_change("/", shared).unwrap();
        match mount("none", MOUNT, "cgroup2", MountFlags::empty(), None) {
            Ok(()) => block_on(case()),
            Err(error) => println!("skipped: no cgroup v2: {error}"),
        }
    });
}

/// As when systemd or containerd has begun anew meanwhile.
fn origin_is_gone() {
    with_cgroups(|| async {
        let node = Node::new().await;
        let (origin, pods) = (Group::new("origin"), Group::new("pods"));
        let (bundle, own) = pods.bundle(&node, "o");
        let shim = node.start(&bundle).await;
        let procs = origin.dir().join("cgroup.procs");
        fs::write(procs, shim.pid.to_string()).unwrap();
        shim.create(&bundle.request()).await.unwrap();
        shim.run("o", "").await.unwrap();
        assert!(own.exists());
        fs::remove_dir(origin.dir()).unwrap();
        kill(&shim, "o", "", 9).await.unwrap();
        shim.wait("o", "").await.unwrap();
        finish(&node, &shim, "o").await;
        assert!(!own.exists());
    });
}

/// Nowhere may the shim go, which is written down for who comes after it.
async fn leave_behind(node: &Node, bundle: &Bundle) {
    let shim = node.start(bundle).await;
    shim.create(&bundle.request()).await.unwrap();
    shim.run("n", "").await.unwrap();
    kill(&shim, "n", "", 9).await.unwrap();
    shim.wait("n", "").await.unwrap();
    mount("none", MOUNT, "tmpfs", MountFlags::RDONLY, None).unwrap();
    shim.delete("n", "").await.unwrap();
    shim.shut_down("n").await;
    shim.assert_gone().await;
    unmount(MOUNT, UnmountFlags::empty()).unwrap();
    assert!(is_written_down(node));
}

fn is_written_down(node: &Node) -> bool {
    node.state_dir().join("test/n/state.json").exists()
}

/// As containerd asks when the shim is gone; what it says of that.
fn delete(node: &Node, bundle: &Bundle) -> String {
    let dir = bundle.dir.display().to_string();
    let arguments = ["-id", "n", "-bundle", &dir, "delete"];
    let deleted = node.shim(&arguments, &bundle.dir, b"");
    assert!(deleted.status.success());
    String::from_utf8(deleted.stderr).unwrap()
}

fn not_left() {
    with_cgroups(|| async {
        let node = Node::new().await;
        let pods = Group::new("kept");
        let (bundle, own) = pods.bundle(&node, "n");
        leave_behind(&node, &bundle).await;
        assert!(own.exists());
        // Somebody else's, below it.
        fs::create_dir(own.join("other")).unwrap();
        let said = delete(&node, &bundle);
        assert!(said.contains("not all of test/n is gone"), "{said}");
        assert!(is_written_down(&node));
        // The next pod of the name does not forget it.
        let shim = node.start(&bundle).await;
        let (_, words) = refusal(shim.create(&bundle.request()).await);
        assert!(words.starts_with("pod's cgroup "), "{words}");
        shim.shut_down("n").await;
        shim.assert_gone().await;
        assert!(is_written_down(&node));
        fs::remove_dir(own.join("other")).unwrap();
        assert_eq!(delete(&node, &bundle), "");
        assert!(!own.exists());
        node.assert_clean();
    });
}

/// Nor does a shim that could make nothing.
fn left_before() {
    with_cgroups(|| async {
        let node = Node::new().await;
        let pods = Group::new("before");
        let (bundle, own) = pods.bundle(&node, "n");
        leave_behind(&node, &bundle).await;
        let shim = node.start(&bundle).await;
        fs::write(bundle.dir.join("config.json"), "{").unwrap();
        shim.create(&bundle.request()).await.unwrap_err();
        shim.shut_down("n").await;
        shim.assert_gone().await;
        assert!(!own.exists());
        node.assert_clean();
    });
}

/// What the pod is counts in its cgroup, all of it.
fn all_inside() {
    with_cgroups(|| async {
        let node = Node::new().await;
        let pods = Group::new("inside");
        let (bundle, own) = pods.bundle(&node, "i");
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        shim.run("i", "").await.unwrap();
        let state = fs::read(node.state_dir().join("test/i/state.json")).unwrap();
        let state: Value = serde_json::from_slice(&state).unwrap();
        let mut meant = ["shim", "vmm", "file_server"].map(|name| state[name]["pid"].as_u64());
        meant.sort_unstable();
        // Nobody waits for the shim's move.
        let began = Instant::now();
        loop {
            let procs = fs::read_to_string(own.join("cgroup.procs")).unwrap();
            let mut inside: Vec<_> = procs.lines().map(|pid| pid.parse().ok()).collect();
            inside.sort_unstable();
            if inside == meant {
                break;
            }
            assert!(
                began.elapsed() < Duration::from_secs(5),
                "{inside:?} of {meant:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        kill(&shim, "i", "", 9).await.unwrap();
        shim.wait("i", "").await.unwrap();
        finish(&node, &shim, "i").await;
        assert!(!own.exists());
    });
}

/// In which no process can begin, as where controllers are for cgroups below it.
fn takes_nobody() {
    with_cgroups(|| async {
        let node = Node::new().await;
        let pods = Group::new("threads");
        let (bundle, own) = pods.bundle(&node, "t");
        fs::write(pods.dir().join("cgroup.type"), "threaded").unwrap();
        let shim = node.start(&bundle).await;
        let (_, words) = refusal(shim.create(&bundle.request()).await);
        let procs = own.join("cgroup.procs").display().to_string();
        assert!(
            words.contains(&format!("pod's cgroup {procs}: ")),
            "{words}"
        );
        shim.shut_down("t").await;
        shim.assert_gone().await;
        assert!(!own.exists());
        node.assert_clean();
    });
}
