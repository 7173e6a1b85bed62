//! Where spans go.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

/// The port of OTLP over HTTP.
const PORT: u16 = 4318;

/// The path of traces there, below whatever the endpoint has.
const TRACES: &str = "/v1/traces";

/// A collector's endpoint of OTLP over HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address.
    pub address: SocketAddr,
    /// Where traces are taken there.
    pub path: String,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = text.strip_prefix("http://").ok_or(
            "it must begin with http://: for a collector that is reached with TLS, have one on \
             this node that passes on what it gets",
        )?;
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~%".contains(&byte);
        if !path.bytes().all(is_plain) {
            return Err("no path, or one of letters, digits and -._~% alone".into());
        }
        let path = path.trim_end_matches('/');
        Ok(Self {
            address: address(authority)?,
            path: format!("{path}{TRACES}"),
        })
    }
}

/// Names are not looked up: this program has no part of the system that could.
fn address(text: &str) -> Result<SocketAddr, String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()),
        _ => (text, Some(PORT)),
    };
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let host = match (host, bare) {
        ("localhost", _) => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        (_, Some(bare)) => bare.parse().ok().map(IpAddr::V6),
        (host, None) => host.parse().ok().map(IpAddr::V4),
    };
    match (host, port) {
        (Some(host), Some(port)) if port > 0 => Ok(SocketAddr::new(host, port)),
        _ => Err("its host must be an address or localhost, as in http://127.0.0.1:4318".into()),
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.address, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read() {
        for (text, full) in [
            ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
            ("http://10.0.0.7", "http://10.0.0.7:4318/v1/traces"),
            ("http://localhost:1/", "http://127.0.0.1:1/v1/traces"),
            ("http://[::1]:4318/a/b/", "http://[::1]:4318/a/b/v1/traces"),
            ("http://[fe80::1]", "http://[fe80::1]:4318/v1/traces"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), full);
        }
        for (text, why) in [
            ("https://127.0.0.1:4318", "TLS"),
            ("127.0.0.1:4318", "http://"),
            ("http://collector:4318", "address or localhost"),
            ("http://a@127.0.0.1:4318", "address"),
            ("http://127.0.0.1:0", "address"),
            ("http://127.0.0.1:70000", "address"),
            ("http://::1:4318", "address"),
            ("http://", "address"),
            ("http://127.0.0.1/a b", "path"),
            ("http://127.0.0.1/a\r\nX: y", "path"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
