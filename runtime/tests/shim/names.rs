//! Names of Docker's networks: its server listens in the pod's namespace.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Case;
use crate::case::{Bundle, Node, block_on};
use crate::sandbox::{kill, remove};

pub const CASES: &[Case] = &[
    ("names_are_asked_of_the_server_in_the_namespace", asked),
    ("names_are_asked_no_faster_than_that", curious),
    (
        "names_are_served_by_who_has_not_dialled_at_first",
        forgetful,
    ),
];

const ADDRESS: &str = "127.0.0.11:53";

/// Answers with the question and a letter more; tells what it was asked.
fn serve(netns: &str) -> mpsc::Receiver<Vec<u8>> {
    let netns = File::open(netns).unwrap();
    let (tell, told) = mpsc::channel();
    let (ready, is_ready) = mpsc::channel();
    std::thread::spawn(move || {
        nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let (udp, tcp) = (UdpSocket::bind(ADDRESS), TcpListener::bind(ADDRESS));
        let (udp, tcp) = (udp.unwrap(), tcp.unwrap());
        ready.send(()).unwrap();
        let mut buffer = [0; 100];
        let (length, asker) = udp.recv_from(&mut buffer).unwrap();
        let question = buffer[..length].to_vec();
        let answer = [&question[..], b"?"].concat();
        udp.send_to(&answer, asker).unwrap();
        tell.send(question).unwrap();
        let (mut stream, _) = tcp.accept().unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut question = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut question).unwrap();
        stream
            .write_all(&[&length[..], &question].concat())
            .unwrap();
        tell.send(question).unwrap();
    });
    is_ready.recv().unwrap();
    told
}

/// A namespace with a localhost.
pub fn namespace() -> (Child, String) {
    let script = "ip link set lo up && exec sleep 100";
    let holder = Command::new("unshare")
        .args(["--net", "sh", "-c", script])
        .spawn()
        .unwrap();
    let path = format!("/proc/{}/ns/net", holder.id());
    let comm = format!("/proc/{}/comm", holder.id());
    let began = Instant::now();
    while std::fs::read_to_string(&comm).unwrap() != "sleep\n" {
        assert!(began.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(10));
    }
    (holder, path)
}

/// A container in that namespace.
fn web(node: &Node, netns: &str) -> Bundle {
    node.bundle("web", &["sleep"]).with(|spec| {
        spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "network", "path": netns}]);
    })
}

/// It comes between the container's creation and its start, as Docker's does.
fn asked() {
    block_on(async {
        let node = Node::new().await;
        let (mut holder, path) = namespace();
        let bundle = web(&node, &path);
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        let told = serve(&path);
        shim.run("web", "").await.unwrap();
        let next = || told.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(next(), b"who");
        assert_eq!(next(), b"who?");
        kill(&shim, "web").await;
        remove(&node, &shim, "web").await;
        holder.kill().unwrap();
        holder.wait().unwrap();
    });
}

/// The agent says that it has dialled, and has not; it is asked again as soon as there
/// is something else to tell it of the network.
fn forgetful() {
    block_on(async {
        let node = Node::new().await;
        let (mut holder, path) = namespace();
        let bundle = web(&node, &path).with(|spec| spec["hostname"] = "forgetful".into());
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        let told = serve(&path);
        shim.run("web", "").await.unwrap();
        let mut add = Command::new("nsenter");
        add.arg(format!("--net={path}"));
        add.args("ip address add 127.0.0.77/32 dev lo".split(' '));
        assert!(add.status().unwrap().success());
        assert_eq!(told.recv_timeout(Duration::from_secs(10)).unwrap(), b"who");
        kill(&shim, "web").await;
        remove(&node, &shim, "web").await;
        holder.kill().unwrap();
        holder.wait().unwrap();
    });
}

/// The guest asks without end; the server answers at once, and counts.
fn curious() {
    block_on(async {
        let node = Node::new().await;
        let (mut holder, path) = namespace();
        let bundle = web(&node, &path).with(|spec| spec["hostname"] = "curious".into());
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        let netns = File::open(&path).unwrap();
        let (began, count) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let counted = Arc::clone(&count);
        let (ready, is_ready) = mpsc::channel();
        std::thread::spawn(move || {
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let udp = UdpSocket::bind(ADDRESS).unwrap();
            // The shim looks for both.
            let _tcp = TcpListener::bind(ADDRESS).unwrap();
            ready.send(()).unwrap();
            let mut buffer = [0; 100];
            while let Ok((length, asker)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(&buffer[..length], asker);
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        is_ready.recv().unwrap();
        shim.run("web", "").await.unwrap();
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let most = 1000 + 200 * (began.elapsed().as_secs() + 1);
            let asked = count.load(Ordering::Relaxed);
            assert!(asked <= most, "{asked} of {most}");
        }
        assert!(count.load(Ordering::Relaxed) > 0);
        kill(&shim, "web").await;
        remove(&node, &shim, "web").await;
        holder.kill().unwrap();
        holder.wait().unwrap();
    });
}
