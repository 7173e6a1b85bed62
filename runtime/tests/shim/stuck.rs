//! Processes that no signal ends: they wait in the kernel for a disk that does not
//! answer.

use std::fs;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{DeleteRequest, KillRequest, WaitRequest};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, SandboxStatusRequest, ShutdownSandboxRequest, StartSandboxRequest,
    StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::Client;
use containerd_shim_protos::types::mount::Mount;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use ttrpc::Code;
use ttrpc::context::with_duration;

use crate::Case;
use crate::case::{Node, Shim, apart, block_on, is_alive};
use crate::containerd::{refusal, soon};
use crate::lifecycle::kill;
use crate::sandbox::{add, member, up};

pub const CASES: &[Case] = &[
    ("stuck_processes_do_not_hold_up_their_pod", pod),
    ("stuck_vmm_that_may_write_to_a_disk_holds_its_pod", disk),
    ("pod_that_was_held_goes_by_itself", unasked),
    ("stuck_vmm_holds_a_pod_of_the_sandbox_api", sandbox),
];

/// Kernel parameter that has a thread of the VMM ask for a file, and which.
pub const PARAMETER: &str = "fake.stuck=";

/// What a shim waits for two of them, and a guest's memory more.
const AT_MOST: Duration = Duration::from_secs(60);

/// `fuse_in_header` of linux/fuse.h, and what is answered to `FUSE_INIT`.
const HEADER_BYTES: usize = 40;
const INIT: u32 = 26;
const INIT_BYTES: usize = 64;

/// A file system that answers nobody, until it is dropped.
struct Hang {
    path: PathBuf,
    asked: Arc<AtomicUsize>,
}

impl Hang {
    fn mount(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        let mut options = File::options();
        let mut fuse = options.read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            fuse.as_raw_fd()
        );
        let data = std::ffi::CString::new(data).unwrap();
        mount("hang", &path, "fuse", MountFlags::empty(), &*data).unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 18];
            while let Ok(HEADER_BYTES..) = fuse.read(&mut buffer) {
                let opcode = u32::from_ne_bytes(buffer[4..8].try_into().unwrap());
                if opcode != INIT {
                    count.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                let version = [7_u32, 31].map(u32::to_ne_bytes).concat();
                let length = (16 + INIT_BYTES) as u32;
                let mut answer = length.to_ne_bytes().to_vec();
                answer.extend(0_u32.to_ne_bytes());
                answer.extend(&buffer[8..16]);
                answer.extend(version);
                answer.resize(length as usize, 0);
                fuse.write_all(&answer).unwrap();
            }
        });
        Self { path, asked }
    }

    async fn has_been_asked(&self, times: usize) {
        let began = Instant::now();
        while self.asked.load(Ordering::Relaxed) < times {
            assert!(began.elapsed() < Duration::from_secs(10));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Hang {
    fn drop(&mut self) {
        // All who wait are told that it has gone.
        let _ = unmount(&self.path, UnmountFlags::FORCE);
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}

fn pod() {
    apart(|| block_on(stuck()));
}

fn disk() {
    apart(|| {
        block_on(async {
            tokio::join!(holds(), holds_with_server());
        });
    });
}

fn sandbox() {
    apart(|| block_on(holds_sandbox()));
}

fn unasked() {
    apart(|| block_on(goes()));
}

/// A file server that asks for what hangs.
fn hanging_server(node: &Node, hang: &Hang) -> String {
    let server = node.path("server");
    let file = hang.path.display();
    fs::write(&server, format!("#!/bin/sh\nexec stat {file}\n")).unwrap();
    fs::set_permissions(&server, fs::Permissions::from_mode(0o755)).unwrap();
    server.display().to_string()
}

async fn stuck() {
    let node = Node::new().await;
    let hang = Hang::mount(node.path("hang"));
    let file = hang.path.display();
    let server = hanging_server(&node, &hang);
    node.configure(&format!(
        "file_server = '{server}'\nkernel_parameters = '{PARAMETER}{file}'\n"
    ));
    let shim = up(&node, "p").await;
    let bundle = member(&node, "c", "p", &["sleep"]);
    add(&node, &shim, &bundle).await;
    hang.has_been_asked(2).await;

    let began = Instant::now();
    let request = KillRequest {
        id: "p".into(),
        signal: 9,
        ..KillRequest::default()
    };
    shim.task.kill(soon(), &request).await.unwrap();
    for id in ["c", "p"] {
        let request = WaitRequest {
            id: id.into(),
            ..WaitRequest::default()
        };
        let end = shim.task.wait(with_duration(AT_MOST), &request).await;
        assert_eq!(end.unwrap().exit_status, 137);
    }
    for id in ["c", "p"] {
        let request = DeleteRequest {
            id: id.into(),
            ..DeleteRequest::default()
        };
        let deleted = shim.task.delete(with_duration(AT_MOST), &request).await;
        assert_eq!(deleted.unwrap().exit_status, 137);
    }
    shim.shut_down("p").await;
    shim.assert_gone().await;
    assert!(began.elapsed() < AT_MOST, "{:?}", began.elapsed());

    // Both are there still, and whoever comes later knows of them.
    let state = fs::read(node.state_dir().join("test/p/state.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    let pid = |name: &str| i32::try_from(state[name]["pid"].as_i64().unwrap()).unwrap();
    let pids = [pid("vmm"), pid("file_server")];
    let threads = |pid: i32| fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    assert!(pids.iter().all(|pid| threads(*pid) > 0), "{state}");
    let dir = node.path("bundles/p").display().to_string();
    let delete = || {
        let began = Instant::now();
        let arguments = ["-id", "p", "-bundle", &dir, "delete"];
        let deleted = node.shim(&arguments, &node.path(""), b"");
        // containerd kills it after that.
        assert!(began.elapsed() < Duration::from_secs(5));
        assert!(deleted.status.success());
        String::from_utf8(deleted.stderr).unwrap()
    };
    // containerd asks for that as soon as the shim has ended.
    let said = delete();
    assert!(said.contains("not all of test/p is gone"), "{said}");
    assert!(pids.iter().all(|pid| threads(*pid) > 0), "{state}");
    // Nobody else comes in their place.
    let again = node.start(&node.bundle("p", &["sleep"])).await;
    let request = node.bundle("p", &["sleep"]).request();
    let (code, words) = refusal(again.create(&request).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    let pid = format!("a pod p before, whose process {}", pids[0]);
    assert!(words.contains(&pid), "{words}");
    again.shut_down("p").await;
    again.assert_gone().await;
    drop(hang);
    assert_eq!(delete(), "");
    assert!(!pids.into_iter().any(is_alive));
    node.assert_clean();
}

enum Server {
    Answers,
    Hangs,
}

/// A container with a disk, whose VMM hangs and which was killed.
struct Killed {
    // Goes first: the node's directory cannot go before.
    hang: Hang,
    node: Node,
    shim: Shim,
}

impl Killed {
    async fn new(server: Server) -> Self {
        let node = Node::new().await;
        let hang = Hang::mount(node.path("hang"));
        let (lines, stuck) = match server {
            Server::Answers => (String::new(), 1),
            Server::Hangs => {
                let server = hanging_server(&node, &hang);
                (format!("file_server = '{server}'\n"), 2)
            }
        };
        let file = hang.path.display();
        node.configure(&format!("{lines}kernel_parameters = '{PARAMETER}{file}'\n"));
        let log = node.path("hooks").display().to_string();
        let bundle = node.bundle("d", &["sleep"]).with(|spec| {
            let script = format!("echo gone >> {log}");
            spec["hooks"] =
                json!({"poststop": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
        });
        let shim = node.start(&bundle).await;
        let mut request = bundle.request();
        request.rootfs = vec![disk_for_root(&node)];
        shim.create(&request).await.unwrap();
        shim.run("d", "").await.unwrap();
        hang.has_been_asked(stuck).await;
        kill(&shim, "d", "", 9).await.unwrap();
        assert_eq!(shim.wait("d", "").await.unwrap().exit_status, 137);
        Self { hang, node, shim }
    }

    /// It is deleted, which the VMM holds up.
    async fn refused(&self) {
        let request = DeleteRequest {
            id: "d".into(),
            ..DeleteRequest::default()
        };
        let deleted = self.shim.task.delete(with_duration(AT_MOST), &request);
        let (code, words) = refusal(deleted.await);
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(words.contains("may still write to the disks"), "{words}");
    }

    fn state(&self) -> Value {
        let state = fs::read(self.node.state_dir().join("test/d/state.json"));
        serde_json::from_slice(&state.unwrap()).unwrap()
    }

    /// The disk answers, and so it goes without being asked for.
    async fn goes(self) -> (Node, Shim) {
        let Self { hang, node, shim } = self;
        assert_eq!(times_gone(&node), [0, 0]);
        drop(hang);
        node.events.wait_for("/tasks/delete", 1).await;
        let (code, _) = refusal(shim.delete("d", "").await);
        assert_eq!(code, Code::NOT_FOUND);
        (node, shim)
    }
}

/// How often the deletion was told, and the hooks have run that follow it.
fn times_gone(node: &Node) -> [usize; 2] {
    let topics = node.events.topics();
    let told = topics.iter().filter(|topic| *topic == "/tasks/delete");
    let hooks = fs::read_to_string(node.path("hooks")).unwrap_or_default();
    [told.count(), hooks.lines().count()]
}

fn disk_for_root(node: &Node) -> Mount {
    let image = node.path("image.ext4");
    fs::write(&image, vec![0; 4096]).unwrap();
    Mount {
        type_: "ext4".into(),
        source: image.display().to_string(),
        ..Mount::default()
    }
}

/// Whoever has the disk next would have it written to by the VMM of before.
async fn holds() {
    let killed = Killed::new(Server::Answers).await;
    let server = killed.state()["file_server"]["pid"].as_i64().unwrap();
    let server = Pid::from_raw(i32::try_from(server).unwrap()).unwrap();
    // Then nobody waits for that after the VMM, and the deletion may be ahead of who
    // tells of the machine's end.
    let ahead = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        kill_process(server, Signal::KILL).unwrap();
    };
    tokio::join!(killed.refused(), ahead);
    // As often as it is asked; it is written down, too, how the machine ended.
    killed.refused().await;
    let state = killed.state();
    assert_eq!(state["end"]["kind"], "killed", "{state}");
    let (node, shim) = killed.goes().await;
    shim.shut_down("d").await;
    shim.assert_gone().await;
    node.assert_clean();
    assert_eq!(times_gone(&node), [1, 1]);
}

/// containerd works through what it asks for again one after the other.
async fn holds_with_server() {
    let killed = Killed::new(Server::Hangs).await;
    killed.refused().await;
    let began = Instant::now();
    killed.refused().await;
    assert!(began.elapsed() < Duration::from_secs(3));
    let (node, shim) = killed.goes().await;
    shim.shut_down("d").await;
    shim.assert_gone().await;
    node.assert_clean();
}

/// Docker does not ask again, for the deletion or for the shim's end.
async fn goes() {
    let killed = Killed::new(Server::Answers).await;
    killed.refused().await;
    let (node, shim) = killed.goes().await;
    let began = Instant::now();
    while is_alive(shim.pid) {
        assert!(began.elapsed() < Duration::from_secs(45), "the shim stays");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    shim.assert_gone().await;
    node.assert_clean();
    assert_eq!(times_gone(&node), [1, 1]);
}

/// Where containerd asks for no deletion of the pod, but for its end.
async fn holds_sandbox() {
    let node = Node::new().await;
    let hang = Hang::mount(node.path("hang"));
    let file = hang.path.display();
    node.configure(&format!("kernel_parameters = '{PARAMETER}{file}'\n"));
    let bundle = node.bundle("s", &[]);
    fs::remove_file(bundle.dir.join("config.json")).unwrap();
    let shim = node.start(&bundle).await;
    let sandbox = SandboxClient::new(Client::connect(&shim.address).await.unwrap());
    let create = CreateSandboxRequest {
        sandbox_id: "s".into(),
        bundle_path: bundle.dir.display().to_string(),
        ..CreateSandboxRequest::default()
    };
    sandbox.create_sandbox(soon(), &create).await.unwrap();
    let start = StartSandboxRequest {
        sandbox_id: "s".into(),
        ..StartSandboxRequest::default()
    };
    sandbox.start_sandbox(soon(), &start).await.unwrap();
    let mut request = member(&node, "c", "s", &["sleep"]).request();
    request.rootfs = vec![disk_for_root(&node)];
    shim.create(&request).await.unwrap();
    shim.run("c", "").await.unwrap();
    hang.has_been_asked(1).await;
    kill(&shim, "c", "", 9).await.unwrap();
    shim.wait("c", "").await.unwrap();
    shim.delete("c", "").await.unwrap();

    let stop = async || {
        let stop = StopSandboxRequest {
            sandbox_id: "s".into(),
            timeout_secs: 1,
            ..StopSandboxRequest::default()
        };
        sandbox.stop_sandbox(with_duration(AT_MOST), &stop).await
    };
    let end = async || {
        let end = ShutdownSandboxRequest {
            sandbox_id: "s".into(),
            ..ShutdownSandboxRequest::default()
        };
        sandbox.shutdown_sandbox(soon(), &end).await
    };
    let state = async || {
        let status = SandboxStatusRequest {
            sandbox_id: "s".into(),
            ..SandboxStatusRequest::default()
        };
        let told = sandbox.sandbox_status(soon(), &status).await.unwrap();
        told.state
    };
    let wait = WaitSandboxRequest {
        sandbox_id: "s".into(),
        ..WaitSandboxRequest::default()
    };
    let still = |(code, words): (Code, String)| {
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(words.contains("may still write to the disks"), "{words}");
    };
    let waits = async {
        let end = sandbox.wait_sandbox(with_duration(AT_MOST), &wait).await;
        (end.unwrap().exit_status, Instant::now())
    };
    let asks = async {
        for _ in 0..2 {
            still(refusal(stop().await));
        }
        // It has been told all the same.
        node.events.wait_for("/tasks/exit", 2).await;
        still(refusal(end().await));
        assert_eq!(state().await, "SANDBOX_READY");
        tokio::time::sleep(Duration::from_millis(500)).await;
        let thawed = Instant::now();
        drop(hang);
        thawed
    };
    let ((code, ended), thawed) = tokio::join!(waits, asks);
    assert_eq!(code, 143);
    assert!(ended > thawed);
    assert_eq!(state().await, "SANDBOX_NOTREADY");
    stop().await.unwrap();
    end().await.unwrap();
    shim.assert_gone().await;
    node.assert_clean();
}
