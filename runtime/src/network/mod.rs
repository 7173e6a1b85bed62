//! The pod's network: what CNI (or Docker) built in a network namespace, taken
//! over into the machine.
//!
//! Every Ethernet interface of the namespace gets a tap, and tc redirects all
//! frames between the two in both directions, so the namespace's own stack sees
//! none of them. The guest then gets the interface's name, hardware address,
//! addresses, routes, neighbours and MTU. Nothing of this needs removing: taps
//! vanish with their descriptors, and the rest with the namespace.

mod bpf;
mod inspect;
mod netns;
mod port_forward;
mod redirect;
pub mod resolver;
mod tap;
mod watch;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use husk_protocol::agent::Network;
use husk_vmm_spec::MacAddress;

pub use husk_node::state::NetnsId;
pub use port_forward::PortForward;
pub use watch::NetworkWatch;

use inspect::FoundNetwork;
use netns::in_netns;

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
    /// The kernel's number of it in the namespace.
    pub index: u32,
    /// Name in the namespace and in the guest.
    pub name: String,
    /// Tap joined to the interface, non-blocking, with 12-byte vnet headers.
    pub tap: OwnedFd,
    /// Hardware address of the interface and of the guest's device.
    pub mac: MacAddress,
    /// Largest payload of a frame, bytes.
    pub mtu: u16,
}

/// What the machine gets of a network namespace.
#[derive(Debug)]
pub struct PodNetwork {
    /// One for each Ethernet interface that was not known before.
    pub nics: Vec<Nic>,
    /// Every interface that is there, of whatever kind, up or not.
    pub all: BTreeSet<LinkId>,
    /// The whole state the guest is to take on, known interfaces included.
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

impl Nic {
    /// Which it is.
    pub fn link(&self) -> LinkId {
        LinkId {
            index: self.index,
            name: self.name.clone(),
        }
    }
}

impl PodNetwork {
    /// Takes over every interface of the namespace at `netns`. Blocks for a few
    /// milliseconds.
    ///
    /// # Errors
    /// The namespace is not there, or the kernel refused a step; nothing stays.
    pub fn attach(netns: &Path) -> Result<Self, NetworkError> {
        Self::attach_new(netns, &BTreeSet::new())
    }

    /// Like [`PodNetwork::attach`], but leaves out the `known` interfaces, which
    /// have their taps already.
    ///
    /// # Errors
    /// As [`PodNetwork::attach`].
    pub fn attach_new(netns: &Path, known: &BTreeSet<LinkId>) -> Result<Self, NetworkError> {
        in_netns(netns, || take_over(known))
    }
}

fn take_over(known: &BTreeSet<LinkId>) -> Result<PodNetwork, NetworkError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(NetworkError::Thread)?;
    runtime.block_on(async {
        // Bound to the namespace of this thread, as every socket made here.
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Thread)?;
        let connection = tokio::spawn(connection);
        let FoundNetwork { links, all, guest } = inspect::read(&handle).await?;

        let mut nics = Vec::new();
        for link in links {
            if known.contains(&link.id()) {
                continue;
            }
            let mtu = u16::try_from(link.mtu)
                .ok()
                .filter(|mtu| *mtu >= 68)
                .ok_or_else(|| NetworkError::Mtu {
                    interface: link.name.clone(),
                    mtu: link.mtu,
                })?;
            let tap = tap::create(&link)?;
            redirect::join(&handle, &link, &tap).await?;
            nics.push(Nic {
                index: link.index,
                name: link.name,
                tap: tap.fd,
                mac: link.mac,
                mtu,
            });
        }
        connection.abort();
        Ok(PodNetwork { nics, all, guest })
    })
}
