//! Network namespaces as CNI plugins and Docker build them: every kind of
//! interface, routes, rules, neighbours.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{Bench, Case, case};
use crate::netns::{Netns, node_ip};
use crate::pod::Pod;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("network/kinds-of-interfaces", 60, kinds_of_interfaces),
    case("network/vlans-inside", 60, vlans_inside),
    case("network/routes", 40, routes),
    case("network/rules-and-neighbours", 40, rules_and_neighbours),
    case("network/joined-namespace", 60, joined_namespace),
    case("network/shared-namespace", 60, shared_namespace),
    case("network/by-hook", 60, by_hook),
    case("network/late-interface", 90, late_interface),
];

/// Joins the namespace and the node by a pair of interfaces, `eth0` in there,
/// with addresses of both families that end in 1 (the node's) and 2.
fn wire(netns: &mut Netns, mtu: u32) -> Result<()> {
    let pid = netns.pid();
    node_ip(&format!(
        "link add hke0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {pid}"
    ))?;
    netns.owns("hke0");
    for (end, run) in [
        ("1", &node_ip as &dyn Fn(&str) -> Result<String>),
        ("2", &|arguments: &str| netns.ip(arguments)),
    ] {
        let link = if end == "1" { "hke0" } else { "eth0" };
        run(&format!("address add 10.201.0.{end}/24 dev {link}"))?;
        run(&format!("address add fd00:201::{end}/64 dev {link} nodad"))?;
        run(&format!("link set {link} up"))?;
    }
    Ok(())
}

/// What a shell in a container in that namespace prints.
fn shown(bench: &Bench, netns: &Netns, script: &str) -> Result<String> {
    let flag = netns.flag();
    let flags = ["--with-ns", flag.as_str()];
    let done = bench.ctr.run(&flags, &bench.id(), &["sh", "-c", script])?;
    Ok(done.ok()?.out())
}

fn contains_all(text: &str, wanted: &[&str]) -> Result<()> {
    for line in wanted {
        ensure!(text.contains(line), "{line:?} is not in\n{text}");
    }
    Ok(())
}

/// Each kind reaches a like one on the node.
fn kinds_of_interfaces(bench: &Bench) -> Result<()> {
    // Its module makes an interface that nobody asked for, unless told not to.
    let mut module = std::process::Command::new("modprobe");
    crate::process::run(module.args(["dummy", "numdummies=0"]), bench.seconds(10))?.ok()?;
    let mut netns = Netns::make()?;
    wire(&mut netns, 1400)?;
    let pid = netns.pid();
    let node = |lines: &[String]| -> Result<()> {
        lines.iter().try_for_each(|line| node_ip(line).map(drop))
    };
    for (number, kind) in [(202, "macvlan mode bridge"), (203, "ipvlan mode l2")] {
        let (parent, near) = (format!("hkp{number}"), format!("hkn{number}"));
        node(&[
            format!("link add {parent} type dummy"),
            format!("link set {parent} up"),
            format!("link add link {parent} name {near} type {kind}"),
            format!("link add link {parent} name eth{number} netns {pid} type {kind}"),
            format!("address add 10.{number}.0.1/24 dev {near}"),
            format!("link set {near} up"),
        ])?;
        netns.owns(&parent);
    }
    node(&[
        "link add hkv0 type veth peer name hkv1".into(),
        "link set hkv0 up".into(),
        "link set hkv1 up".into(),
        "link add link hkv0 name hkv0.7 type vlan id 7".into(),
        format!("link add link hkv1 name eth204 netns {pid} type vlan id 7"),
        "address add 10.204.0.1/24 dev hkv0.7".into(),
        "link set hkv0.7 up".into(),
    ])?;
    netns.owns("hkv0");
    netns.ip("tuntap add eth205 mode tap")?;
    for number in 202..=205 {
        netns.ip(&format!("address add 10.{number}.0.2/24 dev eth{number}"))?;
        netns.ip(&format!("link set eth{number} up"))?;
    }
    let script = "ip -o address; cat /sys/class/net/eth0/mtu; \
                  ping -c 1 -W 5 -s 1372 10.201.0.1 > /dev/null || echo no veth; \
                  ping -c 1 -W 5 fd00:201::1 > /dev/null || echo no veth by IPv6; \
                  ping -c 1 -W 5 10.202.0.1 > /dev/null || echo no macvlan; \
                  ping -c 1 -W 5 10.203.0.1 > /dev/null || echo no ipvlan; \
                  ping -c 1 -W 5 10.204.0.1 > /dev/null || echo no vlan";
    let seen = shown(bench, &netns, script)?;
    for (name, address) in [
        ("eth0", "10.201.0.2/24"),
        ("eth0", "fd00:201::2/64"),
        ("eth202", "10.202.0.2/24"),
        ("eth203", "10.203.0.2/24"),
        ("eth204", "10.204.0.2/24"),
        ("eth205", "10.205.0.2/24"),
    ] {
        let is_there = seen.lines().any(|line| {
            let mut words = line.split_whitespace().skip(1);
            let named = words
                .next()
                .is_some_and(|word| word.trim_end_matches(':') == name);
            named && line.contains(&format!(" {address}"))
        });
        ensure!(is_there, "{name} has not {address}:\n{seen}");
    }
    ensure!(
        seen.lines().any(|line| line == "1400"),
        "no MTU of 1400:\n{seen}"
    );
    ensure!(!seen.contains("no "), "{seen}");
    Ok(())
}

/// VLANs on the pod's own interface, as a CNI plugin makes them in the pod's
/// namespace, and one on one.
fn vlans_inside(bench: &Bench) -> Result<()> {
    let mut netns = Netns::make()?;
    wire(&mut netns, 1500)?;
    for (link, lower, kind, net) in [
        ("7", "", "vlan id 7", 207),
        ("9", "", "vlan proto 802.1ad id 9", 208),
        ("10", ".9", "vlan id 10", 210),
    ] {
        let add = |of: &str, end: u8| {
            [
                format!("link add link {of}{lower} name {of}.{link} type {kind}"),
                format!("address add 10.{net}.0.{end}/24 dev {of}.{link}"),
                format!("link set {of}.{link} up"),
            ]
        };
        for line in add("hke0", 1) {
            node_ip(&line)?;
        }
        for line in add("eth0", 2) {
            netns.ip(&line)?;
        }
    }
    netns.ip("route add 10.217.0.0/16 via 10.207.0.1 dev eth0.7")?;
    let script = "ip -o address; ip route; \
                  for net in 201 207 208 210; do \
                  ping -c 1 -W 5 -s 1400 10.$net.0.1 > /dev/null && echo reached $net; done";
    let seen = shown(bench, &netns, script)?;
    contains_all(
        &seen,
        &[
            "10.207.0.2/24",
            "10.208.0.2/24",
            "10.210.0.2/24",
            "10.217.0.0/16 via 10.207.0.1 dev eth0.7",
            "reached 201",
            "reached 207",
            "reached 208",
            "reached 210",
        ],
    )
}

/// Routes of every type and scope; addresses that come with one.
fn routes(bench: &Bench) -> Result<()> {
    let mut netns = Netns::make()?;
    wire(&mut netns, 1500)?;
    for line in [
        "route add default via 10.201.0.1 dev eth0 metric 50",
        "route add 10.50.0.0/16 via 10.201.0.9 src 10.201.0.2 mtu 1300",
        "route add 10.60.0.0/16 dev eth0 scope link",
        "route add blackhole 10.70.0.0/16",
        "route add unreachable 10.71.0.0/16",
        "route add prohibit 10.72.0.0/16",
        "route add 10.80.0.0/16 via 10.201.0.3 table 100",
        "route add 10.90.0.0/16 nexthop via 10.201.0.3 weight 1 nexthop via 10.201.0.4 weight 3",
        "route add 172.31.0.0/16 via 169.254.1.1 dev eth0 onlink",
        "route add local 10.99.0.0/24 dev lo",
        "-6 route add default via fd00:201::1 dev eth0",
        "-6 route add fd00:50::/32 via fd00:201::9",
        "-6 route add unreachable fd00:71::/32",
        "address add 10.200.9.9/32 dev lo",
        "address add 10.206.0.2 peer 10.206.0.1/32 dev eth0",
    ] {
        netns.ip(line)?;
    }
    let script = "ip route; echo table 100; ip route list table 100; ip -6 route; ip address; \
                  for address in 10.99.0.5 10.200.9.9 10.206.0.2; do \
                  ping -c 1 -W 5 $address > /dev/null || echo no $address; done; \
                  for address in 10.70.0.1 10.71.0.1 10.72.0.1; do \
                  ping -c 1 -W 5 $address 2>&1 | grep -q 'sendto' || echo goes to $address; done";
    let seen = shown(bench, &netns, script)?;
    contains_all(
        &seen,
        &[
            "default via 10.201.0.1 dev eth0",
            "10.50.0.0/16 via 10.201.0.9 dev eth0",
            "src 10.201.0.2",
            "10.60.0.0/16 dev eth0 scope link",
            "unreachable 10.71.0.0/16",
            "10.80.0.0/16 via 10.201.0.3 dev eth0",
            "10.90.0.0/16",
            "172.31.0.0/16 via 169.254.1.1 dev eth0",
            "10.206.0.1 dev eth0",
            "10.200.9.9",
            "default via fd00:201::1 dev eth0",
            "fd00:50::/32 via fd00:201::9 dev eth0",
        ],
    )?;
    ensure!(
        !seen.contains("no 10.") && !seen.contains("goes to"),
        "{seen}"
    );
    let line = seen.lines().find(|line| line.starts_with("default via 10"));
    ensure!(
        line.is_some_and(|line| line.contains("metric 50")),
        "{seen}"
    );
    Ok(())
}

fn rules_and_neighbours(bench: &Bench) -> Result<()> {
    let mut netns = Netns::make()?;
    wire(&mut netns, 1500)?;
    for line in [
        "route add default via 10.201.0.3 table 100",
        "rule add from 10.201.0.2/32 table 100 priority 500",
        "rule add to 10.44.0.0/16 iif eth0 table 100 priority 501",
        "rule add fwmark 0x7/0xff table 100 priority 502",
        "rule add not fwmark 0x0/0xf table 100 priority 503",
        "rule add ipproto tcp dport 80-90 table 100 priority 504",
        "-6 rule add from fd00:201::/64 table 100 priority 505",
        "rule add to 10.45.0.0/16 prohibit priority 506",
        // Past the one behind it.
        "rule add to 10.201.0.1/32 goto 32766 priority 507",
        "rule add to 10.201.0.1/32 unreachable priority 508",
        "neighbour add 10.201.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
        "-6 neighbour add fd00:201::77 lladdr 02:00:00:00:00:78 dev eth0 nud permanent",
    ] {
        netns.ip(line)?;
    }
    let seen = shown(bench, &netns, "ip rule; ip -6 rule; ip neigh; ip -6 neigh")?;
    let line = |start: &str| -> Result<&str> {
        let found = seen.lines().find(|line| line.starts_with(start));
        found.with_context(|| format!("no line {start:?} in\n{seen}"))
    };
    contains_all(line("500:")?, &["from 10.201.0.2", "lookup 100"])?;
    contains_all(
        line("501:")?,
        &["to 10.44.0.0/16", "iif eth0", "lookup 100"],
    )?;
    contains_all(line("502:")?, &["fwmark 0x7", "lookup 100"])?;
    // What the tool can't show it has at least not left out.
    line("503:")?;
    line("504:")?;
    contains_all(line("505:")?, &["from fd00:201::/64", "lookup 100"])?;
    contains_all(line("10.201.0.77")?, &["02:00:00:00:00:77"])?;
    contains_all(line("fd00:201::77")?, &["02:00:00:00:00:78"])?;
    // A rule that is turned round, or of some traffic, must not become one of all:
    // nothing answers at the gateway of table 100.
    let script = "ping -c 1 -W 5 10.201.0.1 > /dev/null && echo direct; \
                  probe fetch 10.45.0.1:7 nobody 2>&1; true";
    let seen = shown(bench, &netns, script)?;
    contains_all(&seen, &["direct", "Permission denied"])
}

/// A namespace that a container has: another may join it, and both have one
/// localhost (`docker run --network container:…`).
fn joined_namespace(bench: &Bench) -> Result<()> {
    let (id, ctr) = (bench.id(), &bench.ctr);
    ctr.run_detached(&[], &id, &["probe", "echo", "127.0.0.1:7000"])?;
    let pid = ctr.pid(&id)?;
    // Nothing tells that it listens: its output goes nowhere.
    let script = "for i in 1 2 3 4 5 6 7 8 9; do probe fetch 127.0.0.1:7000 across && exit; \
                  sleep 1; done; ip address; exit 1";
    let flag = format!("network:/proc/{pid}/ns/net");
    let flags = ["--with-ns", flag.as_str()];
    let done = ctr.run(&flags, &bench.id(), &["sh", "-c", script])?.ok()?;
    ensure!(done.out() == "across\n", "{}", done.tail());
    ctr.remove(&id)
}

/// The same by the namespace itself, as Docker names it, and with addresses; the
/// second outlives the first.
fn shared_namespace(bench: &Bench) -> Result<()> {
    let mut netns = Netns::make()?;
    wire(&mut netns, 1500)?;
    let ctr = &bench.ctr;
    let flag = netns.flag();
    let flags = ["--with-ns", flag.as_str()];
    let (first, second) = (bench.id(), bench.id());
    ctr.run_detached(&flags, &first, &["probe", "echo", "10.201.0.2:7000"])?;
    ctr.run_detached(&flags, &second, &["sleep", "1000"])?;
    let fetch = "for i in 1 2 3 4 5 6 7 8 9; do probe fetch 10.201.0.2:7000 across && exit; \
                 sleep 1; done; ip address; exit 1";
    let done = ctr.exec(&[], &second, "e1", &["sh", "-c", fetch])?.ok()?;
    ensure!(done.out() == "across\n", "{}", done.tail());
    ctr.remove(&first)?;
    let ping = ["ping", "-c", "1", "-W", "5", "10.201.0.1"];
    ctr.exec(&[], &second, "e2", &ping)?.ok()?;
    ctr.remove(&second)
}

/// A network that a hook of the spec makes for the pid that it is told, as nerdctl
/// has it.
fn by_hook(bench: &Bench) -> Result<()> {
    const HOOK: &str = "set -e; pid=$(grep -o '\"pid\": *[0-9]*' | grep -o '[0-9]*$'); \
         ip link add hkh0 type veth peer name eth0 netns $pid; \
         ip address add 10.211.0.1/24 dev hkh0; ip link set hkh0 up; \
         nsenter --net=/proc/$pid/ns/net sh -ec 'ip link set lo up; \
         ip address add 10.211.0.2/24 dev eth0; ip link set eth0 up; \
         ip route add default via 10.211.0.1'";
    let script = "ip -o address show dev eth0; ip route; \
                  ping -c 1 -W 5 10.211.0.1 > /dev/null && echo reached";
    let done = crate::oci::run(bench, &["sh", "-c", script], |spec| {
        spec["hooks"]["createRuntime"] = json!([{
            "path": "/bin/sh", "args": ["sh", "-c", HOOK],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        }]);
    });
    // It goes with the namespace, but not at once.
    let _ = node_ip("link delete hkh0");
    contains_all(
        &done?.ok()?.out(),
        &[
            "10.211.0.2/24",
            "default via 10.211.0.1 dev eth0",
            "reached",
        ],
    )
}

/// Network namespaces with names, as CNI makes them.
fn named_namespaces() -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir("/run/netns").into_iter().flatten() {
        names.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// One that is put into the pod's namespace when the pod is there already, as
/// Docker and CNI's meta-plugins do: the next container finds it. While that runs
/// it goes, and comes again.
fn late_interface(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let before = named_namespaces()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let after = named_namespaces()?;
    let netns = after.difference(&before).next();
    let netns = netns.with_context(|| format!("no new namespace among {after:?}"))?;
    for line in [
        format!("link add hke9 mtu 1450 type veth peer name late0 mtu 1450 netns {netns}"),
        "address add 10.209.0.1/24 dev hke9".into(),
        "link set hke9 up".into(),
        format!("-n {netns} address add 10.209.0.2/24 dev late0"),
        format!("-n {netns} link set late0 up"),
        format!("-n {netns} route add 10.219.0.0/16 via 10.209.0.1"),
    ] {
        node_ip(&line)?;
    }
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let script = "ip -o address show dev late0; ip route; cat /sys/class/net/late0/mtu; \
                  ping -c 1 -W 5 10.209.0.1 > /dev/null && echo reached";
    let seen = cri.exec_sync(&container, &["sh", "-c", script], 20)?.ok()?;
    contains_all(
        &seen,
        &[
            "10.209.0.2/24",
            "10.219.0.0/16 via 10.209.0.1 dev late0",
            "1450",
            "reached",
            "default via",
        ],
    )?;
    // A VLAN of it, which comes and goes by itself.
    for line in [
        "link add link hke9 name hke9.5 type vlan id 5".into(),
        "address add 10.229.0.1/24 dev hke9.5".into(),
        "link set hke9.5 up".into(),
        format!("-n {netns} link add link late0 name late0.5 type vlan id 5"),
        format!("-n {netns} address add 10.229.0.2/24 dev late0.5"),
        format!("-n {netns} link set late0.5 up"),
    ] {
        node_ip(&line)?;
    }
    let script = "for i in 1 2 3 4 5 6 7 8 9 10; do \
                  ping -c 1 -W 1 10.229.0.1 > /dev/null && exit 0; sleep 1; done; \
                  ip address; exit 1";
    cri.exec_sync(&container, &["sh", "-c", script], 40)?.ok()?;
    node_ip(&format!("-n {netns} link delete late0.5"))?;
    let script = "for i in 1 2 3 4 5 6 7 8 9 10; do [ -e /sys/class/net/late0.5 ] || exit 0; \
                  sleep 1; done; ip address; exit 1";
    cri.exec_sync(&container, &["sh", "-c", script], 30)?.ok()?;
    node_ip("link delete hke9")?;
    let script = "for i in 1 2 3 4 5 6 7 8 9 10; do [ -e /sys/class/net/late0 ] || exit 0; \
                  sleep 1; done; ip address; exit 1";
    cri.exec_sync(&container, &["sh", "-c", script], 30)?.ok()?;
    for line in [
        format!("link add hke9 type veth peer name late0 netns {netns}"),
        "address add 10.209.0.1/24 dev hke9".into(),
        "link set hke9 up".into(),
        format!("-n {netns} address add 10.209.0.3/24 dev late0"),
        format!("-n {netns} link set late0 up"),
    ] {
        node_ip(&line)?;
    }
    let script = "for i in 1 2 3 4 5 6 7 8 9 10; do \
                  ping -c 1 -W 1 -I 10.209.0.3 10.209.0.1 > /dev/null && exit 0; sleep 1; done; \
                  ip address; ip route; exit 1";
    cri.exec_sync(&container, &["sh", "-c", script], 40)?.ok()?;
    // It goes with the pod's namespace.
    pod.remove(&cri)
}
