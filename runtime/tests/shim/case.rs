//! What a case has: a node's worth of directories, a shim, and a check at the
//! end that nothing of it stayed.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, ShutdownRequest,
    StartRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::TaskClient;
use husk_node::sums::{self, Hash};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::{Value, json};

use crate::containerd::{EventService, connect, soon};

/// A node.
pub struct Node {
    dir: tempfile::TempDir,
    /// What takes events.
    pub events: EventService,
}

impl Node {
    /// An empty one.
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let events = EventService::start(dir.path()).await;
        let node = Self { dir, events };
        fs::create_dir(node.path("image")).unwrap();
        for name in ["vmlinux", "initramfs.cpio"] {
            node.put_image(name, name);
        }
        node.configure("");
        node
    }

    /// Writes the configuration; later lines win over ours.
    pub fn configure(&self, lines: &str) {
        let this = std::env::current_exe().unwrap();
        let image = self.path("image");
        let mut text = lines.to_owned();
        for (key, value) in [
            ("vmm", this.clone()),
            ("file_server", this),
            ("kernel", image.join("vmlinux")),
            ("initramfs", image.join("initramfs.cpio")),
            ("state_dir", self.state_dir()),
            ("template_dir", self.path("templates")),
        ] {
            if !lines.contains(&format!("{key} =")) {
                text += &format!("{key} = {:?}\n", value.display().to_string());
            }
        }
        if !lines.contains("template_max_age_seconds") {
            text += "template_max_age_seconds = 0\n";
        }
        fs::write(self.dir.path().join("config.toml"), text).unwrap();
    }

    /// Puts a file that guests boot from, and says so beside it.
    pub fn put_image(&self, name: &str, text: &str) {
        let image = self.path("image");
        fs::write(image.join(name), text).unwrap();
        let entries = fs::read_dir(&image).unwrap();
        let mut sums = String::new();
        for path in entries.map(|entry| entry.unwrap().path()) {
            let name = path.file_name().unwrap().to_str().unwrap();
            if name != sums::FILE {
                let (hash, _) = Hash::of(&fs::File::open(&path).unwrap()).unwrap();
                sums += &format!("{hash}  {name}\n");
            }
        }
        fs::write(image.join(sums::FILE), sums).unwrap();
    }

    /// Where shims keep their state.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Some path on it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A bundle for a command, with a root.
    pub fn bundle(&self, id: &str, command: &[&str]) -> Bundle {
        let dir = self.dir.path().join("bundles").join(id);
        fs::create_dir_all(dir.join("rootfs")).unwrap();
        let spec = json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": {"args": command},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}]},
        });
        let bundle = Bundle {
            id: id.to_owned(),
            dir,
            spec,
        };
        bundle.write();
        bundle
    }

    /// The shim's program, as containerd calls it.
    pub fn shim(&self, arguments: &[&str], dir: &Path, input: &[u8]) -> Output {
        let mut child = self.shim_process(arguments, dir);
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    /// The program, running, with pipes as standard streams.
    pub fn shim_process(&self, arguments: &[&str], dir: &Path) -> Child {
        let mut command = self.shim_command(arguments, dir);
        command.stdin(Stdio::piped()).spawn().unwrap()
    }

    /// The program, not yet started.
    pub fn shim_command(&self, arguments: &[&str], dir: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-shim-husk-v2"));
        command
            .args(["-namespace", "test"])
            .args(["-address", &self.address(), "-publish-binary", "/bin/false"])
            .args(arguments)
            .env("HUSK_CONFIG", self.dir.path().join("config.toml"))
            .env("TTRPC_ADDRESS", self.events.path())
            .current_dir(dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Starts a shim for a bundle.
    pub async fn start(&self, bundle: &Bundle) -> Shim {
        let started = self.try_start(bundle).await;
        started.unwrap_or_else(|errors| panic!("{errors}"))
    }

    /// Starts a shim for a bundle, unless it says why not.
    pub async fn try_start(&self, bundle: &Bundle) -> Result<Shim, String> {
        self.try_start_with(bundle, |_| ()).await
    }

    /// Likewise, with the program changed by `change`.
    pub async fn try_start_with(
        &self,
        bundle: &Bundle,
        change: impl FnOnce(&mut Command),
    ) -> Result<Shim, String> {
        let mut command = self.shim_command(&["-id", &bundle.id, "start"], &bundle.dir);
        change(&mut command);
        let output = command.stdin(Stdio::null()).output().unwrap();
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let address = String::from_utf8(output.stdout).unwrap();
        assert_eq!(
            fs::read_to_string(bundle.dir.join("address")).unwrap(),
            address
        );
        let pid = fs::read_to_string(bundle.dir.join("shim.pid")).unwrap_or_default();
        Ok(Shim {
            task: connect(&address).await,
            pid: pid.parse().unwrap_or(0),
            address,
        })
    }

    /// Nothing of any shim is left.
    pub fn assert_clean(&self) {
        let left: Vec<_> = fs::read_dir(self.state_dir())
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert!(left.is_empty(), "{left:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let dir = self.dir.path().display().to_string();
        assert!(!mounts.contains(&dir), "{mounts}");
    }

    fn address(&self) -> String {
        self.dir
            .path()
            .join("containerd.sock")
            .display()
            .to_string()
    }
}

/// A bundle.
pub struct Bundle {
    /// Its container.
    pub id: String,
    /// Where it is.
    pub dir: PathBuf,
    /// Its spec.
    pub spec: Value,
}

impl Bundle {
    /// Writes the spec.
    pub fn write(&self) {
        fs::write(self.dir.join("config.json"), self.spec.to_string()).unwrap();
    }

    /// Changes the spec.
    pub fn with(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.spec);
        self.write();
        self
    }

    /// Makes a fifo for a stream.
    pub fn fifo(&self, name: &str) -> String {
        let path = self.dir.join(name);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        path.display().to_string()
    }

    /// A request for it, without streams.
    pub fn request(&self) -> CreateTaskRequest {
        CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.dir.display().to_string(),
            ..CreateTaskRequest::default()
        }
    }
}

/// A running shim.
pub struct Shim {
    /// Its Task service.
    pub task: TaskClient,
    /// Its process.
    pub pid: i32,
    /// Where it serves.
    pub address: String,
}

impl Shim {
    /// Creates a container.
    pub async fn create(&self, request: &CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        self.task.create(soon(), request).await
    }

    /// Starts a container, or a process in it.
    pub async fn run(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..StartRequest::default()
        };
        Ok(self.task.start(soon(), &request).await?.pid)
    }

    /// Waits for the end of one.
    pub async fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<WaitResponse> {
        let request = WaitRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..WaitRequest::default()
        };
        self.task.wait(soon(), &request).await
    }

    /// Deletes one.
    pub async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..DeleteRequest::default()
        };
        self.task.delete(soon(), &request).await
    }

    /// Asks it to end.
    pub async fn shut_down(&self, id: &str) {
        let request = ShutdownRequest {
            id: id.to_owned(),
            ..ShutdownRequest::default()
        };
        self.task.shutdown(soon(), &request).await.unwrap();
    }

    /// Waits until its process is gone, and its socket.
    pub async fn assert_gone(&self) {
        let began = Instant::now();
        let path = self.address.strip_prefix("unix://").unwrap();
        while is_alive(self.pid) || Path::new(path).exists() {
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "shim {}",
                self.pid
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// The process is there and no zombie.
pub fn is_alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('Z'))
    })
}

/// All processes whose command lines meet a condition, with their parents.
pub fn processes(meant: impl Fn(&[String]) -> bool) -> Vec<(i32, i32)> {
    let entries = fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let found = pids.filter_map(|pid: i32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<_> = line.split_terminator('\0').map(str::to_owned).collect();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, rest) = stat.rsplit_once(") ")?;
        let parent = rest.split(' ').nth(1)?.parse().ok()?;
        meant(&words).then_some((pid, parent))
    });
    found.collect()
}

/// Does `case` where nobody else comes across what it mounts.
pub fn apart(case: impl FnOnce() + Send + 'static) {
    let apart = move || {
        // SAFETY: no other thread relies on this one's working directory.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        case();
    };
    let case = std::thread::spawn(apart).join();
    case.unwrap_or_else(|failure| std::panic::resume_unwind(failure));
}

/// Runs a case's future.
pub fn block_on(case: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(case);
}
