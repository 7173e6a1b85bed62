//! Joins an interface and a tap: each one's incoming frames leave by the other.

use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::packet_route::tc::{
    TcActionAttribute, TcActionMirrorOption, TcActionOption, TcAttribute, TcFilterU32,
    TcFilterU32Option, TcMessage, TcOption,
};
use rtnetlink::{Handle, LinkUnspec};

use super::NetworkError;
use super::inspect::FoundLink;
use super::tap::Tap;

/// `ETH_P_ALL` of linux/if_ether.h, in network byte order as tc wants it.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();

/// Where filters of incoming frames are.
const INGRESS: u32 = 0xffff_0000;

/// Brings `tap` up with the MTU of `link` and redirects frames both ways. Answers
/// the tap's index.
///
/// # Errors
/// Which request the kernel refused; the redirect is taken back.
pub(super) async fn join(
    handle: &Handle,
    link: &FoundLink,
    tap: &Tap,
) -> Result<u32, NetworkError> {
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
    // Of a tap that has gone.
    part(handle, link.id.index, 0).await?;
    for (from, to) in [(link.id.index, tap_index), (tap_index, link.id.index)] {
        if let Err(error) = redirect(handle, from, to).await {
            // The first error says more.
            let _ = part(handle, link.id.index, tap_index).await;
            return Err(error);
        }
    }
    Ok(tap_index)
}

/// Takes back what [`join`] did to an interface: a redirect whose tap has gone drops
/// every frame.
///
/// # Errors
/// Which request the kernel refused.
pub(super) async fn part(handle: &Handle, link: u32, tap: u32) -> Result<(), NetworkError> {
    for filter in filters(handle, link).await? {
        if target(&filter).is_some_and(|to| to == tap || to == 0) {
            remove(handle, filter).await?;
        }
    }
    Ok(())
}

/// Frames of the interface still go to the tap.
///
/// # Errors
/// The kernel does not say.
pub(super) async fn is_joined(handle: &Handle, link: u32, tap: u32) -> Result<bool, NetworkError> {
    let filters = filters(handle, link).await?;
    Ok(filters.iter().any(|filter| target(filter) == Some(tap)))
}

async fn filters(handle: &Handle, link: u32) -> Result<Vec<TcMessage>, NetworkError> {
    let mut filters = handle.traffic_filter(link.cast_signed());
    let filters = filters.get().ingress().execute();
    filters.try_collect().await.map_err(netlink("list filters"))
}

/// Where a filter like ours sends frames; nowhere once that has gone.
fn target(filter: &TcMessage) -> Option<u32> {
    let options = filter.attributes.iter().filter_map(|one| match one {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let actions = options.flatten().filter_map(|one| match one {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    });
    let attributes = actions.flatten().flat_map(|action| &action.attributes);
    let options = attributes.filter_map(|one| match one {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten().find_map(|one| match one {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => Some(mirror.ifindex),
        _ => None,
    })
}

async fn remove(handle: &Handle, filter: TcMessage) -> Result<(), NetworkError> {
    let mut message = TcMessage::default();
    message.header = filter.header;
    let kind = TcAttribute::Kind(TcFilterU32::KIND.to_owned());
    message.attributes.push(kind);
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut handle = handle.clone();
    let answers = handle.request(request);
    let answers: Vec<_> = answers
        .map_err(netlink("take a redirect back"))?
        .collect()
        .await;
    for answer in answers {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            let error = rtnetlink::Error::NetlinkError(error);
            return Err(netlink("take a redirect back")(error));
        }
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
        .parent(INGRESS)
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
