//! How a machine follows what happens to the pod's network on the node: Docker
//! puts interfaces into the namespace of the pid that it was told before it starts
//! a container, and adds and takes others while that runs; CNI's meta-plugins do
//! so, too.

mod known;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_protocol::agent::Network;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use crate::agent_client::{Agent, AgentError};
use crate::error::{Error, chain};
use crate::names::Names;
use crate::network::{FoundLink, FoundNetwork, Netns, NetworkError, NetworkWatch, Nic};
use crate::process::Process;
use crate::vm_process::{Vm, VmError};
use known::{Plugged, forget, keep_down, news};

pub use known::Known;

/// How long one change may take: whoever adds an interface then gives it
/// addresses and routes.
const SETTLED: Duration = Duration::from_millis(50);

/// Pauses, the first and the longest, before a change is tried again that the
/// machine did not take.
const AGAIN: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(120)];

/// The interfaces of a pod's network namespace.
#[derive(Clone, Debug)]
pub struct Interfaces {
    /// None where they are the node's, which are never followed.
    netns: Option<Netns>,
    /// Whoever holds it is changing the machine's.
    known: Arc<Mutex<Known>>,
    names: Names,
}

/// Something that the machine did not take.
struct Untaken {
    error: Error,
    /// It may take it another time.
    is_passing: bool,
    /// A program that starts now lacks what it was promised.
    is_missed: bool,
}

impl Interfaces {
    /// Of the namespace that the machine took over; of none, of the VMM's own,
    /// where whoever asks for the pod's pid comes to.
    pub fn new(netns: Option<Netns>, vmm: Process, known: Known) -> Self {
        Self {
            netns: netns.or_else(|| of_vmm(vmm)),
            known: Arc::new(Mutex::new(known)),
            names: Names::default(),
        }
    }

    /// Makes the machine's what they are now, for a program that is about to start.
    ///
    /// # Errors
    /// One that came for it is not there. Without others that the machine does not
    /// take it runs.
    pub async fn catch_up_for_start(&self, vm: &Vm, agent: &Agent) -> Result<(), Error> {
        {
            let mut known = self.known.lock().await;
            if known.nics.is_empty() {
                known.refused.clear();
            }
        }
        let untaken = self.catch_up(vm, agent).await;
        self.known.lock().await.fresh.clear();
        for Untaken {
            error, is_missed, ..
        } in untaken
        {
            if is_missed {
                return Err(error);
            }
            tracing::warn!("late interfaces: {}", chain(&error));
        }
        Ok(())
    }

    /// Makes the machine's what they are now, as far as it can.
    async fn catch_up(&self, vm: &Vm, agent: &Agent) -> Vec<Untaken> {
        let Some(netns) = &self.netns else {
            return Vec::new();
        };
        self.names.catch_up(netns, vm, agent).await;
        let mut known = self.known.lock().await;
        let taps = known.taps();
        let found = blocking(netns, move |netns| FoundNetwork::read(netns, &taps)).await;
        let found = match found {
            Ok(found) => found,
            // The machine keeps what it has.
            Err(error) => return vec![Untaken::for_now(error)],
        };
        // The name of a tap, and of a device, is free once its interface has gone.
        for link in known.gone(&found) {
            known.unplug(&link, vm, agent).await;
        }
        for vlan in known.gone_vlans(&found) {
            known.remove_vlan(&vlan, agent).await;
        }
        let mut untaken = plug(&mut known, netns, &found, vm).await;
        tell(&mut known, found, agent, &mut untaken).await;
        untaken
    }

    /// Does so at each change, until the machine ends.
    pub async fn follow(self, vm: Vm, agent: Agent) {
        let Some(netns) = &self.netns else { return };
        let opened = blocking(netns, NetworkWatch::open).await;
        let watch = opened.and_then(|opened| Ok(NetworkWatch::new(opened)?));
        let watch = match watch {
            Ok(watch) => watch,
            Err(error) => return tracing::warn!("late interfaces: {}", chain(&error)),
        };
        tokio::select! {
            () = self.follow_changes(&watch, &vm, &agent) => {}
            _ = vm.ended() => {}
        }
    }

    async fn follow_changes(&self, watch: &NetworkWatch, vm: &Vm, agent: &Agent) {
        let [first, longest] = AGAIN;
        let mut pause = first;
        loop {
            // The first time, what came before there was a watch.
            let untaken = self.catch_up(vm, agent).await;
            let is_late = untaken.iter().any(|one| one.is_passing);
            for Untaken { error, .. } in untaken {
                tracing::warn!("late interfaces: {}", chain(&error));
            }
            let heard = if is_late {
                // However much is said meanwhile.
                sleep(first).await;
                let heard = timeout(pause - first, watch.changed()).await;
                pause = (pause * 2).min(longest);
                heard.unwrap_or(Ok(()))
            } else {
                pause = first;
                watch.changed().await
            };
            if let Err(error) = heard {
                return tracing::warn!(%error, "late interfaces");
            }
            sleep(SETTLED).await;
        }
    }
}

impl Untaken {
    fn for_now(error: Error) -> Self {
        Self {
            error,
            is_passing: true,
            is_missed: false,
        }
    }
}

fn of_vmm(vmm: Process) -> Option<Netns> {
    let path = format!("/proc/{}/ns/net", vmm.pid);
    match Netns::open(Path::new(&path)) {
        // The number was its own then.
        Ok(netns) => vmm.is_alive().then_some(netns),
        Err(NetworkError::OfNode) => None,
        Err(error) => {
            tracing::debug!("late interfaces: {}", chain(&error));
            None
        }
    }
}

/// Plugs what is new.
async fn plug(known: &mut Known, netns: &Netns, found: &FoundNetwork, vm: &Vm) -> Vec<Untaken> {
    let links = known.new_ones(found);
    if links.is_empty() {
        return Vec::new();
    }
    let taken = links.clone();
    let nics = blocking(netns, move |netns| Nic::take_over(netns, &taken)).await;
    let nics = match nics {
        Ok(nics) => nics,
        Err(error) => return vec![Untaken::for_now(error)],
    };
    let mut untaken = Vec::new();
    for (link, nic) in links.into_iter().zip(nics) {
        let plugged = match nic {
            Ok(nic) => plug_one(known, netns, nic, vm).await,
            Err(error) => Err(error.into()),
        };
        let Err(error) = plugged else { continue };
        tracing::warn!(name = link.id.name, mac = %link.mac, "an interface is left out");
        let is_passing = !is_for_good(&error);
        if !is_passing {
            known.refused.push(link);
        }
        untaken.push(Untaken {
            error,
            is_passing,
            is_missed: false,
        });
    }
    // It may do without one more, but not without any.
    for one in &mut untaken {
        one.is_missed = known.nics.is_empty();
    }
    untaken
}

async fn plug_one(known: &mut Known, netns: &Netns, nic: Nic, vm: &Vm) -> Result<(), Error> {
    tracing::info!(name = nic.link.name, mac = %nic.mac, mtu = nic.mtu, "late interface");
    let (link, tap) = (nic.link.clone(), nic.tap_index);
    let plugged = Plugged::from(&nic);
    let Err(error) = vm.add_nic(nic).await else {
        known.fresh.insert(link.name.clone());
        known.nics.insert(link, plugged);
        known.is_unseen = true;
        return Ok(());
    };
    let given = blocking(netns, move |netns| Nic::give_back(netns, &link, tap)).await;
    if let Err(error) = given {
        tracing::warn!("late interfaces: {}", chain(&error));
    }
    Err(error.into())
}

/// The machine cannot have the interface as it is.
fn is_for_good(error: &Error) -> bool {
    matches!(
        error,
        Error::Vm(VmError::Refused { .. }) | Error::Network(NetworkError::Mtu { .. })
    )
}

/// Tells the guest what is new.
async fn tell(known: &mut Known, found: FoundNetwork, agent: &Agent, untaken: &mut Vec<Untaken>) {
    if known.is_unseen {
        if let Err(error) = agent.rescan_devices().await {
            untaken.push(Untaken {
                is_missed: !known.fresh.is_empty(),
                ..Untaken::for_now(error.into())
            });
            return;
        }
        known.is_unseen = false;
    }
    let FoundNetwork {
        links,
        all,
        mut guest,
        ..
    } = found;
    let is_missing = |link: &&FoundLink| !known.nics.contains_key(&link.id);
    for link in links.iter().filter(is_missing) {
        forget(&mut guest, &link.id.name);
    }
    // One at a time: what is wrong with one is no reason to do without another.
    for interface in news(&known.told, &guest).interfaces {
        let name = interface.name.clone();
        let network = Network {
            interfaces: vec![interface],
            ..Network::default()
        };
        let Err(error) = agent.update_network(network).await else {
            known.fresh.remove(&name);
            continue;
        };
        let is_answer = is_answer(&error);
        untaken.push(Untaken {
            is_missed: known.fresh.contains(&name),
            ..Untaken::for_now(error.into())
        });
        if !is_answer {
            return;
        }
        // It will be told again.
        forget(&mut guest, &name);
    }
    let rest = Network {
        interfaces: Vec::new(),
        ..news(&known.told, &guest)
    };
    if rest != Network::default() {
        match agent.update_network(rest).await {
            Ok(()) => {}
            // A route that the guest cannot take is no reason to do without the rest.
            Err(error) if is_answer(&error) => tracing::warn!(%error, "network"),
            Err(error) => return untaken.push(Untaken::for_now(error.into())),
        }
    }
    let told = std::mem::replace(&mut known.told, guest);
    keep_down(&mut known.told, told, &all);
}

/// Asked again, the agent would say the same.
fn is_answer(error: &AgentError) -> bool {
    !matches!(error, AgentError::Deadline { .. } | AgentError::Gone)
}

async fn blocking<T: Send + 'static>(
    netns: &Netns,
    work: impl FnOnce(&Netns) -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, Error> {
    let netns = netns.clone();
    let done = crate::blocking::run(move || work(&netns)).await;
    Ok(done.map_err(Error::Thread)??)
}
