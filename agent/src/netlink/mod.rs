//! The pod's network: interfaces, addresses, routes, neighbours and rules as
//! the host had them. Messages of our own instead of a library: these few
//! requests are all that is ever sent, and the agent stays small.

mod address;
mod message;
mod route;
mod rule;
mod vlan;

use std::future::ready;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use husk_protocol::agent::{Interface, Neighbour, Network};

use crate::device;
use crate::error::{Doing, OsError};
use crate::kernel_file;
use crate::pod_namespaces;
use address::{Address, Prefix};
use message::{Mode, Request, RouteSocket};
use vlan::Vlan;

/// How long an interface that the host has plugged may take to appear.
const DEADLINE: Duration = Duration::from_secs(10);

// linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/neighbour.h
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWNEIGH: u16 = 28;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_PERM_ADDRESS: u16 = 54;
const IFLA_PARENT_DEV_NAME: u16 = 56;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

/// A network that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{field} {value:?} is invalid")]
    Invalid { field: &'static str, value: String },
    #[error("interface {name:?} ({address}) did not appear within {seconds} s")]
    Deadline {
        name: String,
        address: String,
        seconds: u64,
    },
    #[error(transparent)]
    Os(#[from] OsError),
}

/// Applies a complete state. May be repeated: what is there already stays.
pub async fn apply(network: &Network) -> Result<(), NetworkError> {
    let interfaces = network.interfaces.iter();
    let (vlans, devices): (Vec<_>, Vec<_>) = interfaces.partition(|one| vlan::is_vlan(one));
    for interface in &devices {
        wait_for(interface).await?;
    }
    let socket = RouteSocket::open().doing("open", "a netlink socket")?;
    rename(&socket, &devices)?;
    for interface in devices {
        set_up(&socket, interface)?;
    }
    // In their order: one may be on another.
    for interface in vlans {
        vlan::add(&socket, interface)?;
        set_up(&socket, interface)?;
    }
    // A gateway must be reachable before a route leads through it.
    let (through, direct): (Vec<_>, Vec<_>) = network
        .routes
        .iter()
        .partition(|route| !route.gateway.is_empty() || !route.next_hops.is_empty());
    for route in direct.into_iter().chain(through) {
        route::add(&socket, route)?;
    }
    for neighbour in &network.neighbours {
        add_neighbour(&socket, neighbour)?;
    }
    for rule in &network.rules {
        rule::add(&socket, rule)?;
    }
    Ok(())
}

/// Takes back a VLAN that [`apply`] has made; it may have gone already.
pub fn remove_vlan(name: &str) -> Result<(), NetworkError> {
    let socket = RouteSocket::open().doing("open", "a netlink socket")?;
    vlan::remove(&socket, name)
}

/// The device of the interface of this hardware address, by its name on the virtio
/// bus, wherever the interface is now: among the pod's, or where it appeared.
pub fn find_device(address: &[u8]) -> Result<Option<String>, OsError> {
    let pods = RouteSocket::open();
    let first = pod_namespaces::in_first_network(RouteSocket::open);
    for socket in [pods, first] {
        let socket = socket.doing("open", "a netlink socket")?;
        let links = links(&socket).doing("list", "interfaces")?;
        if let Some(link) = by_address(&links, address) {
            let none = || io::Error::from(io::ErrorKind::NotFound);
            let device = link.device.clone().ok_or_else(none);
            return device.map(Some).doing("find the device of", &link.name);
        }
    }
    Ok(None)
}

async fn wait_for(interface: &Interface) -> Result<(), NetworkError> {
    let socket = RouteSocket::open().doing("open", "a netlink socket")?;
    // What can't be listed now can't be found either.
    let is_here = || current(&links(&socket).unwrap_or_default(), interface).map(|_| ());
    let find = || {
        let found = is_here().or_else(|| {
            if let Err(error) = bring_in(interface) {
                log::error!("interface {}: {error}", interface.name);
            }
            is_here()
        });
        ready(found)
    };
    let found = device::wait_for(DEADLINE, find).await;
    let found = found.doing("find interface", &interface.name)?;
    found.ok_or_else(|| NetworkError::Deadline {
        name: interface.name.clone(),
        address: format!("{:02x?}", interface.hardware_address),
        seconds: DEADLINE.as_secs(),
    })
}

/// Takes an interface that has appeared in the first network namespace into the
/// pod's, if that is another.
fn bring_in(interface: &Interface) -> io::Result<()> {
    bring_in_link(|links| current(links, interface))
}

/// Likewise, that of a device, by its name on its bus.
pub fn bring_in_device(device: &str) -> io::Result<()> {
    let is_it = |link: &&Link| link.device.as_deref() == Some(device);
    bring_in_link(|links| links.iter().find(is_it))
}

fn bring_in_link(find: impl Fn(&[Link]) -> Option<&Link>) -> io::Result<()> {
    let Some(pod) = pod_namespaces::network() else {
        return Ok(());
    };
    let socket = pod_namespaces::in_first_network(RouteSocket::open)?;
    let links = links(&socket)?;
    let Some(link) = find(&links) else {
        return Ok(());
    };
    let pod = pod.as_raw_fd().unsigned_abs();
    set_link(&socket, link.index, None, |request| {
        request.number(IFLA_NET_NS_FD, pod)
    })
}

/// A network device.
#[derive(Debug, Clone)]
struct Link {
    index: u32,
    name: String,
    address: Vec<u8>,
    /// The one that the machine gave it; the pod may have given it another.
    first_address: Option<Vec<u8>>,
    /// Made by software on top of others, whose address it may have.
    is_virtual: bool,
    /// By its name on its bus.
    device: Option<String>,
    vlan: Option<Vlan>,
}

fn links(socket: &RouteSocket) -> io::Result<Vec<Link>> {
    let mut links = Vec::new();
    socket.dump(RTM_GETLINK, &[&[0; 16]], |_, body| {
        // struct ifinfomsg
        let Some((fixed, attributes)) = body.split_first_chunk::<16>() else {
            return;
        };
        let text = |kind| {
            let text = message::find_attribute(attributes, kind)?;
            let text = String::from_utf8_lossy(text);
            Some(text.trim_end_matches('\0').to_owned())
        };
        links.push(Link {
            index: u32::from_ne_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]),
            name: text(IFLA_IFNAME).unwrap_or_default(),
            address: message::find_attribute(attributes, IFLA_ADDRESS)
                .unwrap_or_default()
                .to_vec(),
            first_address: message::find_attribute(attributes, IFLA_PERM_ADDRESS)
                .map(<[u8]>::to_vec),
            is_virtual: message::find_attribute(attributes, IFLA_LINKINFO).is_some(),
            device: text(IFLA_PARENT_DEV_NAME),
            vlan: Vlan::read(attributes),
        });
    })?;
    Ok(links)
}

fn by_address<'a>(links: &'a [Link], address: &[u8]) -> Option<&'a Link> {
    let is_its = |link: &&Link| match &link.first_address {
        Some(first) => first == address,
        None => link.address == address,
    };
    let same = || links.iter().filter(is_its);
    same()
        .find(|link| !link.is_virtual)
        .or_else(|| same().next())
}

/// The loopback has no hardware address.
fn current<'a>(links: &'a [Link], interface: &Interface) -> Option<&'a Link> {
    if interface.hardware_address.iter().all(|byte| *byte == 0) {
        links.iter().find(|link| link.name == interface.name)
    } else {
        by_address(links, &interface.hardware_address)
    }
}

fn index_of(socket: &RouteSocket, name: &str) -> Result<u32, NetworkError> {
    let links = links(socket).doing("list", "interfaces")?;
    let link = links.iter().find(|link| link.name == name);
    link.map(|link| link.index)
        .ok_or_else(|| NetworkError::Invalid {
            field: "interface",
            value: name.to_owned(),
        })
}

/// Two interfaces may have each other's names: all step aside first.
fn rename(socket: &RouteSocket, interfaces: &[&Interface]) -> Result<(), NetworkError> {
    let links = links(socket).doing("list", "interfaces")?;
    let mut wrong = Vec::new();
    for (number, interface) in interfaces.iter().enumerate() {
        match current(&links, interface) {
            Some(link) if link.name != interface.name => {
                let aside = format!("husk{number}");
                set_link(socket, link.index, Some(0), |request| request)
                    .and_then(|()| {
                        let name = |request: Request| request.name(IFLA_IFNAME, &aside);
                        set_link(socket, link.index, None, name)
                    })
                    .doing("rename", &link.name)?;
                wrong.push((link.index, &interface.name));
            }
            _ => {}
        }
    }
    for (index, name) in wrong {
        set_link(socket, index, None, |request| {
            request.name(IFLA_IFNAME, name)
        })
        .doing("name interface", name)?;
    }
    Ok(())
}

fn set_link(
    socket: &RouteSocket,
    index: u32,
    up: Option<u32>,
    attributes: impl FnOnce(Request) -> Request,
) -> io::Result<()> {
    const IFF_UP: u32 = 1;
    let (flags, change) = match up {
        Some(flags) => (flags & IFF_UP, IFF_UP),
        None => (0, 0),
    };
    // struct ifinfomsg
    let fixed = [0, index, flags, change].map(u32::to_ne_bytes).concat();
    socket.request(attributes(Request::new(
        RTM_NEWLINK,
        Mode::Change,
        &[&fixed],
    )))
}

fn set_up(socket: &RouteSocket, interface: &Interface) -> Result<(), NetworkError> {
    let name = &interface.name;
    let index = index_of(socket, name)?;
    // The host has done duplicate address detection already; without IPv6
    // there is nothing to say.
    for file in ["accept_dad", "dad_transmits"] {
        let _ = kernel_file::write(format!("/proc/sys/net/ipv6/conf/{name}/{file}"), "0");
    }
    set_link(socket, index, Some(1), |request| match interface.mtu {
        0 => request,
        mtu => request.number(IFLA_MTU, mtu),
    })
    .doing("bring up", name)?;
    let mut wanted = Vec::new();
    for text in &interface.addresses {
        wanted.push(Prefix::parse("address", text)?);
    }
    // First: with the first address of a network, its others go too.
    for prefix in other_addresses(socket, index, &wanted).doing("list addresses of", name)? {
        let request = address_request(RTM_DELADDR, Mode::Change, index, &prefix);
        socket.request(request).doing("remove address from", name)?;
    }
    for prefix in &wanted {
        add_address(socket, index, prefix).doing("add address to", name)?;
    }
    Ok(())
}

fn address_request(kind: u16, mode: Mode, index: u32, prefix: &Prefix) -> Request {
    // struct ifaddrmsg
    let fixed = [
        prefix.address.family(),
        prefix.length,
        0,
        prefix.address.scope(),
    ];
    Request::new(kind, mode, &[&fixed, &index.to_ne_bytes()])
        .attribute(IFA_LOCAL, &prefix.address.bytes())
        .attribute(IFA_ADDRESS, &prefix.address.bytes())
}

fn add_address(socket: &RouteSocket, index: u32, prefix: &Prefix) -> io::Result<()> {
    let mut request = address_request(RTM_NEWADDR, Mode::Replace, index, prefix);
    request = match prefix.broadcast() {
        Some(broadcast) => request.attribute(IFA_BROADCAST, &broadcast.octets()),
        None => request,
    };
    if let Address::V6(_) = prefix.address {
        request = request.number(IFA_FLAGS, IFA_F_NODAD);
    }
    socket.request(request)
}

/// Those that nobody asked for, without what the kernel makes itself.
fn other_addresses(socket: &RouteSocket, index: u32, wanted: &[Prefix]) -> io::Result<Vec<Prefix>> {
    let mut others = Vec::new();
    socket.dump(RTM_GETADDR, &[&[0; 8]], |_, body| {
        let Some((fixed, attributes)) = body.split_first_chunk::<8>() else {
            return;
        };
        let value = message::find_attribute(attributes, IFA_LOCAL)
            .or_else(|| message::find_attribute(attributes, IFA_ADDRESS));
        let address = value.and_then(Address::from_bytes);
        let on_index = u32::from_ne_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]) == index;
        if let (Some(address), true) = (address, on_index) {
            let prefix = Prefix {
                address,
                length: fixed[1],
            };
            if !prefix.address.is_made_by_kernel() && !wanted.contains(&prefix) {
                others.push(prefix);
            }
        }
    })?;
    Ok(others)
}

fn add_neighbour(socket: &RouteSocket, neighbour: &Neighbour) -> Result<(), NetworkError> {
    let address = Prefix::parse("neighbour", &neighbour.address)?.address;
    let index = index_of(socket, &neighbour.device)?;
    let state = u16::try_from(neighbour.state).unwrap_or(0);
    let state = if state == 0 { NUD_PERMANENT } else { state };
    let flags = u8::try_from(neighbour.flags).unwrap_or(0);
    // struct ndmsg
    let request = Request::new(
        RTM_NEWNEIGH,
        Mode::Replace,
        &[
            &[address.family(), 0, 0, 0],
            &index.to_ne_bytes(),
            &state.to_ne_bytes(),
            &[flags, 0],
        ],
    )
    .attribute(NDA_DST, &address.bytes())
    .attribute(NDA_LLADDR, &neighbour.hardware_address);
    Ok(socket
        .request(request)
        .doing("add neighbour", &neighbour.address)?)
}

fn unless_exists(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}
