//! Reads a network namespace.

use std::collections::HashMap;
use std::net::IpAddr;

use futures::TryStreamExt;
use husk_protocol::agent::{Interface, Neighbour, Network, Route, Rule};
use husk_vmm_spec::MacAddress;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteType,
    RouteVia,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use super::NetworkError;

/// Rules that every namespace has: local, main, default.
const DEFAULT_RULES: [u32; 3] = [0, 32766, 32767];

/// `RT_TABLE_LOCAL` of linux/rtnetlink.h, which the kernel keeps by itself.
const TABLE_LOCAL: u32 = 255;

/// An Ethernet interface of the namespace.
pub(super) struct FoundLink {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: MacAddress,
    pub(super) mtu: u32,
}

/// What a namespace holds.
pub(super) struct FoundNetwork {
    pub(super) links: Vec<FoundLink>,
    pub(super) guest: Network,
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
    let links: Vec<FoundLink> = messages.iter().filter_map(link).collect();
    let names: HashMap<u32, &str> = links
        .iter()
        .map(|link| (link.index, link.name.as_str()))
        .collect();

    let addresses: Vec<AddressMessage> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(dump("list addresses"))?;
    let interfaces = links
        .iter()
        .map(|link| Interface {
            name: link.name.clone(),
            hardware_address: link.mac.0.to_vec(),
            mtu: link.mtu,
            addresses: addresses
                .iter()
                .filter(|message| message.header.index == link.index)
                .filter_map(address)
                .collect(),
            ..Default::default()
        })
        .collect();

    let mut routes = Vec::new();
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
    Ok(FoundNetwork { links, guest })
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
        index: message.header.index,
        name,
        mac: MacAddress(mac?),
        mtu,
    })
}

fn is_our_tap(name: &str) -> bool {
    name.strip_prefix("husk")
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
}

/// The address in CIDR notation. Link-local ones follow from the hardware
/// address, and the guest's kernel makes them itself.
fn address(message: &AddressMessage) -> Option<String> {
    if message.header.scope == AddressScope::Link && message.header.family == AddressFamily::Inet6 {
        return None;
    }
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link Address is the peer and Local is ours.
            AddressAttribute::Local(ip) => found = Some(*ip),
            AddressAttribute::Address(ip) if found.is_none() => found = Some(*ip),
            _ => {}
        }
    }
    found.map(|ip| format!("{ip}/{}", message.header.prefix_len))
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
    let local = route.table == TABLE_LOCAL;
    let wants_device = header.kind == RouteType::Unicast;
    if local || (wants_device && route.device.is_empty()) {
        return None;
    }
    Some(route)
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

fn rule(message: &RuleMessage) -> Option<Rule> {
    if message.header.action != RuleAction::ToTable {
        return None;
    }
    let mut rule = Rule {
        family: u8::from(message.header.family).into(),
        table: message.header.table.into(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(ip) => rule.source = format!("{ip}/{}", message.header.src_len),
            RuleAttribute::Destination(ip) => {
                rule.destination = format!("{ip}/{}", message.header.dst_len);
            }
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::FwMark(mark) => rule.mark = *mark,
            RuleAttribute::FwMask(mask) => rule.mask = *mask,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Iifname(name) => rule.input_device = name.clone(),
            RuleAttribute::Oifname(name) => rule.output_device = name.clone(),
            _ => {}
        }
    }
    (!DEFAULT_RULES.contains(&rule.priority)).then_some(rule)
}
