//! Devices of a virtual machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Descriptor;

/// Longest virtio-blk serial, bytes (virtio 1.2, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
pub const SERIAL_BYTES: usize = 20;

/// Longest virtio-fs tag, bytes (virtio 1.2, 5.11.4).
pub const TAG_BYTES: usize = 36;

/// Most tokens in a bucket, and most that come in a second: 16 TiB.
pub const TOKENS_MAX: u64 = 1 << 44;

/// Names a device for as long as it exists; chosen by the shim.
pub type DeviceId = String;

/// A device that can be added to a running machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DeviceSpec {
    /// A disk.
    Block(BlockSpec),
    /// A network interface.
    Net(NetSpec),
    /// A shared file system.
    Fs(FsSpec),
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockSpec {
    /// Its name.
    pub id: DeviceId,
    /// Raw file or block device, opened as `read_only` says.
    pub file: Descriptor,
    /// The guest may not write.
    pub read_only: bool,
    /// What the guest reads as the disk's serial, at most [`SERIAL_BYTES`].
    pub serial: String,
    /// What may be read from and written to it, both together.
    #[serde(default)]
    pub rate: RateSpec,
}

/// How much a device may move; by default as much as it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateSpec {
    /// Bytes.
    pub bytes: Option<BucketSpec>,
    /// Requests of a disk, frames of an interface.
    pub operations: Option<BucketSpec>,
}

/// A bucket of tokens: what moves takes as many as it is large, and waits while
/// there are none. Both from 1 to [`TOKENS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketSpec {
    /// Tokens that come in a second.
    pub per_second: u64,
    /// Tokens that it holds, with which it begins.
    pub burst: u64,
}

/// A network interface on a tap.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Its name.
    pub id: DeviceId,
    /// A tap attached to its interface (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`),
    /// with a 12-byte vnet header, non-blocking.
    pub tap: Descriptor,
    /// The guest's hardware address.
    pub mac: MacAddress,
    /// Largest frame payload the guest may send, bytes.
    pub mtu: u16,
    /// What it may receive, and what it may send.
    #[serde(default)]
    pub rate: RateSpec,
}

/// A shared file system served by a vhost-user back end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsSpec {
    /// Its name.
    pub id: DeviceId,
    /// Connected to the file server (vhost-user).
    pub socket: Descriptor,
    /// What the guest mounts by, at most [`TAG_BYTES`].
    pub tag: String,
}

/// The guest's vsock device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// Context id of the guest, 3 or above.
    pub cid: u32,
    /// Ports that the guest may dial at once, each one time.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
}

/// A port on the host that the guest may dial one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostPort {
    /// vsock port.
    pub port: u32,
    /// Connected unix stream socket that the guest's connection is joined to.
    pub stream: Descriptor,
}

/// An Ethernet address, written `aa:bb:cc:dd:ee:ff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A text that is no Ethernet address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no Ethernet address of the form aa:bb:cc:dd:ee:ff")]
pub struct ParseMacError(String);

impl FromStr for MacAddress {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = || ParseMacError(text.chars().take(64).collect());
        let mut address = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut address {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(fail)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| fail())?;
        }
        match parts.next() {
            None => Ok(Self(address)),
            Some(_) => Err(fail()),
        }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ParseMacError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}
