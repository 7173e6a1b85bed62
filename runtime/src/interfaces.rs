//! How a machine follows what happens to the pod's network on the node: Docker
//! puts interfaces into the namespace of the pid that it was told before it starts
//! a container, and adds and takes others while that runs; CNI's meta-plugins do
//! so, too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_protocol::agent::{Network, Route};
use husk_vmm_spec::MacAddress;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use crate::agent_client::Agent;
use crate::error::Error;
use crate::names::Names;
use crate::network::{LinkId, NetnsId, NetworkWatch, Nic, PodNetwork};
use crate::process::Process;
use crate::vm_plan::nic_id;
use crate::vm_process::Vm;

/// How long one change may take: whoever adds an interface then gives it
/// addresses and routes.
const SETTLED: Duration = Duration::from_millis(50);

/// Pauses, the first and the longest, before a change is tried again that the
/// machine did not take.
const AGAIN: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(120)];

/// The interfaces of a pod's network namespace.
#[derive(Clone, Debug)]
pub struct Interfaces {
    netns: PathBuf,
    /// Whoever holds it is changing the machine's.
    known: Arc<Mutex<Known>>,
    names: Names,
}

/// What the machine has of a namespace.
#[derive(Debug, Default)]
pub struct Known {
    nics: BTreeMap<LinkId, MacAddress>,
    /// The guest has not looked for all of them.
    is_unseen: bool,
    /// What the node had when the guest was told last. The guest is told what is
    /// new since: the pod may have changed the rest.
    told: Network,
}

impl Known {
    /// What a machine boots with.
    pub fn new(nics: &[Nic], told: Network) -> Self {
        Self {
            nics: nics.iter().map(|nic| (nic.link(), nic.mac)).collect(),
            is_unseen: false,
            told,
        }
    }
}

impl Interfaces {
    /// Of the namespace that the machine took over; of none, of the VMM's own,
    /// where whoever asks for the pod's pid comes to.
    pub fn new(netns: Option<&Path>, vmm: Process, known: Known) -> Self {
        let own = || PathBuf::from(format!("/proc/{}/ns/net", vmm.pid));
        Self {
            netns: netns.map_or_else(own, Path::to_owned),
            known: Arc::new(Mutex::new(known)),
            names: Names::default(),
        }
    }

    /// Makes the machine's what they are now.
    ///
    /// # Errors
    /// The VMM or the agent could not plug one.
    pub async fn catch_up(&self, vm: &Vm, agent: &Agent) -> Result<(), Error> {
        if self.is_of_node() {
            return Ok(());
        }
        self.names.catch_up(&self.netns, vm, agent).await;
        let mut known = self.known.lock().await;
        let (netns, links) = (self.netns.clone(), known.nics.keys().cloned().collect());
        let found = tokio::task::spawn_blocking(move || PodNetwork::attach_new(&netns, &links));
        let found = match found.await {
            Ok(Ok(network)) => network,
            // The machine keeps what it has.
            Ok(Err(error)) => {
                tracing::warn!("late interfaces: {}", crate::error::chain(&error));
                return Ok(());
            }
            Err(_) => return Err(Error::ShuttingDown),
        };
        let gone = known.nics.keys().filter(|link| !found.all.contains(link));
        for link in gone.cloned().collect::<Vec<_>>() {
            known.unplug(&link, vm, agent).await;
        }
        for nic in found.nics {
            tracing::info!(name = nic.name, mac = %nic.mac, mtu = nic.mtu, "late interface");
            let (link, mac) = (nic.link(), nic.mac);
            vm.add_nic(nic).await?;
            known.nics.insert(link, mac);
            known.is_unseen = true;
        }
        if known.is_unseen {
            agent.rescan_devices().await?;
            known.is_unseen = false;
        }
        let news = news(&known.told, &found.guest);
        if news == Network::default() {
            return Ok(());
        }
        let has_interfaces = !news.interfaces.is_empty();
        match agent.update_network(news).await {
            Ok(()) => {}
            // It will be told again.
            Err(error) if has_interfaces => return Err(error.into()),
            // A route that the guest cannot take is no reason to do without the rest.
            Err(error) => tracing::warn!(%error, "network"),
        }
        let told = std::mem::replace(&mut known.told, found.guest);
        keep_down(&mut known.told, told, &found.all);
        Ok(())
    }

    /// Does so at each change, until the machine ends.
    pub async fn follow(self, vm: Vm, agent: Agent) {
        if self.is_of_node() {
            return;
        }
        let netns = self.netns.clone();
        let opened = tokio::task::spawn_blocking(move || NetworkWatch::open(&netns));
        let watch = match opened.await {
            Ok(opened) => opened.and_then(NetworkWatch::new),
            Err(_) => return,
        };
        let watch = match watch {
            Ok(watch) => watch,
            Err(error) => {
                return tracing::warn!("late interfaces: {}", crate::error::chain(&error));
            }
        };
        tokio::select! {
            () = self.follow_changes(&watch, &vm, &agent) => {}
            _ = vm.ended() => {}
        }
    }

    async fn follow_changes(&self, watch: &NetworkWatch, vm: &Vm, agent: &Agent) {
        let [mut pause, longest] = AGAIN;
        let mut is_late = false;
        loop {
            let heard = match is_late {
                false => watch.changed().await,
                true => timeout(pause, watch.changed()).await.unwrap_or(Ok(())),
            };
            if let Err(error) = heard {
                return tracing::warn!(%error, "late interfaces");
            }
            sleep(SETTLED).await;
            match self.catch_up(vm, agent).await {
                Ok(()) => {
                    is_late = false;
                    [pause, _] = AGAIN;
                }
                Err(error) => {
                    tracing::warn!("late interfaces: {}", crate::error::chain(&error));
                    if is_late {
                        pause = (pause * 2).min(longest);
                    }
                    is_late = true;
                }
            }
        }
    }

    /// Those of the node itself are never followed.
    fn is_of_node(&self) -> bool {
        NetnsId::of(&self.netns) == NetnsId::of(Path::new("/proc/self/ns/net"))
    }
}

impl Known {
    async fn unplug(&mut self, link: &LinkId, vm: &Vm, agent: &Agent) {
        let Some(mac) = self.nics.remove(link) else {
            return;
        };
        tracing::info!(name = link.name, %mac, "interface has gone");
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
fn news(told: &Network, found: &Network) -> Network {
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
fn keep_down(found: &mut Network, told: Network, all: &BTreeSet<LinkId>) {
    let is_up = |name: &str| found.interfaces.iter().any(|other| other.name == name);
    let is_there = |name: &str| all.iter().any(|link| link.name == name);
    let is_down = |name: &str| is_there(name) && !is_up(name);
    let down = told.interfaces.into_iter();
    let down: Vec<_> = down.filter(|interface| is_down(&interface.name)).collect();
    found.interfaces.extend(down);
}

/// The guest's kernel drops with an interface what leads through it.
fn forget(told: &mut Network, name: &str) {
    let through = |route: &Route| {
        route.device == name || route.next_hops.iter().any(|hop| hop.device == name)
    };
    told.interfaces.retain(|interface| interface.name != name);
    told.routes.retain(|route| !through(route));
    told.neighbours.retain(|neighbour| neighbour.device != name);
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_protocol::agent::{Interface, Rule};

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
