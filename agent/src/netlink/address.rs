//! IP addresses as rtnetlink carries them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::NetworkError;

/// An address of either family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address {
    V4(Ipv4Addr),
    V6(Ipv6Addr),
}

impl Address {
    /// AF_INET.
    pub const V4_FAMILY: u8 = 2;
    /// AF_INET6.
    const V6_FAMILY: u8 = 10;

    /// Of four or sixteen bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
            return Some(Self::V4(bytes.into()));
        }
        let bytes = <[u8; 16]>::try_from(bytes).ok()?;
        Some(Self::V6(bytes.into()))
    }

    /// In network order.
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::V4(address) => address.octets().to_vec(),
            Self::V6(address) => address.octets().to_vec(),
        }
    }

    /// `AF_*`.
    pub fn family(&self) -> u8 {
        match self {
            Self::V4(_) => Self::V4_FAMILY,
            Self::V6(_) => Self::V6_FAMILY,
        }
    }

    /// `RT_SCOPE_*` that the address itself tells.
    pub fn scope(&self) -> u8 {
        const UNIVERSE: u8 = 0;
        const LINK: u8 = 253;
        const HOST: u8 = 254;
        match self {
            Self::V4(address) if address.is_loopback() => HOST,
            Self::V6(address) if address.is_loopback() => HOST,
            Self::V6(address) if address.is_unicast_link_local() => LINK,
            _ => UNIVERSE,
        }
    }

    /// Whether it comes by itself with an interface.
    pub fn is_made_by_kernel(&self) -> bool {
        match self {
            Self::V4(address) => address.is_loopback(),
            Self::V6(address) => address.is_loopback() || address.is_unicast_link_local(),
        }
    }
}

/// An address and the length of its network's prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix {
    pub address: Address,
    pub length: u8,
}

impl Prefix {
    /// Of CIDR notation; a plain address is a network of its own.
    pub fn parse(field: &'static str, text: &str) -> Result<Self, NetworkError> {
        let invalid = || NetworkError::Invalid {
            field,
            value: text.to_owned(),
        };
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| invalid())?;
        let (address, most) = match address {
            IpAddr::V4(address) => (Address::V4(address), 32),
            IpAddr::V6(address) => (Address::V6(address), 128),
        };
        let length = match length {
            Some(length) => length.parse().map_err(|_| invalid())?,
            None => most,
        };
        match length <= most {
            true => Ok(Self { address, length }),
            false => Err(invalid()),
        }
    }

    /// The same of a field that may be empty.
    pub fn parse_given(field: &'static str, text: &str) -> Result<Option<Self>, NetworkError> {
        match text.is_empty() {
            true => Ok(None),
            false => Self::parse(field, text).map(Some),
        }
    }

    /// The family of what has been `given` one, and else that of the first of these
    /// that is there; IPv4 where nothing says.
    pub fn family_of(given: u32, prefixes: [&Option<Self>; 2]) -> u8 {
        match u8::try_from(given).unwrap_or(0) {
            0 => {
                let first = prefixes.into_iter().flatten().next();
                first.map_or(Address::V4_FAMILY, |prefix| prefix.address.family())
            }
            given => given,
        }
    }

    /// Of an IPv4 network that has one.
    pub fn broadcast(&self) -> Option<Ipv4Addr> {
        match self.address {
            Address::V4(address) if self.length < 31 => {
                let hosts = u32::MAX >> self.length;
                Some((u32::from(address) | hosts).into())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_parsed_and_bounded() {
        let prefix = Prefix::parse("", "10.1.2.3/24").unwrap();
        assert_eq!(
            (prefix.address.bytes(), prefix.length),
            (vec![10, 1, 2, 3], 24)
        );
        assert_eq!(prefix.broadcast(), Some(Ipv4Addr::new(10, 1, 2, 255)));
        assert_eq!(Prefix::parse("", "10.1.2.3").unwrap().length, 32);
        assert_eq!(
            Prefix::parse("", "fd00::1/64").unwrap().address.family(),
            10
        );
        assert_eq!(Prefix::parse("", "10.0.0.0/31").unwrap().broadcast(), None);
        assert_eq!(
            Prefix::parse("", "1.1.1.1/0").unwrap().broadcast(),
            Some(Ipv4Addr::BROADCAST)
        );
        for text in [
            "",
            "10.0.0.1/33",
            "::/129",
            "10.0.0.1/-1",
            "eth0",
            "10.0.0.1/",
        ] {
            assert!(Prefix::parse("", text).is_err(), "{text}");
        }
    }
}
