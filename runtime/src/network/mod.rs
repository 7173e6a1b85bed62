//! The pod's network: what CNI (or Docker) built in a network namespace, taken
//! over into the machine.
//!
//! Every Ethernet interface of the namespace gets a tap, and tc redirects all
//! frames between the two in both directions, so the namespace's own stack sees
//! none of them. The guest then gets the interface's name, hardware address,
//! addresses, routes, neighbours and MTU. A VLAN on one of them has no tap: its
//! frames come with the others, and the guest makes it anew. Nothing of this needs removing: taps
//! vanish with their descriptors, and the rest with the namespace.

mod bpf;
mod inspect;
mod netns;
mod port_forward;
mod redirect;
pub mod resolver;
mod tap;
mod vlan;
mod watch;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use husk_protocol::agent::Network;
use husk_vmm_spec::MacAddress;
use rtnetlink::Handle;

pub use husk_node::state::NetnsId;
pub use inspect::{FoundLink, FoundNetwork};
pub use netns::Netns;
pub use port_forward::PortForward;
pub use watch::NetworkWatch;

/// What tells an interface of a namespace from those that were there before it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId {
    /// The kernel's number; another may get it later.
    pub index: u32,
    /// Its name; another may have it later.
    pub name: String,
}

/// A network interface for the machine.
#[derive(Debug)]
pub struct Nic {
    /// The interface; its name is the one in the guest, too.
    pub link: LinkId,
    /// Tap joined to the interface, non-blocking, with 12-byte vnet headers.
    pub tap: OwnedFd,
    /// The kernel's number of the tap.
    pub tap_index: u32,
    /// Hardware address of the interface and of the guest's device.
    pub mac: MacAddress,
    /// Largest payload of a frame, bytes.
    pub mtu: u16,
}

/// What the machine boots with of a network namespace.
#[derive(Debug)]
pub struct PodNetwork {
    /// One for each Ethernet interface.
    pub nics: Vec<Nic>,
    /// The whole state the guest is to take on.
    pub guest: Network,
}

/// A network namespace that could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace is not there or no namespace.
    #[error("network namespace {path}")]
    Namespace {
        /// As the spec names it.
        path: PathBuf,
        /// Why it could not be entered.
        #[source]
        source: io::Error,
    },
    /// The namespace is the node's.
    #[error("the network namespace is the node's own")]
    OfNode,
    /// The kernel refused a netlink request.
    #[error("{what} in the pod's network namespace")]
    Netlink {
        /// What was asked.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: rtnetlink::Error,
    },
    /// A tap could not be made.
    #[error("tap {name} for interface {interface}: {what}")]
    Tap {
        /// The tap.
        name: String,
        /// The interface it was for.
        interface: String,
        /// Which step.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// An MTU that virtio-net cannot carry.
    #[error("interface {interface} has an MTU of {mtu}; it must be from 68 to 65535")]
    Mtu {
        /// The interface.
        interface: String,
        /// Its MTU.
        mtu: u32,
    },
    /// Catching connections to localhost could not be set up.
    #[error("port forwarding in the pod's network namespace: {what}")]
    PortForward {
        /// Which step.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The kernel does not tell of changes.
    #[error("watching the pod's network namespace")]
    Watch(#[source] io::Error),
    /// Docker's server of names could not be reached.
    #[error("server of names in the pod's network namespace")]
    Resolver(#[source] io::Error),
    /// A thread or the runtime for it could not be started.
    #[error("thread for the pod's network namespace")]
    Thread(#[source] io::Error),
}

impl PodNetwork {
    /// Takes over every interface of the namespace. Blocks for a few milliseconds.
    ///
    /// # Errors
    /// The kernel refused a step; nothing stays.
    pub fn attach(netns: &Netns) -> Result<Self, NetworkError> {
        inside(netns, async |handle| {
            let FoundNetwork { links, guest, .. } = inspect::read(handle).await?;
            let mut nics = Vec::new();
            for link in &links {
                nics.push(take_over(handle, link).await?);
            }
            Ok(Self { nics, guest })
        })
    }
}

impl FoundNetwork {
    /// Reads the namespace, in which the machine has the taps of these numbers.
    ///
    /// # Errors
    /// Which dump the kernel refused.
    pub fn read(netns: &Netns, taps: &BTreeMap<LinkId, u32>) -> Result<Self, NetworkError> {
        inside(netns, async |handle| {
            let mut found = inspect::read(handle).await?;
            for link in &found.links {
                let Some(tap) = taps.get(&link.id) else {
                    continue;
                };
                // Whoever does not know lets it be.
                let joined = redirect::is_joined(handle, link.id.index, *tap).await;
                if let Ok(false) = joined {
                    found.parted.insert(link.id.clone());
                }
            }
            Ok(found)
        })
    }
}

impl Nic {
    /// Takes each of these interfaces over, or says why not.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn take_over(
        netns: &Netns,
        links: &[FoundLink],
    ) -> Result<Vec<Result<Self, NetworkError>>, NetworkError> {
        inside(netns, async |handle| {
            let mut nics = Vec::new();
            for link in links {
                nics.push(take_over(handle, link).await);
            }
            Ok(nics)
        })
    }

    /// Leaves an interface to the namespace whose tap the machine did not take.
    ///
    /// # Errors
    /// Which request the kernel refused.
    pub fn give_back(netns: &Netns, link: &LinkId, tap: u32) -> Result<(), NetworkError> {
        inside(netns, async |handle| {
            redirect::part(handle, link.index, tap).await
        })
    }
}

async fn take_over(handle: &Handle, link: &FoundLink) -> Result<Nic, NetworkError> {
    let mtu = u16::try_from(link.mtu)
        .ok()
        .filter(|mtu| *mtu >= 68)
        .ok_or_else(|| NetworkError::Mtu {
            interface: link.id.name.clone(),
            mtu: link.mtu,
        })?;
    let tap = tap::create(link)?;
    let tap_index = redirect::join(handle, link, &tap).await?;
    Ok(Nic {
        link: link.id.clone(),
        tap: tap.fd,
        tap_index,
        mac: link.mac,
        mtu,
    })
}

/// Asks the kernel from within the namespace.
fn inside<T: Send>(
    netns: &Netns,
    ask: impl AsyncFnOnce(&Handle) -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    netns.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(NetworkError::Thread)?;
        runtime.block_on(async {
            // Bound to the namespace of this thread, as every socket made here.
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(NetworkError::Thread)?;
            let connection = tokio::spawn(connection);
            let answer = ask(&handle).await;
            connection.abort();
            answer
        })
    })
}
