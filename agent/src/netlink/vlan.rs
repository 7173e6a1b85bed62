//! VLANs of the pod's interfaces. Their frames come with the interface below, tags
//! and all, so the machine has no device for them: the guest makes its own.

use std::io;

use husk_protocol::agent::Interface;

use super::message::{self, Mode, Request, RouteSocket};
use super::{IFLA_ADDRESS, IFLA_IFNAME, IFLA_LINKINFO, Link, NetworkError, RTM_NEWLINK};
use super::{index_of, links};
use crate::error::Doing;

// linux/if_link.h, linux/rtnetlink.h
const RTM_DELLINK: u16 = 17;
const IFLA_LINK: u16 = 5;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VLAN_ID: u16 = 1;
const IFLA_VLAN_PROTOCOL: u16 = 5;

/// Largest number of a VLAN that is one (IEEE 802.1Q).
const ID_MAX: u32 = 4094;

/// `ETH_P_8021Q` and `ETH_P_8021AD` of linux/if_ether.h.
const PROTOCOLS: [u32; 2] = [0x8100, 0x88a8];

/// What makes a VLAN the one it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Vlan {
    lower: u32,
    id: u16,
    protocol: u16,
}

/// Whether the interface is one.
pub(super) fn is_vlan(interface: &Interface) -> bool {
    !interface.lower.is_empty()
}

/// Makes it, unless it is there.
pub(super) fn add(socket: &RouteSocket, interface: &Interface) -> Result<(), NetworkError> {
    let name = &interface.name;
    let wanted = Vlan::wanted(interface, index_of(socket, &interface.lower)?)?;
    let links = links(socket).doing("list", "interfaces")?;
    match links.iter().find(|link| link.name == *name) {
        Some(Link { vlan, .. }) if *vlan == Some(wanted.clone()) => return Ok(()),
        // The host has made it anew.
        Some(Link {
            vlan: Some(_),
            index,
            ..
        }) => {
            delete(socket, *index).doing("remove interface", name)?;
        }
        _ => {}
    }
    socket
        .request(wanted.request(interface))
        .doing("make interface", name)?;
    Ok(())
}

/// Removes the VLAN of this name, if there is one.
pub(super) fn remove(socket: &RouteSocket, name: &str) -> Result<(), NetworkError> {
    let links = links(socket).doing("list", "interfaces")?;
    let is_it = |link: &&Link| link.name == name && link.vlan.is_some();
    let Some(link) = links.iter().find(is_it) else {
        return Ok(());
    };
    Ok(delete(socket, link.index).doing("remove interface", name)?)
}

fn delete(socket: &RouteSocket, index: u32) -> io::Result<()> {
    // struct ifinfomsg
    let fixed = [0, index, 0, 0].map(u32::to_ne_bytes).concat();
    socket.request(Request::new(RTM_DELLINK, Mode::Change, &[&fixed]))
}

impl Vlan {
    fn wanted(interface: &Interface, lower: u32) -> Result<Self, NetworkError> {
        let invalid = |field, value: u32| NetworkError::Invalid {
            field,
            value: value.to_string(),
        };
        let (id, protocol) = (interface.vlan_id, interface.vlan_protocol);
        let is_known = PROTOCOLS.contains(&protocol);
        Ok(Self {
            lower,
            id: u16::try_from(id)
                .ok()
                .filter(|_| id <= ID_MAX)
                .ok_or_else(|| invalid("vlan_id", id))?,
            protocol: u16::try_from(protocol)
                .ok()
                .filter(|_| is_known)
                .ok_or_else(|| invalid("vlan_protocol", protocol))?,
        })
    }

    /// From the attributes of a link; none: it is no VLAN.
    pub(super) fn read(attributes: &[u8]) -> Option<Self> {
        let find = message::find_attribute;
        let info = find(attributes, IFLA_LINKINFO)?;
        let kind = find(info, IFLA_INFO_KIND)?;
        let data = find(info, IFLA_INFO_DATA)?;
        if kind.split(|byte| *byte == 0).next() != Some(b"vlan") {
            return None;
        }
        Some(Self {
            lower: u32::from_ne_bytes(*find(attributes, IFLA_LINK)?.first_chunk()?),
            id: u16::from_ne_bytes(*find(data, IFLA_VLAN_ID)?.first_chunk()?),
            protocol: u16::from_be_bytes(*find(data, IFLA_VLAN_PROTOCOL)?.first_chunk()?),
        })
    }

    fn request(&self, interface: &Interface) -> Request {
        // struct ifinfomsg
        let request = Request::new(RTM_NEWLINK, Mode::Create, &[&[0; 16]])
            .name(IFLA_IFNAME, &interface.name)
            .number(IFLA_LINK, self.lower)
            .attribute(IFLA_LINKINFO, &self.info());
        match interface.hardware_address.is_empty() {
            true => request,
            false => request.attribute(IFLA_ADDRESS, &interface.hardware_address),
        }
    }

    fn info(&self) -> Vec<u8> {
        let (mut info, mut data) = (Vec::new(), Vec::new());
        message::push_attribute(&mut data, IFLA_VLAN_ID, &self.id.to_ne_bytes());
        message::push_attribute(&mut data, IFLA_VLAN_PROTOCOL, &self.protocol.to_be_bytes());
        message::push_attribute(&mut info, IFLA_INFO_KIND, b"vlan\0");
        message::push_attribute(&mut info, IFLA_INFO_DATA, &data);
        info
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(vlan_id: u32, vlan_protocol: u32) -> Interface {
        Interface {
            name: "eth0.7".to_owned(),
            lower: "eth0".to_owned(),
            vlan_id,
            vlan_protocol,
            ..Interface::default()
        }
    }

    #[test]
    fn what_is_asked_for_is_what_is_read() {
        let wanted = Vlan::wanted(&interface(7, 0x88a8), 3).unwrap();
        let mut attributes = Vec::new();
        message::push_attribute(&mut attributes, IFLA_IFNAME, b"eth0.7\0");
        message::push_attribute(&mut attributes, IFLA_LINK, &3_u32.to_ne_bytes());
        assert_eq!(Vlan::read(&attributes), None);
        let info = wanted.info();
        // As `ip link add … type vlan proto 802.1ad id 7` sends it.
        assert_eq!(info[..12], [9, 0, 1, 0, b'v', b'l', b'a', b'n', 0, 0, 0, 0]);
        assert_eq!(info[12..16], [20, 0, 2, 0]);
        assert_eq!(
            info[16..],
            [6, 0, 1, 0, 7, 0, 0, 0, 6, 0, 5, 0, 0x88, 0xa8, 0, 0]
        );
        message::push_attribute(&mut attributes, IFLA_LINKINFO, &info);
        assert_eq!(Vlan::read(&attributes), Some(wanted));
    }

    #[test]
    fn what_is_no_vlan_is_refused() {
        for (id, protocol, field) in [
            (4095, 0x8100, "vlan_id"),
            (65_543, 0x8100, "vlan_id"),
            (7, 0x0800, "vlan_protocol"),
            (7, 0x1_8100, "vlan_protocol"),
        ] {
            let error = Vlan::wanted(&interface(id, protocol), 3).unwrap_err();
            assert!(error.to_string().starts_with(field), "{error}");
        }
        Vlan::wanted(&interface(4094, 0x8100), 3).unwrap();
    }
}
