//! An agent that lies: what its guest is is an attacker's. The shim answers
//! containerd in time, stays small, and the pod can be removed.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{StateRequest, StatsRequest, WaitRequest};
use husk_protocol::agent::{Event, StatsResponse, WaitResponse};
use husk_protocol::metrics::{CPUStat, MemoryStat, Metrics, PidsStat};
use protobuf::Message;
use serde_json::{Value, json};
use ttrpc::Code;
use ttrpc::context::with_duration;

use crate::Case;
use crate::case::{Node, Shim, block_on};
use crate::containerd::{refusal, soon};
use crate::lifecycle::{finish, kill};
use crate::names::namespace;

pub const CASES: &[Case] = &[
    ("a_lying_agent_is_silent_or_worse", silent),
    ("a_lying_agent_goes_in_the_middle", half),
    ("a_lying_agent_floods", floods),
    ("a_lying_agent_tells_impossible_numbers", numbers),
    ("a_lying_agent_ends_what_never_ran", early),
    ("a_lying_agent_writes_for_what_is_not_there_yet", hasty),
    ("a_lying_agent_talks_much_in_little_pieces", tiny),
    ("a_lying_agent_dials_no_port", undialled),
    ("a_lying_guest_floods_its_console", console),
];

/// Kernel parameter that has the agent lie, and how.
pub const PARAMETER: &str = "fake.liar=";

/// Most memory of a shim in a debug build, KiB.
const SHIM_KIB: u64 = 96 << 10;

/// Frames of ttrpc: length, stream, type, flags.
const HEADER_BYTES: usize = 10;
const RESPONSE: u8 = 2;

const METHODS: [&str; 5] = ["Stats", "Wait", "NextEvent", "Signal", "Shutdown"];

/// Tells the truth until it is asked for statistics; then it lies as `how` says.
/// A flood is counted in the file that stands behind an `@`.
pub fn serve(mut connection: UnixStream, how: &str) {
    let (how, file) = how.split_once('@').unwrap_or((how, ""));
    connection.set_nonblocking(false).unwrap();
    let mut waits = Vec::new();
    let mut events = Vec::new();
    let mut lies = how == "early";
    loop {
        let mut header = [0; HEADER_BYTES];
        if connection.read_exact(&mut header).is_err() {
            return;
        }
        let [l0, l1, l2, l3, s0, s1, s2, s3, ..] = header;
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let stream = u32::from_be_bytes([s0, s1, s2, s3]);
        let mut request = vec![0; length as usize];
        connection.read_exact(&mut request).unwrap();
        let has = |name: &&&str| request.windows(name.len()).any(|w| w == name.as_bytes());
        let method = *METHODS.iter().find(has).unwrap_or(&"");
        lies |= method == "Stats";
        let mut answer = |stream: u32, payload: &[u8]| {
            let response = response(payload);
            let mut frame = frame(response.len() as u32, stream);
            frame.extend(response);
            let _ = connection.write_all(&frame);
        };
        match (how, method) {
            ("silent", _) if lies => continue,
            ("others", _) if lies => {
                for other in [stream + 1, stream + 1000, 0, u32::MAX] {
                    answer(other, b"");
                }
                continue;
            }
            ("huge", _) if lies => {
                let _ = connection.write_all(&frame(1 << 30, stream));
                continue;
            }
            ("drip", _) if lies => {
                for byte in frame(0, stream) {
                    let _ = connection.write_all(&[byte]);
                    std::thread::sleep(Duration::from_secs(3));
                }
                continue;
            }
            ("garbage", _) if lies => {
                let mut number = 0x2545_f491_4f6c_dd1d_u64;
                let mut garbage = || {
                    number ^= number << 13;
                    number ^= number >> 7;
                    number ^= number << 17;
                    number as u8
                };
                let garbage: Vec<u8> = (0..1 << 20).map(|_| garbage()).collect();
                let _ = connection.write_all(&garbage);
                continue;
            }
            ("half", _) if lies => {
                let mut half = frame(1000, stream);
                half.extend([0; 10]);
                let _ = connection.write_all(&half);
                let _ = connection.shutdown(Shutdown::Both);
                return;
            }
            ("unasked", "Stats") => {
                answer(stream, b"");
                let mut more = connection.try_clone().unwrap();
                let mut response = frame(4096, 999_999);
                response.resize(HEADER_BYTES + 4096, 0);
                // Until nobody listens; whole frames of others come in between.
                std::thread::spawn(move || while more.write_all(&response).is_ok() {});
                continue;
            }
            ("tiny", "Stats") => {
                answer(stream, b"");
                let mut more = connection.try_clone().unwrap();
                let file = file.to_owned();
                std::thread::spawn(move || {
                    let response = frame(0, 999_999);
                    let mut pieces = 0_u64;
                    while more.write_all(&response).is_ok() {
                        pieces += 1;
                        if pieces.is_multiple_of(256) {
                            tally(&file, pieces);
                        }
                    }
                });
                continue;
            }
            ("events", "NextEvent") if lies => events.push(stream),
            ("events", "Stats") => answer(stream, b""),
            ("numbers", "Stats") => answer(stream, &impossible()),
            ("numbers", "Signal") => {
                answer(stream, b"");
                let end = WaitResponse {
                    exit_code: u32::MAX,
                    exited_at_ns: u64::MAX,
                    stdout_bytes: u64::MAX,
                    stderr_bytes: u64::MAX,
                    ..WaitResponse::default()
                };
                let end = end.write_to_bytes().unwrap();
                waits.drain(..).for_each(|wait| answer(wait, &end));
            }
            ("early", "Wait") => answer(stream, &ended(7)),
            (_, "Wait") => waits.push(stream),
            (_, "NextEvent") => events.push(stream),
            (_, "Signal") => {
                answer(stream, b"");
                waits.drain(..).for_each(|wait| answer(wait, &ended(137)));
            }
            _ => answer(stream, b""),
        }
        if how == "events" && lies {
            let mut event = Event::default();
            event.mut_oom().container_id = "x".repeat(3 << 20);
            let event = event.write_to_bytes().unwrap();
            events.drain(..).for_each(|wanted| answer(wanted, &event));
        }
    }
}

/// Notes for the test how much of a flood has been taken.
fn tally(file: &str, count: u64) {
    // Whole at any moment.
    let new = format!("{file}.new");
    let _ = std::fs::write(&new, count.to_string());
    let _ = std::fs::rename(&new, file);
}

/// What was noted last.
fn tallied(file: &Path) -> u64 {
    let text = std::fs::read_to_string(file);
    text.unwrap_or_default().parse().unwrap_or(0)
}

/// Writes to the console for ever, as a device that drops what does not fit.
pub fn flood_console(file: &str) {
    let line = [&[b'x'; 62][..], b"\n"].concat();
    let mut bytes = 0_u64;
    loop {
        // Standard error is the console as well.
        match rustix::io::write(rustix::stdio::stderr(), &line.repeat(64)) {
            Ok(count) => {
                bytes += count as u64;
                tally(file, bytes);
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn ended(code: u32) -> Vec<u8> {
    let end = WaitResponse {
        exit_code: code,
        ..WaitResponse::default()
    };
    end.write_to_bytes().unwrap()
}

fn impossible() -> Vec<u8> {
    let metrics = Metrics {
        pids: Some(PidsStat {
            current: u64::MAX,
            ..PidsStat::default()
        })
        .into(),
        cpu: Some(CPUStat {
            usage_usec: u64::MAX,
            ..CPUStat::default()
        })
        .into(),
        memory: Some(MemoryStat {
            usage: u64::MAX,
            ..MemoryStat::default()
        })
        .into(),
        ..Metrics::default()
    };
    let response = StatsResponse {
        cgroup_v2_metrics: metrics.write_to_bytes().unwrap(),
        ..StatsResponse::default()
    };
    response.write_to_bytes().unwrap()
}

/// `Response` of ttrpc: the payload is its second field.
fn response(payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x12];
    let mut length = payload.len();
    while length >= 0x80 {
        bytes.push(length as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend(payload);
    bytes
}

fn frame(length: u32, stream: u32) -> Vec<u8> {
    let [length, stream] = [length, stream].map(u32::to_be_bytes);
    [&length[..], &stream, &[RESPONSE, 0]].concat()
}

/// A pod whose agent lies once it is asked for statistics, and its answer.
async fn lied_to(how: &str) -> (Node, Shim, Option<Code>) {
    let node = Node::new().await;
    let file = node.path("tally");
    let parameter = format!("{PARAMETER}{how}@{}", file.display());
    node.configure(&format!("kernel_parameters = '{parameter}'\n"));
    let bundle = node.bundle(how, &["sleep"]);
    let shim = node.start(&bundle).await;
    shim.create(&bundle.request()).await.unwrap();
    shim.run(how, "").await.unwrap();
    let began = Instant::now();
    let request = StatsRequest {
        id: how.to_owned(),
        ..StatsRequest::default()
    };
    let answer = shim.task.stats(soon(), &request).await;
    assert!(began.elapsed() < Duration::from_secs(15), "{how}");
    let code = answer.is_err().then(|| refusal(answer).0);
    assert_state_is_told(&shim, how).await;
    (node, shim, code)
}

async fn assert_state_is_told(shim: &Shim, id: &str) {
    let request = StateRequest {
        id: id.to_owned(),
        ..StateRequest::default()
    };
    let quickly = with_duration(Duration::from_secs(3));
    shim.task.state(quickly, &request).await.unwrap();
}

/// Whatever the guest says; the exit code.
async fn remove(node: &Node, shim: &Shim, id: &str) -> u32 {
    let began = Instant::now();
    // It may be told that the guest does not take it.
    let _ = kill(shim, id, "", 9).await;
    assert!(began.elapsed() < Duration::from_secs(15), "{id}");
    let request = WaitRequest {
        id: id.to_owned(),
        ..WaitRequest::default()
    };
    let long = with_duration(Duration::from_secs(40));
    let exit = shim.task.wait(long, &request).await.unwrap().exit_status;
    assert_state_is_told(shim, id).await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", shim.pid)).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|peak| peak.trim().strip_suffix(" kB"));
    let peak: u64 = peak.unwrap().trim().parse().unwrap();
    assert!(peak < SHIM_KIB, "{id}: {peak} KiB");
    finish(node, shim, id).await;
    exit
}

/// All that end in silence, at once: each takes its time.
fn silent() {
    block_on(async {
        let lies = ["silent", "others", "huge", "drip", "garbage"];
        let pods = lies.map(|how| async move {
            let (node, shim, code) = lied_to(how).await;
            assert_eq!(code, Some(Code::DEADLINE_EXCEEDED), "{how}");
            assert_eq!(remove(&node, &shim, how).await, 137, "{how}");
        });
        futures::future::join_all(pods).await;
    });
}

/// The machine ends without its agent.
fn half() {
    block_on(async {
        let (node, shim, code) = lied_to("half").await;
        assert!(code.is_some());
        assert_eq!(remove(&node, &shim, "half").await, 137);
    });
}

fn floods() {
    block_on(async {
        for how in ["events", "unasked"] {
            let (node, shim, code) = lied_to(how).await;
            assert_eq!(code, None, "{how}");
            tokio::time::sleep(Duration::from_secs(2)).await;
            assert_state_is_told(&shim, how).await;
            let topics = node.events.topics();
            let told = topics.iter().filter(|topic| *topic == "/tasks/oom");
            assert_eq!(told.count(), 0, "of no container");
            remove(&node, &shim, how).await;
        }
    });
}

fn numbers() {
    block_on(async {
        let (node, shim, code) = lied_to("numbers").await;
        assert_eq!(code, None);
        // It waits for output that was never written, but not for ever.
        let exit = remove(&node, &shim, "numbers").await;
        assert!(exit <= 255, "{exit}");
    });
}

fn early() {
    block_on(async {
        let node = Node::new().await;
        node.configure(&format!("kernel_parameters = '{PARAMETER}early'\n"));
        let bundle = node.bundle("early", &["sleep"]);
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        assert_eq!(shim.wait("early", "").await.unwrap().exit_status, 7);
        assert!(shim.run("early", "").await.is_err());
        finish(&node, &shim, "early").await;
    });
}

/// What is on the node for the pod stays written down.
fn hasty() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("hasty", &["hasty"]);
        let shim = node.start(&bundle).await;
        let mut request = bundle.request();
        request.stdout = bundle.fifo("out");
        let mut output = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&request.stdout)
            .unwrap();
        let state = || {
            let file = node.state_dir().join("test/hasty/state.json");
            serde_json::from_slice::<Value>(&std::fs::read(file).unwrap()).unwrap()
        };
        let early = async {
            let began = Instant::now();
            while output.read(&mut [0]).is_err() {
                assert!(began.elapsed() < Duration::from_secs(15));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            state()
        };
        let (created, early) = tokio::join!(shim.create(&request), early);
        assert_eq!(early["timeline"]["container_created_ns"], 0);
        let is_known = |name: &str| early[name]["pid"].as_u64() > Some(1);
        assert!(is_known("vmm") && is_known("file_server"), "{early}");
        assert_eq!(early["vmm"]["pid"], created.unwrap().pid);
        let moment = |name: &str| state()["timeline"][name].as_u64().unwrap();
        let first_output = moment("first_output_ns");
        assert!(first_output > moment("request_ns"));
        assert!(first_output < moment("container_created_ns"));
        kill(&shim, "hasty", "", 9).await.unwrap();
        finish(&node, &shim, "hasty").await;
    });
}

/// More than this was never taken of a flood that began so long ago.
async fn assert_paced(node: &Node, began: Instant, burst: u64, per_second: u64) {
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let taken = tallied(&node.path("tally"));
        let most = burst + per_second * (began.elapsed().as_secs() + 1);
        assert!((1..=most).contains(&taken), "{taken} of {most}");
    }
}

fn tiny() {
    block_on(async {
        let began = Instant::now();
        let (node, shim, code) = lied_to("tiny").await;
        assert_eq!(code, None);
        // Each counts for 64 bytes; some hundred are in the socket.
        let (burst, per_second) = ((8 << 20) / 64 + 1000, (256 << 10) / 64);
        assert_paced(&node, began, burst, per_second).await;
        assert_state_is_told(&shim, "tiny").await;
        remove(&node, &shim, "tiny").await;
    });
}

/// It says that it has dialled the host for whoever wants a port of the pod's.
fn undialled() {
    block_on(async {
        let node = Node::new().await;
        node.configure(&format!("kernel_parameters = '{PARAMETER}undialled'\n"));
        let (mut holder, path) = namespace();
        let bundle = node.bundle("undialled", &["sleep"]).with(|spec| {
            spec["linux"]["namespaces"] =
                json!([{"type": "pid"}, {"type": "network", "path": path}]);
        });
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        shim.run("undialled", "").await.unwrap();
        let netns = File::open(&path).unwrap();
        let caller = std::thread::spawn(move || {
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            // More than there are places.
            for _ in 0..300 {
                let mut call = TcpStream::connect("127.0.0.1:80").unwrap();
                let patience = Duration::from_secs(20);
                call.set_read_timeout(Some(patience)).unwrap();
                let answer = call.read(&mut [0]).map_err(|error| error.kind());
                assert_eq!(answer, Ok(0));
            }
        });
        caller.join().unwrap();
        assert_state_is_told(&shim, "undialled").await;
        remove(&node, &shim, "undialled").await;
        holder.kill().unwrap();
        holder.wait().unwrap();
    });
}

fn console() {
    block_on(async {
        let began = Instant::now();
        let (node, shim, _) = lied_to("console").await;
        // And what is in the pipe.
        assert_paced(&node, began, (1 << 20) + (1 << 17), 256 << 10).await;
        assert_state_is_told(&shim, "console").await;
        remove(&node, &shim, "console").await;
    });
}
