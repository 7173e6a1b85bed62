//! What a machine has of a namespace, and what is new there.

use std::collections::{BTreeMap, BTreeSet};

use husk_protocol::agent::{Interface, Network, Route};
use husk_vmm_spec::MacAddress;

use crate::agent_client::Agent;
use crate::network::{FoundLink, FoundNetwork, LinkId, Nic};
use crate::vm_plan::nic_id;
use crate::vm_process::Vm;

/// What the machine has of a namespace.
#[derive(Debug, Default)]
pub struct Known {
    pub(super) nics: BTreeMap<LinkId, Plugged>,
    /// Those that the machine cannot have as they are.
    pub(super) refused: Vec<FoundLink>,
    /// Names of those plugged since the last start of a program that the guest has
    /// not taken yet.
    pub(super) fresh: BTreeSet<String>,
    /// The guest has not looked for all of them.
    pub(super) is_unseen: bool,
    /// What the node had when the guest was told last. The guest is told what is
    /// new since: the pod may have changed the rest.
    pub(super) told: Network,
}

/// An interface that the machine has.
#[derive(Debug)]
pub(super) struct Plugged {
    mac: MacAddress,
    /// The largest that it can have.
    mtu: u32,
    tap: u32,
}

impl From<&Nic> for Plugged {
    fn from(nic: &Nic) -> Self {
        Self {
            mac: nic.mac,
            mtu: nic.mtu.into(),
            tap: nic.tap_index,
        }
    }
}

impl Known {
    /// What a machine boots with.
    pub fn new(nics: &[Nic], told: Network) -> Self {
        let nics = nics.iter();
        Self {
            nics: nics.map(|nic| (nic.link.clone(), nic.into())).collect(),
            told,
            ..Self::default()
        }
    }

    pub(super) fn taps(&self) -> BTreeMap<LinkId, u32> {
        let taps = self.nics.iter();
        taps.map(|(link, nic)| (link.clone(), nic.tap)).collect()
    }

    /// Those that have gone, or whose device cannot be what they are now.
    pub(super) fn gone(&self, found: &FoundNetwork) -> Vec<LinkId> {
        let is_gone = |(link, nic): &(&LinkId, &Plugged)| {
            let is_another = |other: &FoundLink| {
                other.id == **link && (other.mac != nic.mac || other.mtu > nic.mtu)
            };
            !found.all.contains(*link)
                || found.parted.contains(*link)
                || found.links.iter().any(is_another)
        };
        let gone = self.nics.iter().filter(is_gone);
        gone.map(|(link, _)| link.clone()).collect()
    }

    /// Those that the machine does not have and may be able to.
    pub(super) fn new_ones(&mut self, found: &FoundNetwork) -> Vec<FoundLink> {
        self.refused.retain(|link| found.all.contains(&link.id));
        let is_new =
            |link: &&FoundLink| !self.nics.contains_key(&link.id) && !self.refused.contains(link);
        found.links.iter().filter(is_new).cloned().collect()
    }

    /// The names of VLANs that have gone, or were made anew as others: with what the
    /// guest had its routes went.
    pub(super) fn gone_vlans(&self, found: &FoundNetwork) -> Vec<String> {
        let is_there = |name: &str| found.all.iter().any(|link| link.name == name);
        let is_another = |vlan: &Interface| {
            let what = |one: &Interface| (one.lower.clone(), one.vlan_id, one.vlan_protocol);
            let mut now = found.guest.interfaces.iter();
            now.any(|one| one.name == vlan.name && what(one) != what(vlan))
        };
        let vlans = self
            .told
            .interfaces
            .iter()
            .filter(|one| !one.lower.is_empty());
        let gone = vlans.filter(|vlan| !is_there(&vlan.name) || is_another(vlan));
        gone.map(|vlan| vlan.name.clone()).collect()
    }

    pub(super) async fn remove_vlan(&mut self, name: &str, agent: &Agent) {
        tracing::info!(name, "VLAN has gone");
        forget(&mut self.told, name);
        if let Err(error) = agent.remove_vlan(name).await {
            tracing::warn!(name, %error, "VLAN");
        }
    }

    pub(super) async fn unplug(&mut self, link: &LinkId, vm: &Vm, agent: &Agent) {
        let Some(Plugged { mac, .. }) = self.nics.remove(link) else {
            return;
        };
        tracing::info!(name = link.name, %mac, "interface has gone");
        self.fresh.remove(&link.name);
        forget(&mut self.told, &link.name);
        // A machine that cannot is about to end or has ended.
        if let Err(error) = agent.remove_interface(mac).await {
            tracing::warn!(name = link.name, %error, "interface");
        }
        if let Err(error) = vm.remove_device(nic_id(mac)).await {
            tracing::warn!(name = link.name, %error, "interface");
        }
    }
}

/// What is in `found` and not in `told`.
pub(super) fn news(told: &Network, found: &Network) -> Network {
    fn new<T: PartialEq + Clone>(told: &[T], found: &[T]) -> Vec<T> {
        let is_new = |one: &&T| !told.contains(one);
        found.iter().filter(is_new).cloned().collect()
    }
    Network {
        interfaces: new(&told.interfaces, &found.interfaces),
        routes: new(&told.routes, &found.routes),
        neighbours: new(&told.neighbours, &found.neighbours),
        rules: new(&told.rules, &found.rules),
        ..Network::default()
    }
}

/// An interface that is down for a while is not among those `found`; the guest has
/// it as it was `told`.
pub(super) fn keep_down(found: &mut Network, told: Network, all: &BTreeSet<LinkId>) {
    let is_up = |name: &str| found.interfaces.iter().any(|other| other.name == name);
    let is_there = |name: &str| all.iter().any(|link| link.name == name);
    let is_down = |name: &str| is_there(name) && !is_up(name);
    let down = told.interfaces.into_iter();
    let down: Vec<_> = down.filter(|interface| is_down(&interface.name)).collect();
    found.interfaces.extend(down);
}

/// The guest's kernel drops with an interface what leads through it, and the VLANs
/// on it.
pub(super) fn forget(told: &mut Network, name: &str) {
    let through = |route: &Route| {
        route.device == name || route.next_hops.iter().any(|hop| hop.device == name)
    };
    told.interfaces.retain(|interface| interface.name != name);
    told.routes.retain(|route| !through(route));
    told.neighbours.retain(|neighbour| neighbour.device != name);
    while let Some(vlan) = told.interfaces.iter().find(|one| one.lower == name) {
        let vlan = vlan.name.clone();
        forget(told, &vlan);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_protocol::agent::Rule;

    fn interface(name: &str, address: &str) -> Interface {
        Interface {
            name: name.to_owned(),
            addresses: vec![address.to_owned()],
            ..Interface::default()
        }
    }

    fn route(destination: &str, device: &str) -> Route {
        Route {
            destination: destination.to_owned(),
            device: device.to_owned(),
            ..Route::default()
        }
    }

    fn network(interfaces: Vec<Interface>, routes: Vec<Route>) -> Network {
        let rule = Rule {
            priority: 500,
            ..Rule::default()
        };
        Network {
            interfaces,
            routes,
            rules: vec![rule],
            ..Network::default()
        }
    }

    #[test]
    fn only_what_is_new_is_told() {
        let (eth0, eth1) = (
            interface("eth0", "10.1.0.2/24"),
            interface("eth1", "10.2.0.2/24"),
        );
        let first = network(vec![eth0.clone()], vec![route("", "eth0")]);
        assert_eq!(news(&first, &first), Network::default());
        let routes = vec![route("", "eth0"), route("10.9.0.0/16", "eth1")];
        let second = network(vec![eth0, eth1.clone()], routes);
        let told = news(&first, &second);
        assert_eq!(told.interfaces, std::slice::from_ref(&eth1));
        assert_eq!(told.routes, [route("10.9.0.0/16", "eth1")]);
        assert!(told.rules.is_empty());
        // One that comes again as it was is new all the same.
        let mut told = second.clone();
        forget(&mut told, "eth1");
        assert_eq!(told, first);
        assert_eq!(news(&told, &second).interfaces, [eth1]);
    }

    #[test]
    fn a_vlan_goes_with_its_interface() {
        let on = |name: &str, lower: &str| Interface {
            lower: lower.to_owned(),
            ..interface(name, "10.3.0.2/24")
        };
        let kept = [interface("eth1", "10.2.0.2/24"), on("eth1.7", "eth1")];
        let mut all = vec![interface("eth0", "10.1.0.2/24")];
        all.extend([on("eth0.7", "eth0"), on("eth0.7.9", "eth0.7")]);
        all.extend(kept.clone());
        let routes = vec![route("10.9.0.0/16", "eth0.7.9"), route("", "eth1.7")];
        let found = network(all, routes);
        let mut told = found.clone();
        forget(&mut told, "eth0");
        assert_eq!(told.interfaces, kept);
        assert_eq!(told.routes, [route("", "eth1.7")]);
        // When it comes again, they are new.
        assert_eq!(news(&told, &found).interfaces, found.interfaces[..3]);

        // One that goes by itself; one that is down is there.
        let known = Known {
            told: found,
            ..Known::default()
        };
        let names = ["lo", "eth0", "eth0.7.9", "eth1", "eth1.7"];
        let all = names.iter().zip(1..).map(|(name, index)| LinkId {
            index,
            name: (*name).to_owned(),
        });
        let mut now = FoundNetwork {
            links: Vec::new(),
            all: all.collect(),
            parted: BTreeSet::new(),
            guest: Network::default(),
        };
        assert_eq!(known.gone_vlans(&now), ["eth0.7"]);
        // One of the same name that is another takes the routes along, too.
        let [_, same] = kept;
        now.guest.interfaces = vec![same.clone()];
        assert_eq!(known.gone_vlans(&now), ["eth0.7"]);
        for other in [
            on("eth1.7", "eth0"),
            Interface {
                vlan_id: 8,
                ..same.clone()
            },
            Interface {
                vlan_protocol: 0x88a8,
                ..same
            },
        ] {
            now.guest.interfaces = vec![other];
            assert_eq!(known.gone_vlans(&now), ["eth0.7", "eth1.7"]);
        }
    }

    #[test]
    fn one_that_was_down_is_not_new() {
        let (eth0, eth1) = (
            interface("eth0", "10.1.0.2/24"),
            interface("eth1", "10.2.0.2/24"),
        );
        let told = network(vec![eth0.clone(), eth1], Vec::new());
        let all = [(2, "eth0"), (3, "eth1")];
        let all = all.map(|(index, name)| LinkId {
            index,
            name: name.to_owned(),
        });
        let mut found = network(vec![eth0], Vec::new());
        let gone = found.clone();
        keep_down(&mut found, told.clone(), &all.clone().into());
        assert_eq!(found, told);
        let mut found = gone.clone();
        let [first, _] = all;
        keep_down(&mut found, told, &[first].into());
        assert_eq!(found, gone);
    }
}
