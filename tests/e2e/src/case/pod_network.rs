//! What pods do with their network beside talking: ports of the node, packet
//! filters, tunnels, sysctls.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{Bench, Case, Skip, case};
use crate::cri::Cri;
use crate::cri::api::{
    Capability, ContainerConfig, Mount, NamespaceMode, PodSandboxConfig, PortMapping,
};
use crate::node::Runtime;
use crate::pod::Pod;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    // The portmap plugin leaves its empty chains.
    case("network/host-port", 60, host_port).forgiving(&["firewall"], &[]),
    case("network/host-network", 40, host_network),
    case("network/sysctls", 40, sysctls),
    case("network/packet-filter", 60, packet_filter),
    case("network/tunnel", 40, tunnel),
];

/// A port of the node that leads to one of the pod's.
fn host_port(bench: &Bench) -> Result<()> {
    const PORT: u16 = 27_080;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |config| {
        config.port_mappings = vec![PortMapping {
            container_port: 7000,
            host_port: PORT.into(),
            ..Default::default()
        }];
    })?;
    let server = pod.start(&cri, &["probe", "echo", "0.0.0.0:7000"])?;
    pod.await_log(&cri, &server, "listening")?;
    let address = SocketAddr::new(bridge_address(&cri, &server)?, PORT);
    let mut connection = TcpStream::connect_timeout(&address, bench.seconds(5))
        .with_context(|| format!("connect to {address}"))?;
    connection.set_read_timeout(Some(bench.seconds(5)))?;
    connection.write_all(b"by the node's port")?;
    connection.shutdown(Shutdown::Write)?;
    let mut reply = String::new();
    connection.read_to_string(&mut reply)?;
    ensure!(reply == "by the node's port", "{reply:?}");
    pod.remove(&cri)?;
    let after = TcpStream::connect_timeout(&address, bench.seconds(5));
    ensure!(after.is_err(), "{address} answers without the pod");
    Ok(())
}

/// The node's address on the pods' bridge.
fn bridge_address(cri: &Cri, container: &str) -> Result<IpAddr> {
    let routes = cri.exec_sync(container, &["ip", "route"], 10)?.ok()?;
    let gateway = routes.lines().find_map(|line| {
        let rest = line.strip_prefix("default via ")?;
        rest.split(' ').next()?.parse().ok()
    });
    gateway.with_context(|| format!("no gateway in\n{routes}"))
}

/// The node's own network: a machine can't have it, and says what to do.
fn host_network(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let on_node = |config: &mut PodSandboxConfig| {
        config.hostname.clear();
        let linux = config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        let options = context.namespace_options.get_or_insert_default();
        options.network = NamespaceMode::Node.into();
    };
    let done = bench
        .ctr
        .run(&["--net-host"], &bench.id(), &["ip", "-o", "link"])?;
    match (bench.runtime, Pod::run(bench, &cri, on_node)) {
        (Runtime::Husk, pod) => {
            let said = pod.err().map(|error| format!("{error:#}"));
            let said = said.context("a pod has the node's network")?;
            let by_ctr = done.expect_code(1)?;
            let flags = ["--with-ns", "network:/proc/1/ns/net"];
            let by_path = bench.ctr.run(&flags, &bench.id(), &["true"])?;
            let by_path = by_path.expect_code(1)?;
            for said in [said, by_ctr.err(), by_path.err()] {
                ensure!(
                    said.contains("host's network") && said.contains("network of its own"),
                    "{said}"
                );
            }
            Ok(())
        }
        (Runtime::Runc, pod) => {
            ensure!(done.ok()?.out().contains("cni0"));
            pod?.remove(&cri)
        }
    }
}

fn sysctls(bench: &Bench) -> Result<()> {
    const WANTED: [(&str, &str); 4] = [
        ("net.core.somaxconn", "333"),
        ("net.ipv4.ip_unprivileged_port_start", "79"),
        ("net.ipv4.conf.eth0.arp_announce", "2"),
        ("kernel.shm_rmid_forced", "1"),
    ];
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |config| {
        let pairs = WANTED.map(|(key, value)| (key.to_owned(), value.to_owned()));
        config.linux.get_or_insert_default().sysctls = pairs.into();
    })?;
    let mut config = pod.container(&["sleep", "1000"]);
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    // As the kubelet asks for it.
    context.readonly_paths = vec!["/proc/sys".into()];
    let container = pod.start_config(&cri, &config)?;
    for (key, value) in WANTED {
        let file = format!("/proc/sys/{}", key.replace('.', "/"));
        let seen = cri.exec_sync(&container, &["cat", &file], 10)?.ok()?;
        ensure!(seen == value, "{key} is {seen}, not {value}");
    }
    // The container itself may not change them.
    let write = "echo 5 > /proc/sys/net/core/somaxconn";
    let refused = cri.exec_sync(&container, &["sh", "-c", write], 10)?;
    ensure!(refused.code != 0, "{refused:?}");
    pod.remove(&cri)
}

/// Folder of the node's programs in a container, since the image has no tools
/// for packet filters.
const TOOLS: &str = "/node";

/// A container's configuration with the node's programs, and with the right to
/// change its network.
fn with_tools(pod: &Pod, command: &[&str], is_admin: bool) -> ContainerConfig {
    let mut config = pod.container(command);
    config.mounts = vec![Mount {
        container_path: TOOLS.into(),
        host_path: "/usr".into(),
        readonly: true,
        ..Default::default()
    }];
    if is_admin {
        let linux = config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        context.capabilities = Some(Capability {
            add_capabilities: vec!["NET_ADMIN".into(), "NET_RAW".into()],
            ..Default::default()
        });
    }
    config
}

/// Shell functions that run programs of the node's with the node's libraries.
/// What `iptables` is a name of finds out by its first argument.
const NODE: &str = "export XTABLES_LIBDIR=/node/lib/x86_64-linux-gnu/xtables; \
    loaded() { /node/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path /node/lib/x86_64-linux-gnu \
    \"$@\" 2>&1; }; \
    nft() { loaded /node/sbin/nft \"$@\"; }; \
    iptables() { loaded /node/sbin/xtables-nft-multi iptables \"$@\"; }; ";

/// Rules as a service mesh makes them in its pod, by nft and by iptables.
fn packet_filter(bench: &Bench) -> Result<()> {
    for tool in ["nft", "xtables-nft-multi"] {
        if !Path::new("/usr/sbin").join(tool).exists() {
            return Err(Skip(format!("the node has no {tool}")).into());
        }
    }
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let server = pod.start(&cri, &["probe", "echo", "127.0.0.1:7002"])?;
    pod.await_log(&cri, &server, "listening")?;
    let run = |container: &str, script: &str| {
        let script = format!("{NODE}{script}");
        cri.exec_sync(container, &["sh", "-c", &script], 20)
    };
    let admin = pod.start_config(&cri, &with_tools(&pod, &["sleep", "1000"], true))?;
    let rules = "nft 'table ip mesh { \
        chain out { type nat hook output priority -100; tcp dport 7001 redirect to :7002; }; \
        chain in { type filter hook input priority 0; tcp dport 7003 counter reject with tcp reset; }; \
        }' && iptables -t nat -N MESH && iptables -t nat -A OUTPUT -p tcp -j MESH && \
        iptables -t nat -A MESH -m owner --uid-owner 1337 -j RETURN && \
        iptables -t nat -A MESH -p tcp -m tcp --dport 7004 -j REDIRECT --to-ports 7002 && \
        iptables -A OUTPUT -p tcp --dport 7002 -m conntrack --ctstate NEW,ESTABLISHED -j ACCEPT";
    run(&admin, rules)?.ok().context("rules")?;
    // Another container of the pod is behind the same rules.
    let other = pod.start_config(&cri, &with_tools(&pod, &["sleep", "1000"], false))?;
    for port in [7001, 7004] {
        let fetch = fetch_of(&cri, &other, port)?;
        ensure!(fetch.contains("through"), "port {port}: {fetch}");
    }
    let rejected = fetch_of(&cri, &other, 7003)?;
    ensure!(rejected.contains("refused"), "{rejected}");
    let counted = run(&admin, "nft list table ip mesh")?.ok()?;
    let rule = counted.lines().find(|line| line.contains("dport 7003"));
    ensure!(
        rule.is_some_and(|rule| rule.contains("counter packets 1 ")),
        "{counted}"
    );
    let kept = run(&admin, "iptables -t nat -S")?.ok()?;
    ensure!(
        kept.contains("--uid-owner 1337") && kept.contains("--dport 7004"),
        "{kept}"
    );
    let refused = run(&other, "nft list ruleset; nft 'add table ip other'")?;
    ensure!(
        refused.code != 0 && refused.stdout.contains("not permitted"),
        "{refused:?}"
    );
    pod.remove(&cri)
}

/// What a client of that port on the pod's localhost prints.
fn fetch_of(cri: &Cri, container: &str, port: u16) -> Result<String> {
    let address = format!("127.0.0.1:{port}");
    let done = cri.exec_sync(container, &["probe", "fetch", &address, "through"], 20)?;
    Ok(format!("{}{}", done.stdout, done.stderr))
}

/// A tunnel's interface, as a VPN's pod makes it: privileged ones may.
fn tunnel(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
    })?;
    let mut config = pod.container(&["sleep", "1000"]);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let vpn = pod.start_config(&cri, &config)?;
    let script = "mkdir -p /dev/net; [ -c /dev/net/tun ] || mknod /dev/net/tun c 10 200; \
                  tunctl -t tap9 > /dev/null && ip address add 10.9.9.1/24 dev tap9 && \
                  ip link set tap9 up && ip -o address show dev tap9";
    let shown = cri.exec_sync(&vpn, &["sh", "-c", script], 10)?.ok()?;
    ensure!(shown.contains("10.9.9.1/24"), "{shown}");
    let plain = pod.start(&cri, &["sleep", "1000"])?;
    // The pod's network is one; its devices are not.
    let shown = cri.exec_sync(&plain, &["ip", "-o", "address"], 10)?.ok()?;
    ensure!(shown.contains("10.9.9.1/24"), "{shown}");
    let script = "mkdir -p /tmp/net; mknod /tmp/net/tun c 10 200 && tunctl -f /tmp/net/tun -t tap8";
    let refused = cri.exec_sync(&plain, &["sh", "-c", script], 10)?;
    ensure!(refused.code != 0, "{refused:?}");
    pod.remove(&cri)
}
