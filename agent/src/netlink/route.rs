//! Routes.

use husk_protocol::agent::{NextHop, Route};

use super::address::Prefix;
use super::message::{Mode, Request, RouteSocket, push_attribute};
use super::{NetworkError, index_of, unless_exists};
use crate::error::Doing;

// linux/rtnetlink.h
const RTM_NEWROUTE: u16 = 24;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTAX_MTU: u16 = 2;
const RT_TABLE_UNSPEC: u32 = 0;
const RT_TABLE_COMPAT: u32 = 252;
const RT_TABLE_MAIN: u32 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;

/// Adds one, unless it is there.
pub fn add(socket: &RouteSocket, route: &Route) -> Result<(), NetworkError> {
    let table = match route.table {
        RT_TABLE_UNSPEC => RT_TABLE_MAIN,
        table => table,
    };
    let destination = Prefix::parse_given("route destination", &route.destination)?;
    let gateway = Prefix::parse_given("route gateway", &route.gateway)?;
    let source = Prefix::parse_given("route source", &route.source)?;
    let family = Prefix::family_of(route.family, [&destination, &gateway]);
    let length = destination.as_ref().map_or(0, |prefix| prefix.length);
    let kind = match u8::try_from(route.kind).unwrap_or(0) {
        0 => RTN_UNICAST,
        kind => kind,
    };
    let scope = u8::try_from(route.scope).unwrap_or(0);
    let short_table = u8::try_from(table).unwrap_or(RT_TABLE_COMPAT as u8);
    // struct rtmsg
    let fixed = [
        family,
        length,
        0,
        0,
        short_table,
        RTPROT_STATIC,
        scope,
        kind,
    ];
    let flags = route.flags & RTNH_F_ONLINK;
    let mut request = Request::new(RTM_NEWROUTE, Mode::Replace, &[&fixed, &flags.to_ne_bytes()])
        .number(RTA_TABLE, table);
    if let Some(prefix) = &destination {
        request = request.attribute(RTA_DST, &prefix.address.bytes());
    }
    if let Some(gateway) = &gateway {
        let (kind, value) = gateway_attribute(family, gateway);
        request = request.attribute(kind, &value);
    }
    if !route.next_hops.is_empty() {
        let mut hops = Vec::new();
        for hop in &route.next_hops {
            hops.extend(next_hop(socket, family, hop)?);
        }
        request = request.attribute(RTA_MULTIPATH, &hops);
    }
    if let Some(source) = &source {
        request = request.attribute(RTA_PREFSRC, &source.address.bytes());
    }
    if !route.device.is_empty() {
        request = request.number(RTA_OIF, index_of(socket, &route.device)?);
    }
    if route.metric != 0 {
        request = request.number(RTA_PRIORITY, route.metric);
    }
    if route.mtu != 0 {
        request = request.nested_number(RTA_METRICS, RTAX_MTU, route.mtu);
    }
    let name = format!(
        "{} via {:?} on {:?}",
        if route.destination.is_empty() {
            "default"
        } else {
            &route.destination
        },
        route.gateway,
        route.device
    );
    Ok(unless_exists(socket.request(request)).doing("add route", name)?)
}

fn gateway_attribute(family: u8, gateway: &Prefix) -> (u16, Vec<u8>) {
    let bytes = gateway.address.bytes();
    if gateway.address.family() == family {
        return (RTA_GATEWAY, bytes);
    }
    // struct rtvia: IPv4 through an IPv6 neighbour.
    let mut via = u16::from(gateway.address.family()).to_ne_bytes().to_vec();
    via.extend(bytes);
    (RTA_VIA, via)
}

/// `struct rtnexthop` with its attributes.
fn next_hop(socket: &RouteSocket, family: u8, hop: &NextHop) -> Result<Vec<u8>, NetworkError> {
    let mut attributes = Vec::new();
    if !hop.gateway.is_empty() {
        let gateway = Prefix::parse("route gateway", &hop.gateway)?;
        let (kind, value) = gateway_attribute(family, &gateway);
        push_attribute(&mut attributes, kind, &value);
    }
    let length = u16::try_from(attributes.len() + 8).unwrap_or(u16::MAX);
    let flags = u8::try_from(hop.flags & RTNH_F_ONLINK).unwrap_or(0);
    let hops = u8::try_from(hop.hops).unwrap_or(u8::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend([flags, hops]);
    bytes.extend(index_of(socket, &hop.device)?.to_ne_bytes());
    bytes.extend(attributes);
    Ok(bytes)
}
