//! Reads a network namespace.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use futures::TryStreamExt;
use husk_protocol::agent::{Interface, Neighbour, Network, NextHop, Range, Route, Rule};
use husk_vmm_spec::MacAddress;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHop,
    RouteProtocol, RouteScope, RouteType, RouteVia,
};
use rtnetlink::packet_route::rule::{
    RuleAction, RuleAttribute, RuleFlags, RuleMessage, RulePortRange,
};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use super::{LinkId, NetworkError, vlan};

/// Rules that every namespace has: local, main, default.
const DEFAULT_RULES: [u32; 3] = [0, 32766, 32767];

/// `FRA_SUPPRESS_IFGROUP` of linux/fib_rules.h when there is no such group.
const NOT_SUPPRESSED: u32 = u32::MAX;

/// An Ethernet interface of the namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundLink {
    /// Which it is.
    pub id: LinkId,
    /// Its hardware address.
    pub mac: MacAddress,
    /// Largest payload of a frame, bytes.
    pub mtu: u32,
}

/// What a namespace holds.
#[derive(Debug)]
pub struct FoundNetwork {
    /// Its Ethernet interfaces that are up, but for our taps, and for VLANs of them.
    pub links: Vec<FoundLink>,
    /// Every interface, of whatever kind, up or not.
    pub all: BTreeSet<LinkId>,
    /// Those of them that had a tap and whose frames do not go there any more.
    pub parted: BTreeSet<LinkId>,
    /// The whole state the guest is to take on, known interfaces included.
    pub guest: Network,
}

/// Reads the namespace that `handle` is bound to.
///
/// # Errors
/// Which dump the kernel refused.
pub(super) async fn read(handle: &Handle) -> Result<FoundNetwork, NetworkError> {
    let messages: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(dump("list interfaces"))?;
    let mut links: Vec<FoundLink> = messages.iter().filter_map(link).collect();
    let vlans = vlan::take(&mut links, &messages);
    let all = messages.iter().filter_map(link_id).collect();
    let loopback = messages.iter().find_map(loopback);
    let guests = || links.iter().chain(vlans.iter().map(|(link, _)| link));
    let names: HashMap<u32, &str> = guests()
        .chain(&loopback)
        .map(|link| (link.id.index, link.id.name.as_str()))
        .collect();

    let addresses: Vec<AddressMessage> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(dump("list addresses"))?;
    let mut interfaces: Vec<Interface> = guests()
        .chain(&loopback)
        .map(|link| Interface {
            name: link.id.name.clone(),
            hardware_address: link.mac.0.to_vec(),
            mtu: link.mtu,
            addresses: addresses
                .iter()
                .filter(|message| message.header.index == link.id.index)
                .filter_map(address)
                .collect(),
            ..Default::default()
        })
        .collect();
    for (interface, (_, vlan)) in interfaces.iter_mut().skip(links.len()).zip(&vlans) {
        vlan.describe(interface, &names);
    }
    // The guest has a loopback as well; here it has more addresses, or nothing.
    let is_loopback = |interface: &Interface| Some(&interface.name) == loopback_name(&loopback);
    interfaces.retain(|interface| !is_loopback(interface) || !interface.addresses.is_empty());

    let mut routes: Vec<Route> = addresses
        .iter()
        .filter_map(|message| peer_route(message, &names))
        .collect();
    let mut rules = Vec::new();
    for (version, family) in [
        (IpVersion::V4, AddressFamily::Inet),
        (IpVersion::V6, AddressFamily::Inet6),
    ] {
        let mut query = RouteMessageBuilder::<IpAddr>::new().build();
        query.header.address_family = family;
        let found: Vec<RouteMessage> = handle
            .route()
            .get(query)
            .execute()
            .try_collect()
            .await
            .map_err(dump("list routes"))?;
        routes.extend(found.iter().filter_map(|message| route(message, &names)));

        let found: Vec<RuleMessage> = handle
            .rule()
            .get(version)
            .execute()
            .try_collect()
            .await
            .map_err(dump("list rules"))?;
        rules.extend(found.iter().filter_map(rule));
    }

    let found: Vec<NeighbourMessage> = handle
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(dump("list neighbours"))?;
    let neighbours = found
        .iter()
        .filter_map(|message| neighbour(message, &names))
        .collect();

    let guest = Network {
        interfaces,
        routes,
        neighbours,
        rules,
        ..Default::default()
    };
    Ok(FoundNetwork {
        links,
        all,
        parted: BTreeSet::new(),
        guest,
    })
}

fn dump(what: &'static str) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::Netlink { what, source }
}

/// Ethernet interfaces that are up. A tunnel without a peer (`sit0`), the
/// loopback and our own taps are none of the guest's.
fn link(message: &LinkMessage) -> Option<FoundLink> {
    if message.header.link_layer_type != LinkLayerType::Ether
        || !message.header.flags.contains(LinkFlags::Up)
    {
        return None;
    }
    let mut name = None;
    let mut mac = None;
    let mut mtu = 1500;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            _ => {}
        }
    }
    let name = name?;
    if is_our_tap(&name) {
        return None;
    }
    Some(FoundLink {
        id: LinkId {
            index: message.header.index,
            name,
        },
        mac: MacAddress(mac?),
        mtu,
    })
}

fn link_id(message: &LinkMessage) -> Option<LinkId> {
    let mut attributes = message.attributes.iter();
    let name = attributes.find_map(|attribute| match attribute {
        LinkAttribute::IfName(text) => Some(text.clone()),
        _ => None,
    });
    Some(LinkId {
        index: message.header.index,
        name: name?,
    })
}

/// The loopback, which is the guest's own.
fn loopback(message: &LinkMessage) -> Option<FoundLink> {
    if message.header.link_layer_type != LinkLayerType::Loopback {
        return None;
    }
    Some(FoundLink {
        id: link_id(message)?,
        mac: MacAddress([0; 6]),
        // As it is.
        mtu: 0,
    })
}

fn loopback_name(loopback: &Option<FoundLink>) -> Option<&String> {
    loopback.as_ref().map(|link| &link.id.name)
}

/// A tap of ours.
pub(super) fn is_tap(message: &LinkMessage) -> bool {
    link_id(message).is_some_and(|link| is_our_tap(&link.name))
}

fn is_our_tap(name: &str) -> bool {
    name.strip_prefix("husk")
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
}

/// Ours and, on a point-to-point link, the peer's.
fn address_and_peer(message: &AddressMessage) -> Option<(IpAddr, Option<IpAddr>)> {
    let mut local = None;
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            _ => {}
        }
    }
    match (local, address) {
        (Some(local), Some(address)) if local != address => Some((local, Some(address))),
        (local, address) => Some((local.or(address)?, None)),
    }
}

/// The address in CIDR notation. Link-local ones follow from the hardware
/// address, and the guest's kernel makes them and the loopback's own itself.
fn address(message: &AddressMessage) -> Option<String> {
    if message.header.scope == AddressScope::Link && message.header.family == AddressFamily::Inet6 {
        return None;
    }
    let (ip, peer) = address_and_peer(message)?;
    let length = match peer {
        None => message.header.prefix_len,
        // The prefix is the peer's.
        Some(_) => whole_length(ip),
    };
    (!ip.is_loopback()).then(|| format!("{ip}/{length}"))
}

fn whole_length(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// The kernel's route to the other end of a point-to-point link.
fn peer_route(message: &AddressMessage, names: &HashMap<u32, &str>) -> Option<Route> {
    let (ip, peer) = address_and_peer(message)?;
    Some(Route {
        destination: format!("{}/{}", peer?, message.header.prefix_len),
        device: (*names.get(&message.header.index)?).to_owned(),
        source: ip.to_string(),
        scope: u8::from(RouteScope::Link).into(),
        family: u8::from(message.header.family).into(),
        kind: u8::from(RouteType::Unicast).into(),
        ..Default::default()
    })
}

/// Routes that somebody added. Those the kernel derives from addresses and
/// router advertisements it derives in the guest as well.
fn route(message: &RouteMessage, names: &HashMap<u32, &str>) -> Option<Route> {
    let header = &message.header;
    if matches!(
        header.protocol,
        RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect
    ) || header.flags.contains(RouteFlags::Cloned)
    {
        return None;
    }
    let mut route = Route {
        scope: u8::from(header.scope).into(),
        family: u8::from(header.address_family).into(),
        flags: header.flags.bits() & RouteFlags::Onlink.bits(),
        kind: u8::from(header.kind).into(),
        table: header.table.into(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination =
                    format!("{}/{}", ip(address)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => route.gateway = ip(address)?.to_string(),
            RouteAttribute::Via(RouteVia::Inet6(address)) => route.gateway = address.to_string(),
            RouteAttribute::PrefSource(address) => route.source = ip(address)?.to_string(),
            RouteAttribute::Oif(index) => route.device = (*names.get(index)?).to_owned(),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::MultiPath(hops) => {
                let hops = hops.iter().map(|hop| next_hop(hop, names));
                route.next_hops = hops.collect::<Option<_>>()?;
            }
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu = *mtu;
                    }
                }
            }
            _ => {}
        }
    }
    let wants_device = header.kind == RouteType::Unicast && route.next_hops.is_empty();
    (!wants_device || !route.device.is_empty()).then_some(route)
}

fn next_hop(hop: &RouteNextHop, names: &HashMap<u32, &str>) -> Option<NextHop> {
    let mut found = NextHop {
        device: (*names.get(&hop.interface_index)?).to_owned(),
        flags: u32::from(hop.flags.bits()) & RouteFlags::Onlink.bits(),
        hops: hop.hops.into(),
        ..Default::default()
    };
    for attribute in &hop.attributes {
        match attribute {
            RouteAttribute::Gateway(address) => found.gateway = ip(address)?.to_string(),
            RouteAttribute::Via(RouteVia::Inet6(address)) => found.gateway = address.to_string(),
            _ => {}
        }
    }
    Some(found)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// Entries that somebody added; learnt ones the guest learns itself.
fn neighbour(message: &NeighbourMessage, names: &HashMap<u32, &str>) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour = Neighbour {
        device: (*names.get(&message.header.ifindex)?).to_owned(),
        state: u16::from(message.header.state).into(),
        flags: message.header.flags.bits().into(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                neighbour.address = ip.to_string();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                neighbour.address = ip.to_string();
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                neighbour.hardware_address = bytes.clone();
            }
            _ => {}
        }
    }
    (!neighbour.address.is_empty() && !neighbour.hardware_address.is_empty()).then_some(neighbour)
}

/// A rule that somebody added. One that says what can't be said here would be for
/// other traffic than it was meant for: better none.
fn rule(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    let mut rule = Rule {
        family: u8::from(header.family).into(),
        table: header.table.into(),
        inverted: header.flags.contains(RuleFlags::Invert),
        tos: header.tos.into(),
        ..Default::default()
    };
    let mut unknown = None;
    match header.action {
        RuleAction::ToTable => {}
        RuleAction::Goto
        | RuleAction::Nop
        | RuleAction::Blackhole
        | RuleAction::Unreachable
        | RuleAction::Prohibit => rule.action = u8::from(header.action).into(),
        other => unknown = Some(format!("{other:?}")),
    }
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(ip) => rule.source = format!("{ip}/{}", header.src_len),
            RuleAttribute::Destination(ip) => {
                rule.destination = format!("{ip}/{}", header.dst_len);
            }
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Goto(priority) => rule.target = *priority,
            RuleAttribute::FwMark(mark) => rule.mark = *mark,
            RuleAttribute::FwMask(mask) => rule.mask = *mask,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Iifname(name) => rule.input_device = name.clone(),
            RuleAttribute::Oifname(name) => rule.output_device = name.clone(),
            RuleAttribute::IpProtocol(protocol) => {
                rule.ip_protocol = u8::from(*protocol).into();
            }
            RuleAttribute::SourcePortRange(ports) => rule.source_ports = range(ports).into(),
            RuleAttribute::DestinationPortRange(ports) => {
                rule.destination_ports = range(ports).into();
            }
            RuleAttribute::UidRange(uids) => {
                rule.uids = Some(Range {
                    first: uids.start,
                    last: uids.end,
                    ..Default::default()
                })
                .into();
            }
            RuleAttribute::SuppressPrefixLen(length) => {
                // None is the largest number.
                rule.suppress_prefix_length = length.wrapping_add(1);
            }
            // Who made it; and no group.
            RuleAttribute::Protocol(_) | RuleAttribute::SuppressIfGroup(NOT_SUPPRESSED) => {}
            other => unknown = Some(format!("{other:?}")),
        }
    }
    if let Some(unknown) = unknown {
        tracing::warn!(
            priority = rule.priority,
            unknown,
            "a routing rule is left out"
        );
        return None;
    }
    (!DEFAULT_RULES.contains(&rule.priority)).then_some(rule)
}

fn range(ports: &RulePortRange) -> Option<Range> {
    Some(Range {
        first: ports.start.into(),
        last: ports.end.into(),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};

    const PREPARE: &str = "ip link set lo up
        ip address add 10.2.0.9/32 dev lo
        ip link add eth0 type veth peer name p0
        ip address flush dev p0
        ip address add 10.1.0.2/24 dev eth0
        ip address add 10.3.0.2 peer 10.3.0.1/32 dev eth0
        ip link set eth0 up
        ip route add 10.90.0.0/16 nexthop via 10.1.0.3 weight 1 nexthop via 10.1.0.4 weight 3
        ip route add local 10.99.0.0/24 dev lo
        ip route add blackhole 10.70.0.0/16
        ip -6 route add unreachable fd00:71::/32
        ip rule add not fwmark 0x0/0xf table 100 priority 500
        ip rule add ipproto tcp dport 80-90 table 100 priority 501 suppress_prefixlength 0
        ip rule add uidrange 5-9 table 100 priority 502
        ip rule add goto 32766 priority 503
        ip rule add tos 0x10 unreachable priority 504
        ip rule add table 100 priority 505 suppress_ifgroup 5";

    /// What a namespace of this thread's own holds after those commands.
    fn inspected() -> Option<Network> {
        let work = || {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                return None;
            }
            for line in PREPARE.lines() {
                let mut command = std::process::Command::new("ip");
                let done = command.args(line.split_whitespace().skip(1)).status();
                if !done.is_ok_and(|status| status.success()) {
                    println!("failed: {line}");
                    return None;
                }
            }
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .build()
                .unwrap();
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().unwrap();
                tokio::spawn(connection);
                Some(read(&handle).await.unwrap().guest)
            })
        };
        std::thread::spawn(work).join().unwrap()
    }

    #[test]
    fn finds_what_somebody_added() {
        let Some(network) = inspected() else {
            println!("SKIPPED: no network namespace can be made");
            return;
        };
        let names: Vec<_> = network.interfaces.iter().map(|i| i.name.as_str()).collect();
        assert_eq!(names, ["eth0", "lo"]);
        assert_eq!(
            network.interfaces[0].addresses,
            ["10.1.0.2/24", "10.3.0.2/32"]
        );
        assert_eq!(network.interfaces[1].addresses, ["10.2.0.9/32"]);

        let route = |destination: &str| {
            let mut routes = network.routes.iter();
            routes.find(|route| route.destination == destination)
        };
        let peer = route("10.3.0.1/32").unwrap();
        assert_eq!(
            (peer.device.as_str(), peer.source.as_str()),
            ("eth0", "10.3.0.2")
        );
        let hops = &route("10.90.0.0/16").unwrap().next_hops;
        let hops: Vec<_> = hops.iter().map(|h| (h.gateway.as_str(), h.hops)).collect();
        assert_eq!(hops, [("10.1.0.3", 0), ("10.1.0.4", 2)]);
        let local = route("10.99.0.0/24").unwrap();
        assert_eq!(
            (local.table, local.kind, local.device.as_str()),
            (255, 2, "lo")
        );
        assert_eq!(route("10.70.0.0/16").unwrap().kind, 6);
        assert_eq!(route("fd00:71::/32").unwrap().kind, 7);
        // The kernel's own are not among them.
        assert_eq!(network.routes.len(), 5, "{:?}", network.routes);

        let rules: Vec<_> = network.rules.iter().map(|rule| rule.priority).collect();
        let expected = [500, 501, 502, 503, 504];
        assert_eq!(rules, expected, "what can't be said is left out");
        let [turned, ports, uids, leads, refuses] = &network.rules[..] else {
            unreachable!()
        };
        assert!(turned.inverted && turned.mask == 15);
        assert_eq!((ports.ip_protocol, ports.suppress_prefix_length), (6, 1));
        let ends = |range: &Range| (range.first, range.last);
        assert_eq!(ports.destination_ports.as_ref().map(ends), Some((80, 90)));
        assert_eq!(uids.uids.as_ref().map(ends), Some((5, 9)));
        assert_eq!((turned.action, turned.target), (0, 0));
        // FR_ACT_GOTO and FR_ACT_UNREACHABLE.
        assert_eq!((leads.action, leads.target, leads.table), (2, 32766, 0));
        assert_eq!((refuses.action, refuses.tos), (7, 16));
    }
}
