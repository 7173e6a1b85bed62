//! VLANs on an interface of the same namespace. The frames of that go to the machine
//! before the namespace's stack could look at their tags, so the guest makes the
//! VLAN anew.

use std::collections::{HashMap, HashSet};

use husk_protocol::agent::Interface;
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVlan, LinkAttribute, LinkInfo, LinkMessage,
};

use super::inspect::FoundLink;

/// What makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vlan {
    /// The interface below.
    lower: u32,
    id: u16,
    /// `ETH_P_8021Q` or `ETH_P_8021AD`.
    protocol: u16,
}

impl Vlan {
    /// None: it is no VLAN, or one whose interface is in another namespace.
    fn read(message: &LinkMessage) -> Option<Self> {
        let (mut lower, mut is_vlan, mut id, mut protocol) = (None, false, None, None);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Link(index) => lower = Some(*index),
                LinkAttribute::LinkNetNsId(_) => return None,
                LinkAttribute::LinkInfo(infos) => {
                    is_vlan = infos.contains(&LinkInfo::Kind(InfoKind::Vlan));
                    for info in infos.iter().flat_map(data) {
                        match info {
                            InfoVlan::Id(number) => id = Some(*number),
                            InfoVlan::Protocol(number) => protocol = Some((*number).into()),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        Some(Self {
            lower: lower.filter(|_| is_vlan)?,
            id: id?,
            protocol: protocol?,
        })
    }

    /// Says in `interface` what it is. `names` are those of the interfaces below.
    pub(super) fn describe(self, interface: &mut Interface, names: &HashMap<u32, &str>) {
        let lower = names.get(&self.lower).copied().unwrap_or_default();
        interface.lower = lower.to_owned();
        interface.vlan_id = self.id.into();
        interface.vlan_protocol = self.protocol.into();
    }
}

fn data(info: &LinkInfo) -> &[InfoVlan] {
    match info {
        LinkInfo::Data(InfoData::Vlan(data)) => data,
        _ => &[],
    }
}

/// Takes the VLANs out of `links`; each comes after what it is on. Those on an
/// interface that the machine does not have are left out.
pub(super) fn take(links: &mut Vec<FoundLink>, messages: &[LinkMessage]) -> Vec<(FoundLink, Vlan)> {
    let vlans: HashMap<u32, Vlan> = messages
        .iter()
        .filter_map(|message| Some((message.header.index, Vlan::read(message)?)))
        .collect();
    let mut waiting: Vec<(FoundLink, Vlan)> = Vec::new();
    links.retain(|link| {
        let vlan = vlans.get(&link.id.index);
        waiting.extend(vlan.map(|vlan| (link.clone(), *vlan)));
        vlan.is_none()
    });
    let mut placed: HashSet<u32> = links.iter().map(|link| link.id.index).collect();
    let mut ordered = Vec::new();
    loop {
        let is_next = |(_, vlan): &(FoundLink, Vlan)| placed.contains(&vlan.lower);
        let (next, rest): (Vec<_>, Vec<_>) = waiting.into_iter().partition(is_next);
        if next.is_empty() {
            for (link, _) in rest {
                tracing::debug!(name = link.id.name, "a VLAN of no interface is left out");
            }
            return ordered;
        }
        placed.extend(next.iter().map(|(link, _)| link.id.index));
        ordered.extend(next);
        waiting = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::LinkId;
    use husk_vmm_spec::MacAddress;
    use rtnetlink::packet_route::link::VlanProtocol;

    fn message(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = attributes;
        message
    }

    fn on(index: u32, lower: u32, id: u16) -> LinkMessage {
        let data = vec![
            InfoVlan::Id(id),
            InfoVlan::Protocol(VlanProtocol::Ieee8021Q),
        ];
        let info = vec![
            LinkInfo::Kind(InfoKind::Vlan),
            LinkInfo::Data(InfoData::Vlan(data)),
        ];
        let attributes = vec![LinkAttribute::Link(lower), LinkAttribute::LinkInfo(info)];
        message(index, attributes)
    }

    fn found(index: u32) -> FoundLink {
        FoundLink {
            id: LinkId {
                index,
                name: format!("eth{index}"),
            },
            mac: MacAddress([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
        }
    }

    #[test]
    fn each_comes_after_what_it_is_on() {
        let mut elsewhere = on(6, 2, 11);
        elsewhere.attributes.push(LinkAttribute::LinkNetNsId(0));
        let messages = [
            message(2, vec![]),
            // On one that has come into the namespace after it.
            on(3, 4, 9),
            on(4, 2, 7),
            // On one that is down.
            on(5, 99, 8),
            elsewhere,
            // A pair's other end is no VLAN.
            message(7, vec![LinkAttribute::Link(2)]),
        ];
        let mut links: Vec<_> = (2..=7).map(found).collect();
        let vlans = take(&mut links, &messages);
        let left: Vec<_> = links.iter().map(|link| link.id.index).collect();
        assert_eq!(left, [2, 6, 7]);
        let names = HashMap::from([(2, "eth2"), (4, "eth4")]);
        let told = vlans.into_iter().map(|(link, vlan)| {
            let mut interface = Interface::default();
            vlan.describe(&mut interface, &names);
            let Interface {
                lower,
                vlan_id,
                vlan_protocol,
                ..
            } = interface;
            (link.id.index, lower, vlan_id, vlan_protocol)
        });
        let expected = [
            (4, "eth2".to_owned(), 7, 0x8100),
            (3, "eth4".to_owned(), 9, 0x8100),
        ];
        assert_eq!(told.collect::<Vec<_>>(), expected);
    }
}
