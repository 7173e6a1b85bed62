//! Policy rules.

use husk_protocol::agent::{Range, Rule};

use super::address::Prefix;
use super::message::{Mode, Request, RouteSocket};
use super::{NetworkError, unless_exists};
use crate::error::Doing;

// linux/rtnetlink.h, linux/fib_rules.h
const RTM_NEWRULE: u16 = 32;
const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_IIFNAME: u16 = 3;
const FRA_GOTO: u16 = 4;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_OIFNAME: u16 = 17;
const FRA_UID_RANGE: u16 = 20;
const FRA_IP_PROTO: u16 = 22;
const FRA_SPORT_RANGE: u16 = 23;
const FRA_DPORT_RANGE: u16 = 24;
const FIB_RULE_INVERT: u32 = 2;
const FR_ACT_TO_TBL: u8 = 1;
const RT_TABLE_COMPAT: u32 = 252;

/// Adds one, unless it is there.
pub fn add(socket: &RouteSocket, rule: &Rule) -> Result<(), NetworkError> {
    let source = Prefix::parse_given("rule source", &rule.source)?;
    let destination = Prefix::parse_given("rule destination", &rule.destination)?;
    let family = Prefix::family_of(rule.family, [&source, &destination]);
    let length = |prefix: &Option<Prefix>| prefix.as_ref().map_or(0, |prefix| prefix.length);
    let short_table = u8::try_from(rule.table).unwrap_or(RT_TABLE_COMPAT as u8);
    let flags = if rule.inverted { FIB_RULE_INVERT } else { 0 };
    let action = match u8::try_from(rule.action) {
        Ok(0) => FR_ACT_TO_TBL,
        Ok(action) => action,
        Err(_) => {
            return Err(NetworkError::Invalid {
                field: "rule action",
                value: rule.action.to_string(),
            });
        }
    };
    // struct fib_rule_hdr
    let fixed = [
        family,
        length(&destination),
        length(&source),
        u8::try_from(rule.tos).unwrap_or(0),
        short_table,
        0,
        0,
        action,
    ];
    let mut request = Request::new(RTM_NEWRULE, Mode::Create, &[&fixed, &flags.to_ne_bytes()])
        .number(FRA_TABLE, rule.table)
        .number(FRA_PRIORITY, rule.priority);
    if let Some(prefix) = &source {
        request = request.attribute(FRA_SRC, &prefix.address.bytes());
    }
    if let Some(prefix) = &destination {
        request = request.attribute(FRA_DST, &prefix.address.bytes());
    }
    if !rule.input_device.is_empty() {
        request = request.name(FRA_IIFNAME, &rule.input_device);
    }
    if !rule.output_device.is_empty() {
        request = request.name(FRA_OIFNAME, &rule.output_device);
    }
    if rule.mark != 0 || rule.mask != 0 {
        request = request
            .number(FRA_FWMARK, rule.mark)
            .number(FRA_FWMASK, rule.mask);
    }
    if rule.target != 0 {
        request = request.number(FRA_GOTO, rule.target);
    }
    let protocol = u8::try_from(rule.ip_protocol).unwrap_or(0);
    if protocol != 0 {
        request = request.attribute(FRA_IP_PROTO, &[protocol]);
    }
    for (kind, ports) in [
        (FRA_SPORT_RANGE, &rule.source_ports),
        (FRA_DPORT_RANGE, &rule.destination_ports),
    ] {
        if let Some(Range { first, last, .. }) = ports.as_ref() {
            let ends = [*first, *last].map(|port| u16::try_from(port).unwrap_or(u16::MAX));
            request = request.attribute(kind, &ends.map(u16::to_ne_bytes).concat());
        }
    }
    if let Some(Range { first, last, .. }) = rule.uids.as_ref() {
        let ends = [*first, *last].map(u32::to_ne_bytes).concat();
        request = request.attribute(FRA_UID_RANGE, &ends);
    }
    if let Some(length) = rule.suppress_prefix_length.checked_sub(1) {
        request = request.number(FRA_SUPPRESS_PREFIXLEN, length);
    }
    Ok(unless_exists(socket.request(request)).doing("add rule", rule.priority)?)
}
