//! A pretended VMM: takes the specification, serves the agent's protocol on the
//! agent's port and keeps the other ports for it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use husk_protocol::path::DEBUG_SHELL;
use husk_vmm_spec::{
    BucketSpec, CONTROL_FD, Descriptor, DeviceSpec, ExitReason, Failure, HostPort, Message,
    PACKET_BYTES, PACKET_DESCRIPTORS, Reply, Request, SavedSpec, StartSpec, Timeline, ValidVmSpec,
    VmSpec,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::{agent, faults, liar, stuck};

/// Streams of host ports that were opened and not yet dialled.
pub type Ports = Arc<Mutex<HashMap<u32, UnixStream>>>;

/// Kernel parameter that makes this VMM fail as if the guest had panicked.
const PANIC: &str = "fake.panic";

/// Kernel parameter that makes this VMM take no requests.
const DEAF: &str = "fake.deaf";

/// Kernel parameter that makes this VMM answer twice when it opens ports.
const CHATTY: &str = "fake.chatty";

/// Kernel parameter that makes this VMM save nothing.
const UNSAVED: &str = "fake.unsaved";

/// Kernel parameter that makes this VMM go on from nothing that was saved with it.
const UNCOPIED: &str = "fake.uncopied";

/// How the name of a device ends that this VMM refuses.
const UNWANTED: &str = "66";

/// How often it did.
pub static REFUSED: AtomicU32 = AtomicU32::new(0);

/// What each device may move, as `rates` in the guest tells.
pub static RATES: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn note_rate(device: &DeviceSpec) {
    let rate = match device {
        DeviceSpec::Block(block) => block.rate,
        DeviceSpec::Net(net) => net.rate,
        DeviceSpec::Fs(_) => return,
    };
    let bucket = |bucket: Option<BucketSpec>| match bucket {
        Some(bucket) => format!("{}+{}", bucket.per_second, bucket.burst),
        None => "-".to_owned(),
    };
    let (bytes, operations) = (bucket(rate.bytes), bucket(rate.operations));
    let line = format!("{}:{bytes}:{operations}", device.id());
    RATES.lock().unwrap().push(line);
}

/// How much memory was plugged last, MiB.
pub static PLUGGED: AtomicU32 = AtomicU32::new(0);

/// How much the agent was told to wait for, MiB.
pub static AWAITED: AtomicU32 = AtomicU32::new(0);

/// It goes on from what was saved.
pub static RESTORED: AtomicBool = AtomicBool::new(false);

/// Lives as long as its control socket, like the real one.
pub fn run() {
    raise_limit();
    let (text, descriptors) = receive().expect("no specification");
    let count = descriptors.len();
    let spec: VmSpec = serde_json::from_slice(&text).unwrap();
    let spec = ValidVmSpec::new(spec, count).unwrap().spec().clone();
    let line = match &spec.start {
        StartSpec::Boot(boot) => boot.command_line.clone(),
        StartSpec::Restore(saved) => match restore(saved, &descriptors) {
            Ok(line) => line,
            Err(message) => {
                tell(&Message::Exited(ExitReason::Failed(Failure { message })));
                return;
            }
        },
    };
    let mut words = line.split(' ');
    let fault = words.find_map(|word| word.strip_prefix(faults::PARAMETER));
    if fault == Some("spec") {
        return;
    }
    tell(&Message::Started(Timeline {
        exec_ns: 1,
        spec_ns: 2,
        entered_ns: 3,
    }));
    // Only pods have files.
    let is_pod_of_copy = RESTORED.load(Ordering::Relaxed) && !spec.filesystems.is_empty();
    if fault == Some("started") || (fault == Some("copy") && is_pod_of_copy) {
        return;
    }
    if line.contains(PANIC) {
        eprintln!("Kernel panic - not syncing: pretended");
        tell(&Message::Exited(ExitReason::Panic));
        return;
    }
    for device in &spec.blocks {
        note_rate(&DeviceSpec::Block(device.clone()));
    }
    for device in &spec.nets {
        note_rate(&DeviceSpec::Net(device.clone()));
    }
    let ports = Ports::default();
    let mut descriptors: Vec<_> = descriptors.into_iter().map(Some).collect();
    let disks = spec.blocks.iter().map(|disk| disk.id.clone());
    // Each with the descriptors that it holds.
    let mut devices: HashMap<String, Vec<OwnedFd>> = disks.map(|id| (id, Vec::new())).collect();
    for nic in &spec.nets {
        let tap = descriptors[nic.tap.0 as usize].take().unwrap();
        devices.insert(nic.id.clone(), vec![tap]);
    }
    keep(&ports, spec.vsock.unwrap().host_ports, descriptors);
    let connection = ports.lock().unwrap().remove(&1024).unwrap();
    if fault == Some("hang_up") {
        connection.shutdown(std::net::Shutdown::Both).unwrap();
    }
    let agents = Arc::clone(&ports);
    let has_shells = line.split(' ').any(|word| word == DEBUG_SHELL);
    let mut words = line.split(' ');
    let how = words.find_map(|word| word.strip_prefix(liar::PARAMETER));
    let how = how.map(str::to_owned);
    let mut words = line.split(' ');
    let stuck = words.find_map(|word| word.strip_prefix(stuck::PARAMETER));
    let is_stuck = stuck.is_some();
    if let Some(file) = stuck {
        let file = file.to_owned();
        spawn(move || drop(std::fs::metadata(file)));
    }
    if let Some(file) = how.as_deref().and_then(|how| how.strip_prefix("console@")) {
        let file = file.to_owned();
        spawn(move || liar::flood_console(&file));
    }
    spawn(move || {
        if let Some(how) = how {
            // The machine goes on without it.
            return liar::serve(connection, &how);
        }
        agent::serve(connection, agents, has_shells);
        tell(&Message::Exited(ExitReason::Shutdown));
        std::process::exit(0);
    });
    while line.contains(DEAF) {
        std::thread::park();
    }
    while let Some((text, descriptors)) = receive() {
        match serde_json::from_slice(&text).unwrap() {
            Request::AddHostPorts(host_ports) => {
                let descriptors = descriptors.into_iter().map(Some).collect();
                keep(&ports, host_ports, descriptors);
                if line.contains(CHATTY) {
                    tell(&Message::Reply(Ok(Reply::Done)));
                }
            }
            Request::RemoveHostPorts(removed) => {
                ports
                    .lock()
                    .unwrap()
                    .retain(|port, _| !removed.contains(port));
            }
            Request::Kill => {
                tell(&Message::Exited(ExitReason::Killed));
                return;
            }
            Request::AddDevice(device) => {
                if device.id().ends_with(UNWANTED) {
                    REFUSED.fetch_add(1, Ordering::Relaxed);
                    drop(descriptors);
                    let message = "it is unwanted".to_owned();
                    tell(&Message::Reply(Err(Failure { message })));
                    continue;
                }
                note_rate(&device);
                let before = devices.insert(device.id().to_owned(), descriptors);
                let is_new = before.is_none();
                expect(is_new, "a device is plugged twice", device.id());
            }
            Request::RemoveDevice(id) if is_stuck && id.starts_with("disk-") => {
                let message = "its worker does not end".to_owned();
                tell(&Message::Reply(Err(Failure { message })));
                continue;
            }
            Request::RemoveDevice(id) => {
                let removed = devices.remove(&id).is_some();
                expect(removed, "an unknown device is unplugged", &id);
            }
            Request::PlugMemory(mib) => PLUGGED.store(mib, Ordering::Relaxed),
            Request::Save(_) if line.contains(UNSAVED) => {
                let message = "it is not to be saved".to_owned();
                tell(&Message::Reply(Err(Failure { message })));
                continue;
            }
            Request::Save(saved) => {
                let mut files = descriptors.into_iter().map(File::from);
                let (mut state, memory) = (files.next().unwrap(), files.next().unwrap());
                write!(state, "{}\n{line}", saved.origin).unwrap();
                let mib = memory.metadata().unwrap().len() >> 20;
                let boot_mib = u64::from(spec.memory.boot_mib);
                expect(mib == boot_mib, "saved memory has another size", "");
            }
            _ => {}
        }
        tell(&Message::Reply(Ok(Reply::Done)));
    }
}

/// The command line of what was saved for the same origin.
fn restore(saved: &SavedSpec, descriptors: &[OwnedFd]) -> Result<String, String> {
    let file = |descriptor: Descriptor| descriptors[descriptor.0 as usize].try_clone().unwrap();
    for part in [saved.state, saved.memory] {
        let flags = rustix::fs::fcntl_getfl(file(part)).unwrap();
        if flags & rustix::fs::OFlags::RWMODE != rustix::fs::OFlags::RDONLY {
            return Err("the descriptor can write".into());
        }
    }
    let state = std::io::read_to_string(File::from(file(saved.state))).unwrap();
    let Some((origin, line)) = state.split_once('\n') else {
        return Err("the file holds no saved machine".into());
    };
    if origin != saved.origin {
        return Err("the machine was saved from something else".into());
    }
    if line.contains(UNCOPIED) {
        return Err("the machine does not go on".into());
    }
    RESTORED.store(true, Ordering::Relaxed);
    Ok(line.to_owned())
}

/// As the real one, where that is allowed: what the shim may have open is no limit
/// of its own.
fn raise_limit() {
    let limits = Rlimit {
        current: Some(1024),
        maximum: Some(1024),
    };
    let _ = setrlimit(Resource::Nofile, limits);
}

/// A thread, without which it ends as the real one does.
fn spawn(work: impl FnOnce() + Send + 'static) {
    if let Err(error) = std::thread::Builder::new().spawn(work) {
        let message = format!("thread: {error}");
        tell(&Message::Exited(ExitReason::Failed(Failure { message })));
        std::process::exit(1);
    }
}

/// Nobody would see a panic.
fn expect(is_so: bool, otherwise: &str, device: &str) {
    if !is_so {
        eprintln!("{otherwise}: {device}");
        std::process::exit(1);
    }
}

/// A pretended file server: lives as long as its socket.
pub fn serve_files() {
    // SAFETY: the shim left the socket here.
    let mut socket = unsafe { UnixStream::from_raw_fd(3) };
    let _ = socket.read(&mut [0]);
}

fn keep(ports: &Ports, host_ports: Vec<HostPort>, mut descriptors: Vec<Option<OwnedFd>>) {
    for host_port in host_ports {
        let stream = descriptors[host_port.stream.0 as usize].take().unwrap();
        ports.lock().unwrap().insert(host_port.port, stream.into());
    }
    // The machine's devices hold theirs as long as it lives.
    std::mem::forget(descriptors);
}

fn control() -> BorrowedFd<'static> {
    // SAFETY: the shim left the control socket here for good.
    unsafe { BorrowedFd::borrow_raw(CONTROL_FD) }
}

fn tell(message: &Message) {
    let text = serde_json::to_vec(message).unwrap();
    let _ = send(control(), &text, SendFlags::NOSIGNAL);
}

fn receive() -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let mut buffer = vec![0; PACKET_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        control(),
        &mut [IoSliceMut::new(&mut buffer)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .ok()?;
    let descriptors = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    buffer.truncate(received.bytes);
    (!buffer.is_empty()).then_some((buffer, descriptors))
}
