//! Network interfaces (virtio 1.2, 5.1): one queue pair on a tap.
//!
//! The kernel does the work of checksums and segmentation: frames carry virtio's
//! own header through the tap both ways, and what the driver can take of large or
//! unchecked frames is told to the tap.

mod control;
mod receive;
mod tap;
mod worker;

use std::any::Any;
use std::io;
use std::os::fd::OwnedFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

use crate::rate::{Limiter, Limits};
use crate::{ActivateError, Activation, DeviceType, VirtioDevice, Worker, queue};
use tap::Tap;
use worker::NetWorker;

/// Receive, transmit, control. With several queue pairs the control queue would
/// come after the last of them.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

const RX: u16 = 0;
const TX: u16 = 1;
const CONTROL: u16 = 2;

/// Bytes of `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
const HEADER_BYTES: usize = 12;

/// The longest frame with its header (virtio 1.2, 5.1.6.3.1).
const FRAME_BYTES: usize = 65562;

/// An Ethernet header with a VLAN tag.
const ETHERNET_BYTES: usize = 18;

/// Large or unchecked frames that the driver can take; it may switch each off
/// and on (virtio 1.2, 5.1.6.5.6.1).
const GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | GUEST_UDP_OFFLOADS;

/// Those of [`GUEST_OFFLOADS`] that make frames larger than the MTU.
const GUEST_SEGMENTS: u64 =
    1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6 | GUEST_UDP_OFFLOADS;

const GUEST_UDP_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;

/// Features that every tap has.
const FEATURES: u64 = queue::FEATURES
    | (GUEST_OFFLOADS & !GUEST_UDP_OFFLOADS)
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;

/// Features for segmentation of UDP, which taps have since Linux 6.2.
const UDP_FEATURES: u64 = GUEST_UDP_OFFLOADS | 1 << VIRTIO_NET_F_HOST_USO;

/// A network interface at rest.
#[derive(Debug)]
pub struct Net {
    /// Absent while the working half has it.
    tap: Option<Tap>,
    /// Likewise.
    limiters: Limiters,
    features: u64,
    mac: [u8; 6],
    mtu: u16,
}

/// One for each direction.
#[derive(Debug, Default)]
struct Limiters {
    receive: Limiter,
    transmit: Limiter,
}

impl Net {
    /// An interface on `tap`, a descriptor of `/dev/net/tun` attached with
    /// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. It is made non-blocking and its
    /// header's size is set.
    ///
    /// # Errors
    /// It is no such tap.
    pub fn new(tap: OwnedFd, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        let tap = Tap::new(tap)?;
        let udp = match tap.segments_udp() {
            true => UDP_FEATURES,
            false => 0,
        };
        Ok(Self::on(tap, FEATURES | udp, mac, mtu))
    }

    fn on(tap: Tap, features: u64, mac: [u8; 6], mtu: u16) -> Self {
        Self {
            tap: Some(tap),
            limiters: Limiters::default(),
            features,
            mac,
            mtu,
        }
    }

    /// Limits what is received and what is transmitted, each by itself.
    ///
    /// # Errors
    /// There is no timer to be had.
    pub fn limit(&mut self, limits: Limits) -> io::Result<()> {
        self.limiters = Limiters {
            receive: Limiter::new(limits)?,
            transmit: Limiter::new(limits)?,
        };
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn offered_features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 12];
        space[0..6].copy_from_slice(&self.mac);
        space[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        space[8..10].copy_from_slice(&1u16.to_le_bytes());
        space[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        crate::config::read(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let worker = NetWorker::new(&mut self.tap, &mut self.limiters, self.mtu, activation)?;
        Ok(Box::new(worker))
    }

    fn reset(&mut self, worker: Box<dyn Worker>) {
        let worker: Box<dyn Any> = worker;
        if let Ok(worker) = worker.downcast::<NetWorker>() {
            let (tap, limiters) = worker.into_parts();
            (self.tap, self.limiters) = (Some(tap), limiters);
        }
    }
}

#[cfg(test)]
mod tests;
