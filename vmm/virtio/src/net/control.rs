//! Commands on the control queue (virtio 1.2, 5.1.6.5).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::tap::Tap;
use crate::queue::Chain;

/// Carries out one command; returns what the driver gets for it.
///
/// `offloads` are those that were negotiated, if they may be switched at all.
pub(super) fn execute(command: &Chain, tap: &mut Tap, offloads: Option<u64>) -> u8 {
    match run(command, tap, offloads) {
        Some(()) => VIRTIO_NET_OK as u8,
        None => VIRTIO_NET_ERR as u8,
    }
}

fn run(command: &Chain, tap: &mut Tap, offloads: Option<u64>) -> Option<()> {
    let mut kind = [0; 2];
    command.read(0, &mut kind).then_some(())?;
    match kind.map(u32::from) {
        // The device filters nothing, which satisfies every wish to receive more.
        [
            VIRTIO_NET_CTRL_RX,
            VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI,
        ] => command.read(2, &mut [0]).then_some(()),
        [VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET] => {
            let unicast = skip_table(command, 2)?;
            let end = skip_table(command, unicast)?;
            (end <= command.readable_len()).then_some(())
        }
        [
            VIRTIO_NET_CTRL_GUEST_OFFLOADS,
            VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET,
        ] => {
            let mut wanted = [0; 8];
            command.read(2, &mut wanted).then_some(())?;
            let wanted = u64::from_le_bytes(wanted);
            if wanted & !offloads? != 0 {
                return None;
            }
            tap.set_offloads(wanted).ok()
        }
        _ => None,
    }
}

/// Where the table of addresses at `offset` ends: a count, and as many addresses.
fn skip_table(command: &Chain, offset: usize) -> Option<usize> {
    let mut count = [0; 4];
    command.read(offset, &mut count).then_some(())?;
    let bytes = usize::try_from(u32::from_le_bytes(count))
        .ok()?
        .checked_mul(6)?;
    offset.checked_add(4)?.checked_add(bytes)
}
