//! Joins an interface and a tap: each one's incoming frames leave by the other.

use futures::TryStreamExt;
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::{Handle, LinkUnspec};

use super::NetworkError;
use super::inspect::FoundLink;
use super::tap::Tap;

/// `ETH_P_ALL` of linux/if_ether.h, in network byte order as tc wants it.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();

/// Brings `tap` up with the MTU of `link` and redirects frames both ways.
///
/// # Errors
/// Which request the kernel refused.
pub(super) async fn join(handle: &Handle, link: &FoundLink, tap: &Tap) -> Result<(), NetworkError> {
    let tap_index = index_of(handle, &tap.name).await?;
    handle
        .link()
        .set(
            LinkUnspec::new_with_index(tap_index)
                .mtu(link.mtu)
                .up()
                .build(),
        )
        .execute()
        .await
        .map_err(netlink("set the tap up"))?;
    for (from, to) in [(link.index, tap_index), (tap_index, link.index)] {
        redirect(handle, from, to).await?;
    }
    Ok(())
}

async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), NetworkError> {
    let from = from.cast_signed();
    // Another tool may have put an ingress qdisc there already (a CNI plugin
    // that limits bandwidth does). Ours then run before its: a filter without a
    // priority gets the one before the last that was added so (tc-filter).
    match handle.qdisc().add(from).ingress().execute().await {
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::EEXIST => {}
        result => result.map_err(netlink("add an ingress qdisc"))?,
    }
    handle
        .traffic_filter(from)
        .add()
        .parent(0xffff_0000)
        .protocol(ALL_PROTOCOLS)
        .redirect(to)
        .map_err(netlink("add a redirect"))?
        .execute()
        .await
        .map_err(netlink("add a redirect"))
}

async fn index_of(handle: &Handle, name: &str) -> Result<u32, NetworkError> {
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .match_name(name)
        .execute()
        .try_collect()
        .await
        .map_err(netlink("find the tap"))?;
    links
        .first()
        .map(|link| link.header.index)
        .ok_or(NetworkError::Netlink {
            what: "find the tap",
            source: rtnetlink::Error::RequestFailed,
        })
}

fn netlink(what: &'static str) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::Netlink { what, source }
}
