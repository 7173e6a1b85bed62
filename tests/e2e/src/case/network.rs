//! Pods on the bridge, IPv4 and IPv6.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context, Result, ensure};

use super::{Bench, Case, case};
use crate::cri::Cri;
use crate::pod::Pod;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("network/interfaces", 40, interfaces),
    case("network/pod-to-pod", 60, pod_to_pod),
    case("network/pod-to-host", 40, pod_to_host),
    case("network/host-to-pod", 40, host_to_pod),
    case("network/bulk", 60, bulk),
];

/// The pod's addresses, one of each family.
fn addresses(cri: &Cri, pod: &Pod) -> Result<[IpAddr; 2]> {
    let network = cri
        .pod_status(&pod.id)?
        .network
        .context("a pod without network")?;
    let mut all = vec![network.ip.parse::<IpAddr>()?];
    for more in &network.additional_ips {
        all.push(more.ip.parse()?);
    }
    let four = all
        .iter()
        .find(|address| address.is_ipv4())
        .context("no IPv4 address")?;
    let six = all
        .iter()
        .find(|address| address.is_ipv6())
        .context("no IPv6 address")?;
    Ok([*four, *six])
}

fn interfaces(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let shown = cri
        .exec_sync(
            &container,
            &["sh", "-c", "ip address; ip route; ip -6 route"],
            10,
        )?
        .ok()?;
    for address in addresses(&cri, &pod)? {
        ensure!(
            shown.contains(&format!(" {address}/")),
            "{address} is not in\n{shown}"
        );
    }
    ensure!(
        shown.contains("eth0") && shown.contains("127.0.0.1/8"),
        "{shown}"
    );
    ensure!(shown.matches("default via").count() == 2, "{shown}");
    ensure!(!shown.contains("tentative"), "{shown}");
    let mtu = cri
        .exec_sync(&container, &["cat", "/sys/class/net/eth0/mtu"], 10)?
        .ok()?;
    let bridge = std::fs::read_to_string("/sys/class/net/cni0/mtu")?;
    ensure!(mtu == bridge.trim(), "{mtu}, the bridge has {bridge}");
    pod.remove(&cri)
}

fn pod_to_pod(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let server = Pod::run(bench, &cri, |_| {})?;
    let client = Pod::run(bench, &cri, |_| {})?;
    let listening = server.start(&cri, &["probe", "echo", "[::]:7000"])?;
    server.await_log(&cri, &listening, "listening")?;
    let container = client.start(&cri, &["sleep", "1000"])?;
    for address in addresses(&cri, &server)? {
        let target = SocketAddr::new(address, 7000).to_string();
        let said = cri
            .exec_sync(&container, &["probe", "fetch", &target, "across"], 20)?
            .ok()?;
        ensure!(said == "across", "{target}: {said}");
        let address = address.to_string();
        cri.exec_sync(&container, &["ping", "-c", "2", "-W", "5", &address], 20)?
            .ok()?;
    }
    client.remove(&cri)?;
    server.remove(&cri)
}

fn pod_to_host(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let listener = TcpListener::bind("[::]:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            let mut text = String::new();
            // A client that breaks off shows on the pod's side.
            let _ = connection.read_to_string(&mut text);
            let _ = connection.write_all(format!("host got {text}").as_bytes());
        }
    });
    let gateways = "ip route; ip -6 route";
    let shown = cri
        .exec_sync(&container, &["sh", "-c", gateways], 10)?
        .ok()?;
    let gateways: Vec<IpAddr> = shown
        .lines()
        .filter_map(|line| {
            line.strip_prefix("default via ")?
                .split(' ')
                .next()?
                .parse()
                .ok()
        })
        .collect();
    ensure!(gateways.len() == 2, "{shown}");
    for gateway in gateways {
        let target = SocketAddr::new(gateway, port).to_string();
        let said = cri
            .exec_sync(&container, &["probe", "fetch", &target, "a word"], 20)?
            .ok()?;
        ensure!(said == "host got a word", "{target}: {said}");
    }
    pod.remove(&cri)
}

fn host_to_pod(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let server = pod.start(&cri, &["probe", "echo", "[::]:7000"])?;
    pod.await_log(&cri, &server, "listening")?;
    for address in addresses(&cri, &pod)? {
        let mut connection =
            TcpStream::connect_timeout(&SocketAddr::new(address, 7000), bench.seconds(5))?;
        connection.set_read_timeout(Some(bench.seconds(5)))?;
        connection.write_all(b"from the host")?;
        connection.shutdown(Shutdown::Write)?;
        let mut reply = String::new();
        connection.read_to_string(&mut reply)?;
        ensure!(reply == "from the host", "{address}: {reply}");
    }
    pod.remove(&cri)
}

/// Segments larger than the MTU, checksums and many packets in flight.
fn bulk(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let server = pod.start(&cri, &["probe", "echo", "[::]:7000"])?;
    pod.await_log(&cri, &server, "listening")?;
    let sent: Vec<u8> = (0..4_u32 << 20)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for address in addresses(&cri, &pod)? {
        let mut connection =
            TcpStream::connect_timeout(&SocketAddr::new(address, 7000), bench.seconds(5))?;
        connection.set_read_timeout(Some(bench.seconds(20)))?;
        let mut writer = connection.try_clone()?;
        let sending = sent.clone();
        let writing = thread::spawn(move || {
            writer
                .write_all(&sending)
                .and_then(|()| writer.shutdown(Shutdown::Write))
        });
        let mut received = Vec::new();
        connection.read_to_end(&mut received)?;
        ensure!(
            writing.join().is_ok_and(|done| done.is_ok()),
            "{address}: sending failed"
        );
        ensure!(
            received == sent,
            "{address}: {} bytes came back, or others",
            received.len()
        );
    }
    pod.remove(&cri)
}
