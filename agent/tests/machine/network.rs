//! The pod's network, on veth devices of a fresh network namespace.

use husk_protocol::agent::{
    CreateSandboxRequest, DialRequest, Interface, Neighbour, Network, NextHop, Range,
    RemoveDeviceRequest, Route, Rule, UpdateNetworkRequest,
};
use std::io::{Read, Write};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

use crate::agent::{Agent, context, skip, status, unable, within};

const FIRST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const SECOND: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Two interfaces that have each other's names.
const PREPARE: &str = "ip link add eth1 address 02:00:00:00:00:01 type veth peer name p1; \
    ip link add eth0 address 02:00:00:00:00:02 type veth peer name p2; \
    ip link set p1 up; ip link set p2 up";

fn range(first: u32, last: u32) -> protobuf::MessageField<Range> {
    Some(Range {
        first,
        last,
        ..Default::default()
    })
    .into()
}

fn network() -> Network {
    Network {
        interfaces: vec![
            Interface {
                name: "eth0".to_owned(),
                hardware_address: FIRST.to_vec(),
                mtu: 1400,
                addresses: vec!["10.1.0.5/24".to_owned(), "fd00:1::5/64".to_owned()],
                ..Default::default()
            },
            Interface {
                name: "lo".to_owned(),
                hardware_address: vec![0; 6],
                addresses: vec!["10.2.0.9/32".to_owned()],
                ..Default::default()
            },
            Interface {
                name: "eth1".to_owned(),
                hardware_address: SECOND.to_vec(),
                addresses: vec!["169.254.7.7/32".to_owned()],
                ..Default::default()
            },
        ],
        routes: vec![
            // In the wrong order: the gateway of the first comes with the second.
            Route {
                destination: "192.168.0.0/16".to_owned(),
                gateway: "169.254.1.1".to_owned(),
                device: "eth1".to_owned(),
                metric: 50,
                mtu: 1300,
                ..Default::default()
            },
            Route {
                destination: "169.254.1.1/32".to_owned(),
                device: "eth1".to_owned(),
                scope: 253,
                ..Default::default()
            },
            Route {
                gateway: "10.1.0.1".to_owned(),
                device: "eth0".to_owned(),
                family: 2,
                ..Default::default()
            },
            Route {
                gateway: "fd00:1::1".to_owned(),
                device: "eth0".to_owned(),
                family: 10,
                ..Default::default()
            },
            Route {
                destination: "172.16.0.0/12".to_owned(),
                gateway: "198.51.100.1".to_owned(),
                device: "eth0".to_owned(),
                flags: 4,
                table: 1000,
                ..Default::default()
            },
            Route {
                destination: "10.90.0.0/16".to_owned(),
                next_hops: vec![
                    NextHop {
                        gateway: "10.1.0.3".to_owned(),
                        device: "eth0".to_owned(),
                        ..Default::default()
                    },
                    NextHop {
                        gateway: "169.254.1.1".to_owned(),
                        device: "eth1".to_owned(),
                        hops: 2,
                        ..Default::default()
                    },
                ],
                family: 2,
                ..Default::default()
            },
            // Of a proxy that takes in whatever goes there.
            Route {
                destination: "10.99.0.0/24".to_owned(),
                device: "lo".to_owned(),
                scope: 254,
                kind: 2,
                table: 255,
                ..Default::default()
            },
        ],
        neighbours: vec![Neighbour {
            address: "169.254.1.1".to_owned(),
            device: "eth1".to_owned(),
            hardware_address: vec![0xee; 6],
            state: 0x80,
            ..Default::default()
        }],
        rules: vec![
            Rule {
                family: 2,
                priority: 700,
                table: 1000,
                source: "10.1.0.5/32".to_owned(),
                ..Default::default()
            },
            Rule {
                family: 2,
                priority: 701,
                table: 1000,
                mark: 0,
                mask: 15,
                inverted: true,
                suppress_prefix_length: 1,
                ..Default::default()
            },
            Rule {
                family: 10,
                priority: 702,
                table: 1000,
                ip_protocol: 6,
                destination_ports: range(80, 90),
                uids: range(5, 9),
                ..Default::default()
            },
            // FR_ACT_GOTO, to one that comes after it; FR_ACT_PROHIBIT.
            Rule {
                family: 2,
                priority: 703,
                action: 2,
                target: 704,
                ..Default::default()
            },
            Rule {
                family: 2,
                priority: 704,
                action: 8,
                destination: "10.66.0.0/16".to_owned(),
                ..Default::default()
            },
        ],
        ..Default::default()
    }
}

async fn agent_with_network() -> Option<Agent> {
    if let Some(reason) = unable() {
        skip("network", &reason);
        return None;
    }
    let agent = Agent::start_with(PREPARE).await;
    let request = CreateSandboxRequest {
        hostname: "pod".to_owned(),
        network: Some(network()).into(),
        dns_servers: vec!["10.1.0.1".to_owned()],
        sysctls: [("net.ipv4.conf.eth0.arp_filter".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    };
    agent
        .client
        .create_sandbox(context(), &request)
        .await
        .unwrap();
    Some(agent)
}

/// What iproute2 says in the agent's network namespace.
fn ip(agent: &Agent, arguments: &str) -> String {
    let output = std::process::Command::new("nsenter")
        .args(["--net", "--target", &agent.pid().to_string(), "ip"])
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A server in the agent's network namespace that answers once, after the end
/// of what it is told.
fn server_in(agent: &Agent, address: &str) -> std::thread::JoinHandle<()> {
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", agent.pid())).unwrap();
    let address = address.to_owned();
    let (ready, wait) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let listener = std::net::TcpListener::bind(address).unwrap();
        ready.send(()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        stream.write_all(format!("got {text}").as_bytes()).unwrap();
    });
    wait.recv().unwrap();
    server
}

#[tokio::test]
async fn the_network_is_as_asked_for() {
    let Some(agent) = agent_with_network().await else {
        return;
    };
    for _ in 0..2 {
        let link = ip(&agent, "-o link show eth0");
        assert!(
            link.contains("02:00:00:00:00:01") && link.contains("mtu 1400"),
            "{link}"
        );
        assert!(link.contains("UP"), "{link}");
        let link = ip(&agent, "-o link show eth1");
        assert!(link.contains("02:00:00:00:00:02"), "{link}");
        assert!(ip(&agent, "-o link show lo").contains("UP"));
        let addresses = ip(&agent, "-o address show eth0");
        assert!(
            addresses.contains("inet 10.1.0.5/24 brd 10.1.0.255"),
            "{addresses}"
        );
        assert!(addresses.contains("inet6 fd00:1::5/64"), "{addresses}");
        assert!(!addresses.contains("tentative"), "{addresses}");
        let routes = ip(&agent, "route show table all");
        for route in [
            "default via 10.1.0.1 dev eth0",
            "192.168.0.0/16 via 169.254.1.1 dev eth1 proto static metric 50 mtu 1300",
            "169.254.1.1 dev eth1 proto static scope link",
            "172.16.0.0/12 via 198.51.100.1 dev eth0 table 1000 proto static onlink",
        ] {
            assert!(routes.contains(route), "{route}: {routes}");
        }
        assert!(ip(&agent, "-6 route").contains("default via fd00:1::1 dev eth0"));
        let neighbours = ip(&agent, "neighbour show dev eth1");
        assert!(
            neighbours.contains("169.254.1.1 lladdr ee:ee:ee:ee:ee:ee PERMANENT"),
            "{neighbours}"
        );
        for hop in [
            "via 10.1.0.3 dev eth0 weight 1",
            "via 169.254.1.1 dev eth1 weight 3",
            "local 10.99.0.0/24 dev lo",
        ] {
            assert!(routes.contains(hop), "{hop}: {routes}");
        }
        assert!(ip(&agent, "-o address show lo").contains("10.2.0.9/32"));
        let rules = ip(&agent, "rule");
        for rule in [
            "700:\tfrom 10.1.0.5 lookup 1000",
            "701:\tnot from all fwmark 0/0xf lookup 1000 suppress_prefixlength 0",
            "703:\tfrom all goto 704\n",
            "704:\tfrom all to 10.66.0.0/16 prohibit",
        ] {
            assert!(rules.contains(rule), "{rule}: {rules}");
        }
        let rules = ip(&agent, "-6 rule");
        let rule = "702:\tfrom all uidrange 5-9 ipproto tcp dport 80-90 lookup 1000";
        assert!(rules.contains(rule), "{rule}: {rules}");
        // Once more changes nothing.
        let request = UpdateNetworkRequest {
            network: Some(network()).into(),
            ..Default::default()
        };
        agent
            .client
            .update_network(context(), &request)
            .await
            .unwrap();
    }
    let hosts =
        std::fs::read_to_string(format!("/proc/{}/root/run/husk/sandbox/hosts", agent.pid()));
    assert!(hosts.unwrap().ends_with("10.1.0.5\tpod\n"));
}

#[tokio::test]
async fn an_update_removes_addresses_that_are_gone() {
    let Some(agent) = agent_with_network().await else {
        return;
    };
    let mut changed = network();
    changed.interfaces[0].addresses = vec!["10.1.0.6/24".to_owned()];
    changed.routes.clear();
    let request = UpdateNetworkRequest {
        network: Some(changed).into(),
        ..Default::default()
    };
    agent
        .client
        .update_network(context(), &request)
        .await
        .unwrap();
    let addresses = ip(&agent, "-o address show eth0");
    assert!(
        addresses.contains("10.1.0.6/24") && !addresses.contains("10.1.0.5"),
        "{addresses}"
    );
    assert!(
        !addresses.contains("fd00:1::5") && addresses.contains("fe80::"),
        "{addresses}"
    );
}

fn vlan(vlan_id: u32) -> UpdateNetworkRequest {
    let interface = Interface {
        name: "eth0.7".to_owned(),
        // As the one below has it.
        hardware_address: FIRST.to_vec(),
        mtu: 1390,
        addresses: vec!["10.7.0.2/24".to_owned()],
        lower: "eth0".to_owned(),
        vlan_id,
        vlan_protocol: 0x8100,
        ..Default::default()
    };
    let network = Network {
        interfaces: vec![interface],
        ..Default::default()
    };
    UpdateNetworkRequest {
        network: Some(network).into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_vlan_is_made_on_its_interface() {
    let Some(agent) = agent_with_network().await else {
        return;
    };
    let update = async |request: UpdateNetworkRequest| {
        let updated = agent.client.update_network(context(), &request).await;
        updated.map(drop)
    };
    let error = update(vlan(4095)).await.unwrap_err();
    let said = (
        Code::INVALID_ARGUMENT,
        "vlan_id \"4095\" is invalid".to_owned(),
    );
    assert_eq!(status(error), said);
    let made = std::process::Command::new("nsenter")
        .args(["--net", "--target", &agent.pid().to_string(), "ip"])
        .args("link add link p1 name p1.7 type vlan id 7".split(' '))
        .status();
    if !made.unwrap().success() {
        skip("VLAN", "this kernel has none");
        return;
    }
    // Once more changes nothing.
    for _ in 0..2 {
        update(vlan(7)).await.unwrap();
        let link = ip(&agent, "-o -d link show eth0.7");
        for part in ["eth0.7@eth0", "vlan protocol 802.1Q id 7", "mtu 1390", "UP"] {
            assert!(link.contains(part), "{part}: {link}");
        }
        assert!(ip(&agent, "-o address show eth0.7").contains("10.7.0.2/24"));
    }
    // Another of its name; the interface below is the one it was.
    update(vlan(8)).await.unwrap();
    let link = ip(&agent, "-o -d link show eth0.7");
    assert!(link.contains("vlan protocol 802.1Q id 8"), "{link}");
    let request = UpdateNetworkRequest {
        network: Some(network()).into(),
        ..Default::default()
    };
    update(request).await.unwrap();
    assert!(ip(&agent, "-o address show eth0").contains("10.1.0.5/24"));
    // It goes, and may have gone.
    for name in ["eth0.7", "eth0.7"] {
        remove_vlan(&agent, name).await;
        assert!(!ip(&agent, "-o link show").contains("eth0.7"));
    }
}

async fn remove_vlan(agent: &Agent, name: &str) {
    let mut request = RemoveDeviceRequest::default();
    request.set_vlan(name.to_owned());
    let removed = agent.client.remove_device(context(), &request).await;
    removed.unwrap();
}

#[tokio::test]
async fn only_a_vlan_is_taken_back_by_name() {
    let Some(agent) = agent_with_network().await else {
        return;
    };
    for name in ["eth0", "no-such", ""] {
        remove_vlan(&agent, name).await;
    }
    assert!(ip(&agent, "-o address show eth0").contains("10.1.0.5/24"));
}

#[tokio::test]
async fn a_bad_network_is_a_clear_error() {
    let Some(agent) = agent_with_network().await else {
        return;
    };
    let mut bad = network();
    bad.interfaces[0].addresses = vec!["10.1.0.5/99".to_owned()];
    let mut request = UpdateNetworkRequest {
        network: Some(bad).into(),
        ..Default::default()
    };
    let error = agent
        .client
        .update_network(context(), &request)
        .await
        .unwrap_err();
    let expected = (
        Code::INVALID_ARGUMENT,
        "address \"10.1.0.5/99\" is invalid".to_owned(),
    );
    assert_eq!(status(error), expected);
    let mut unreachable = network();
    unreachable.routes[0].gateway = "203.0.113.1".to_owned();
    request.network = Some(unreachable).into();
    let (_, text) = status(
        agent
            .client
            .update_network(context(), &request)
            .await
            .unwrap_err(),
    );
    assert!(
        text.starts_with("cannot add route 192.168.0.0/16 via \"203.0.113.1\""),
        "{text}"
    );
}

#[tokio::test]
async fn a_late_interface_is_awaited() {
    let Some(agent) = agent_with_network().await else {
        return;
    };
    let request = UpdateNetworkRequest {
        network: Some(Network {
            interfaces: vec![Interface {
                name: "net9".to_owned(),
                hardware_address: vec![2, 0, 0, 0, 0, 9],
                ..Default::default()
            }],
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let client = agent.client.clone();
    let update = tokio::spawn(async move { client.update_network(context(), &request).await });
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert!(!update.is_finished());
    ip(
        &agent,
        "link add late address 02:00:00:00:00:09 type veth peer name p9",
    );
    within("the update", update).await.unwrap().unwrap();
    assert!(ip(&agent, "-o link show net9").contains("02:00:00:00:00:09"));
}

#[tokio::test]
async fn a_port_of_the_pod_is_dialled() {
    let Some(agent) = agent_with_network().await else {
        return;
    };
    for listen in ["127.0.0.1:8080", "[::1]:8080"] {
        let server = server_in(&agent, listen);
        let (host_port, listener) = agent.port();
        let request = DialRequest {
            port: 8080,
            host_port,
            ..Default::default()
        };
        agent.client.dial(context(), &request).await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"word").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut text = String::new();
        within("the answer", stream.read_to_string(&mut text))
            .await
            .unwrap();
        assert_eq!(text, "got word");
        server.join().unwrap();
    }
    let request = DialRequest {
        port: 8080,
        ..Default::default()
    };
    let (_, text) = status(agent.client.dial(context(), &request).await.unwrap_err());
    assert_eq!(
        text,
        "cannot connect to port 8080: Connection refused (os error 111)"
    );
}
