//! A pretended agent: its processes are threads that know a few commands.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use husk_protocol::agent::{
    Agent, ContainerRequest, CreateContainerRequest, CreateContainerResponse, CreateSandboxRequest,
    CreateSandboxResponse, DeleteContainerRequest, Empty, Event, ExecRequest, ExecResponse,
    ProcessRequest, RemoveDeviceRequest, RemoveVolumeRequest, ServeNamesRequest, SetVolumeRequest,
    SignalRequest, StatsResponse, Streams, UpdateNetworkRequest, WaitResponse, create_agent,
    create_shell,
};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::asynchronous::transport::Listener;
use ttrpc::{Code, Error, Result};

use crate::guest_shell::Shells;
use crate::vmm::{self, Ports};

/// What `flood` writes, bytes: more than a fifo holds.
pub const FLOOD: usize = 128 << 10;

/// How an address begins that this guest does not take.
const UNWANTED: &str = "10.77.";

struct Guest {
    ports: Ports,
    processes: Mutex<HashMap<(String, String), Process>>,
    events: tokio::sync::Mutex<mpsc::UnboundedReceiver<Event>>,
    tell: mpsc::UnboundedSender<Event>,
    off: watch::Sender<bool>,
    /// What it was told of its network, a word each.
    network: Mutex<Vec<String>>,
    /// It asks for names without end.
    is_curious: AtomicBool,
    /// It dials nobody the next time that it is to.
    forgets: AtomicBool,
    /// The file `key` of its volume.
    setting: watch::Sender<String>,
}

struct Process {
    arguments: Vec<String>,
    streams: Streams,
    exit: watch::Sender<Option<u32>>,
}

/// Serves until the connection ends or the guest is powered off.
pub fn serve(connection: UnixStream, ports: Ports, has_shells: bool) {
    let shells = Shells::new(Arc::clone(&ports));
    let (tell, events) = mpsc::unbounded_channel();
    let (off, mut is_off) = watch::channel(false);
    let guest = Arc::new(Guest {
        ports,
        processes: Mutex::default(),
        events: tokio::sync::Mutex::new(events),
        tell,
        off,
        network: Mutex::default(),
        is_curious: AtomicBool::new(false),
        forgets: AtomicBool::new(false),
        setting: watch::Sender::default(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async move {
        connection.set_nonblocking(true).unwrap();
        let stream = tokio::net::UnixStream::from_std(connection).unwrap();
        let once = futures::stream::once(async { io::Result::Ok(stream) });
        let listener = Listener::new(futures::StreamExt::chain(once, futures::stream::pending()));
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(create_agent(guest));
        if has_shells {
            server = server.register_service(create_shell(Arc::new(shells)));
        }
        server.start().await.unwrap();
        is_off.wait_for(|off| *off).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    });
}

impl Guest {
    fn add(&self, id: &str, exec: &str, arguments: Vec<String>, streams: Streams) {
        let process = Process {
            arguments,
            streams,
            exit: watch::Sender::new(None),
        };
        let key = (id.to_owned(), exec.to_owned());
        self.processes.lock().unwrap().insert(key, process);
    }

    fn run(&self, id: &str, exec: &str) -> Result<()> {
        let key = (id.to_owned(), exec.to_owned());
        let processes = self.processes.lock().unwrap();
        let process = processes.get(&key).ok_or_else(missing)?;
        if process.arguments[0] == "missing" {
            let message = "exec: \"missing\": not found in $PATH";
            return Err(status(Code::NOT_FOUND, message));
        }
        if process.arguments[0] == "unstartable" {
            return Err(status(Code::INTERNAL, "the start is refused"));
        }
        let dial = |port| self.ports.lock().unwrap().remove(&port);
        let stdin = dial(process.streams.stdin_port);
        let stdout = dial(process.streams.stdout_port);
        let stderr = dial(process.streams.stderr_port);
        for stream in [&stdin, &stdout, &stderr].into_iter().flatten() {
            stream.set_nonblocking(false).unwrap();
        }
        let (arguments, exit) = (process.arguments.clone(), process.exit.clone());
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        match words[..] {
            ["oom"] => {
                let mut event = Event::default();
                event.mut_oom().container_id = id.to_owned();
                self.tell.send(event).unwrap();
                exit.send_replace(Some(137));
                return Ok(());
            }
            ["refused"] => {
                let refused = vmm::REFUSED.load(Ordering::Relaxed).to_string();
                stdout.unwrap().write_all(refused.as_bytes()).unwrap();
                exit.send_replace(Some(0));
                return Ok(());
            }
            ["rates"] => {
                let rates = vmm::RATES.lock().unwrap().join(" ");
                stdout.unwrap().write_all(rates.as_bytes()).unwrap();
                exit.send_replace(Some(0));
                return Ok(());
            }
            ["plugged"] => {
                let plugged = vmm::PLUGGED.load(Ordering::Relaxed);
                let awaited = vmm::AWAITED.load(Ordering::Relaxed);
                write!(stdout.unwrap(), "{plugged} of {awaited}").unwrap();
                exit.send_replace(Some(0));
                return Ok(());
            }
            ["settings", wanted] => {
                let (wanted, mut setting) = (wanted.to_owned(), self.setting.subscribe());
                tokio::spawn(async move {
                    if setting.wait_for(|is| *is == wanted).await.is_ok() {
                        exit.send_replace(Some(0));
                    }
                });
                return Ok(());
            }
            ["die"] => std::process::exit(1),
            ["network"] => {
                let told = self.network.lock().unwrap().join(" ");
                stdout.unwrap().write_all(told.as_bytes()).unwrap();
                exit.send_replace(Some(0));
                return Ok(());
            }
            _ => {}
        }
        let arguments = arguments.clone();
        let started = std::thread::Builder::new().spawn(move || {
            let code = act(&arguments, stdin, stdout, stderr);
            if let Some(code) = code {
                exit.send_replace(Some(code));
            }
        });
        started
            .map(drop)
            .map_err(|error| Error::Others(error.to_string()))
    }
}

/// Asks for names as fast as it can, whatever is answered.
fn wonder(stream: UnixStream) {
    let mut answers = stream.try_clone().unwrap();
    std::thread::spawn(move || io::copy(&mut answers, &mut io::sink()));
    let mut stream = stream;
    let question = [&[0, 3, 0, 0, 0, 7, 0][..], b"who"].concat();
    while stream.write_all(&question).is_ok() {}
}

/// What a command does; its exit code, if it ends by itself.
pub fn act(
    arguments: &[String],
    stdin: Option<UnixStream>,
    stdout: Option<UnixStream>,
    stderr: Option<UnixStream>,
) -> Option<u32> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["echo", text] => stdout.unwrap().write_all(text.as_bytes()).unwrap(),
        ["flood"] => stdout.unwrap().write_all(&[7; FLOOD]).unwrap(),
        ["complain", text] => stderr.unwrap().write_all(text.as_bytes()).unwrap(),
        ["cat" | "slow-cat"] => {
            let (mut stdin, mut stdout) = (stdin.unwrap(), stdout.unwrap());
            let mut buffer = vec![0; 8192];
            loop {
                match stdin.read(&mut buffer).unwrap() {
                    0 => break,
                    count => stdout.write_all(&buffer[..count]).unwrap(),
                }
            }
        }
        ["exit", code] => return Some(code.parse().unwrap()),
        ["sleep" | "deaf" | "slow-to-go" | "hasty"]
        | ["devices" | "stands-on", ..]
        | ["leaves" | "joins", ..] => {
            // Until a signal ends it; its streams stay open.
            std::mem::forget((stdin, stdout, stderr));
            return None;
        }
        _ => return Some(127),
    }
    Some(0)
}

/// Something is mounted for a path of the guest; this process has the shim's
/// mounts.
fn is_mounted(guest: &str) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let path = guest.strip_prefix("/run/husk").unwrap();
    mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .any(|target| target.ends_with(path))
}

/// A container's devices in a few words: which are listed, which mounted, what
/// they stand for.
fn told_of_devices(request: &CreateContainerRequest, spec: &Value) -> Vec<String> {
    let listed = spec["linux"]["devices"].as_array().into_iter().flatten();
    let listed = listed.map(|device| format!("list:{}", device["path"].as_str().unwrap()));
    let storages = request.storages.iter();
    let mounted = storages.map(|storage| format!("mount:{}", storage.block().serial));
    let numbers = request.devices.iter().filter(|number| !number.io_only);
    let numbers = numbers.map(|number| match number.has_block_serial() {
        true => format!("disk:{}", number.block_serial()),
        false => format!("name:{}", number.character_name()),
    });
    let all = request.all_devices.then(|| "all".to_owned());
    listed.chain(mounted).chain(numbers).chain(all).collect()
}

/// What its disks stand on, as `8:0=disk-1`.
fn told_of_disks(request: &CreateContainerRequest) -> Vec<String> {
    let numbers = request.devices.iter().filter(|number| number.io_only);
    let words = numbers.map(|one| format!("{}:{}={}", one.major, one.minor, one.block_serial()));
    words.collect()
}

pub fn status(code: Code, message: &str) -> Error {
    Error::RpcStatus(ttrpc::get_status(code, message))
}

pub fn missing() -> Error {
    status(Code::NOT_FOUND, "no such process")
}

fn arguments(process: &Value) -> Vec<String> {
    serde_json::from_value(process["args"].clone()).unwrap()
}

#[async_trait]
impl Agent for Guest {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        if request.hostname == "stuck" {
            eprintln!("waiting for a disk");
            std::future::pending::<()>().await;
        }
        let is_curious = request.hostname == "curious";
        self.is_curious.store(is_curious, Ordering::Relaxed);
        let forgets = request.hostname == "forgetful";
        self.forgets.store(forgets, Ordering::Relaxed);
        if request.hostname == "refused" {
            return Err(status(Code::INTERNAL, "the sandbox is refused"));
        }
        // A copy needs what tells it from the others; who has booted does not.
        let is_new = request.entropy.iter().any(|byte| *byte != 0) && request.entropy.len() >= 32;
        if is_new != vmm::RESTORED.load(Ordering::Relaxed) {
            return Err(status(Code::INVALID_ARGUMENT, "the entropy is wrong"));
        }
        // Who has booted has all that it needs.
        if !is_new && request.plugged_mib != 0 {
            return Err(status(Code::INVALID_ARGUMENT, "the memory is wrong"));
        }
        vmm::AWAITED.store(request.plugged_mib, Ordering::Relaxed);
        let ids = [&request.uid_mappings, &request.gid_mappings];
        let roots = ids.map(|maps| maps.first().map(|map| map.host_id));
        let shm = request.storages.iter().find(|storage| storage.has_tmpfs());
        let shm = shm.map(|storage| storage.options.join(","));
        let expected = match request.hostname == "mapped" {
            true => ([Some(100_000); 2], "uid=100000,gid=100000"),
            false => ([None; 2], "uid=0,gid=0"),
        };
        let shm = shm.unwrap_or_default();
        if roots != expected.0 || !shm.ends_with(expected.1) {
            let message = format!("root is {roots:?}, and of /dev/shm {shm}");
            return Err(status(Code::INVALID_ARGUMENT, &message));
        }
        Ok(CreateSandboxResponse::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Result<CreateContainerResponse> {
        let spec: Value = serde_json::from_slice(&request.oci_spec).unwrap();
        assert!(
            spec["root"]["path"]
                .as_str()
                .unwrap()
                .starts_with("/run/husk/")
        );
        let mounts = spec["mounts"].as_array().into_iter().flatten();
        for mount in mounts {
            // What is shown here is mapped.
            assert!(mount["uidMappings"].is_null(), "{mount}");
        }
        if let [command, path] = &arguments(&spec["process"])[..]
            && command == "joins"
            && spec["linux"]["namespaces"][0]["path"] != **path
        {
            let message = format!("not {path}: {}", spec["linux"]["namespaces"]);
            return Err(status(Code::INVALID_ARGUMENT, &message));
        }
        if arguments(&spec["process"])[0] == "uncreatable" {
            return Err(status(Code::INTERNAL, "the container is refused"));
        }
        if arguments(&spec["process"])[0] == "devices" {
            let told = told_of_devices(&request, &spec);
            if told != arguments(&spec["process"])[1..] {
                return Err(status(Code::INVALID_ARGUMENT, &told.join(" ")));
            }
        }
        if let [command, wanted @ ..] = &arguments(&spec["process"])[..]
            && command == "stands-on"
        {
            let told = told_of_disks(&request);
            if !wanted.iter().all(|word| told.contains(word)) {
                return Err(status(Code::INVALID_ARGUMENT, &told.join(" ")));
            }
        }
        if arguments(&spec["process"])[0] == "slow" {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let streams = request.streams.unwrap_or_default();
        if arguments(&spec["process"])[0] == "hasty" {
            let stdout = self.ports.lock().unwrap().remove(&streams.stdout_port);
            stdout.unwrap().write_all(b"x").unwrap();
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        self.add(
            &request.container_id,
            "",
            arguments(&spec["process"]),
            streams,
        );
        Ok(CreateContainerResponse::default())
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.run(&request.container_id, "")
            .map(|()| Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> Result<ExecResponse> {
        let process: Value = serde_json::from_slice(&request.oci_process).unwrap();
        let streams = request.streams.unwrap_or_default();
        let (id, exec) = (&request.container_id, &request.exec_id);
        if arguments(&process)[0] == "slow-cat" {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        self.add(id, exec, arguments(&process), streams);
        if arguments(&process)[0] == "stuck" {
            let key = (id.clone(), exec.clone());
            let mut killed = self.processes.lock().unwrap()[&key].exit.subscribe();
            killed.wait_for(Option::is_some).await.unwrap();
            return Err(status(Code::ABORTED, "given up"));
        }
        self.run(id, exec).map(|()| ExecResponse::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<WaitResponse> {
        let key = (request.container_id, request.exec_id);
        let (mut exit, command) = {
            let processes = self.processes.lock().unwrap();
            let process = processes.get(&key).ok_or_else(missing)?;
            (process.exit.subscribe(), process.arguments[0].clone())
        };
        if command == "enigma" {
            tokio::time::sleep(Duration::from_millis(500)).await;
            return Err(status(Code::INTERNAL, "nobody knows"));
        }
        let code = exit
            .wait_for(Option::is_some)
            .await
            .map_err(|_| missing())?;
        Ok(WaitResponse {
            exit_code: code.unwrap(),
            exited_at_ns: 1_000_000_007,
            oom_killed: command == "oom",
            ..WaitResponse::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> Result<Empty> {
        for ((id, exec), process) in self.processes.lock().unwrap().iter() {
            let this = *id == request.container_id && (request.all || *exec == request.exec_id);
            let deaf = process.arguments[0] == "deaf";
            if this && !deaf && process.exit.borrow().is_none() {
                process.exit.send_replace(Some(128 + request.signal));
            }
        }
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, _: ContainerRequest) -> Result<StatsResponse> {
        Ok(StatsResponse {
            // 5 processes, and something unknown.
            cgroup_v2_metrics: vec![0x0a, 2, 0x08, 5, 0xf8, 0x06, 1],
            ..StatsResponse::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, _: ContainerRequest) -> Result<Empty> {
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, _: ContainerRequest) -> Result<Empty> {
        Ok(Empty::default())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: DeleteContainerRequest,
    ) -> Result<Empty> {
        let key = (request.container_id, String::new());
        let is_slow = {
            let processes = self.processes.lock().unwrap();
            let init = processes.get(&key);
            init.is_some_and(|init| init.arguments[0] == "slow-to-go")
        };
        if is_slow {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let processes = self.processes.lock().unwrap();
        let init = processes.get(&key);
        let leaves = init.and_then(|init| init.arguments.strip_prefix(&["leaves".to_owned()][..]));
        if let Some(paths) = leaves
            && (paths != request.unused_paths || !paths.iter().all(|path| is_mounted(path)))
        {
            // Nobody would see a panic.
            eprintln!("not to be left: {:?}", request.unused_paths);
            std::process::exit(1);
        }
        Ok(Empty::default())
    }

    /// Notes what the file `key` of it is, by whichever way it is reached.
    async fn set_volume(&self, _: &TtrpcContext, request: SetVolumeRequest) -> Result<Empty> {
        let mut entries = request.entries.iter();
        let key = entries.find(|entry| entry.path.ends_with("/key"));
        let setting = key.map(|entry| String::from_utf8(entry.content.clone()).unwrap());
        self.setting.send_replace(setting.unwrap_or_default());
        Ok(Empty::default())
    }

    async fn remove_volume(&self, _: &TtrpcContext, _: RemoveVolumeRequest) -> Result<Empty> {
        Ok(Empty::default())
    }

    async fn rescan_devices(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        Ok(Empty::default())
    }

    async fn remove_device(&self, _: &TtrpcContext, request: RemoveDeviceRequest) -> Result<Empty> {
        if let [.., last] = request.hardware_address() {
            let told = format!("gone:{last:02x}");
            self.network.lock().unwrap().push(told);
        }
        Ok(Empty::default())
    }

    /// Asks by datagram, and then by TCP for what the answer says.
    async fn serve_names(&self, _: &TtrpcContext, request: ServeNamesRequest) -> Result<Empty> {
        assert_eq!(request.address, "127.0.0.11");
        if self.forgets.swap(false, Ordering::Relaxed) {
            return Ok(Empty::default());
        }
        let stream = self.ports.lock().unwrap().remove(&request.host_port);
        let is_curious = self.is_curious.load(Ordering::Relaxed);
        std::thread::spawn(move || {
            let mut stream = stream.unwrap();
            stream.set_nonblocking(false).unwrap();
            if is_curious {
                return wonder(stream);
            }
            let mut message = b"who".to_vec();
            for over_tcp in [0, 1] {
                let length = u16::try_from(message.len()).unwrap();
                let head = [&length.to_be_bytes()[..], &[0, 0, 0, 7], &[over_tcp]].concat();
                stream.write_all(&[&head[..], &message].concat()).unwrap();
                let mut head = [0; 7];
                stream.read_exact(&mut head).unwrap();
                assert_eq!(head[2..6], [0, 0, 0, 7]);
                message.resize(u16::from_be_bytes([head[0], head[1]]).into(), 0);
                stream.read_exact(&mut message).unwrap();
            }
        });
        Ok(Empty::default())
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: UpdateNetworkRequest,
    ) -> Result<Empty> {
        let mut told = self.network.lock().unwrap();
        let mut addresses = request.network.interfaces.iter().flat_map(|i| &i.addresses);
        if addresses.any(|address| address.starts_with(UNWANTED)) {
            return Err(status(Code::INTERNAL, "it is unwanted"));
        }
        for interface in &request.network.interfaces {
            told.push(format!(
                "{}:{}",
                interface.name,
                interface.addresses.join(",")
            ));
        }
        for route in &request.network.routes {
            told.push(format!("to:{}", route.destination));
        }
        Ok(Empty::default())
    }

    async fn delete_process(&self, _: &TtrpcContext, _: ProcessRequest) -> Result<Empty> {
        Ok(Empty::default())
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> Result<Event> {
        let event = self.events.lock().await.recv().await;
        event.ok_or_else(missing)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        self.off.send_replace(true);
        Ok(Empty::default())
    }
}
