//! Interfaces that come after the machine. Docker makes a container, puts
//! interfaces into the network namespace of the pid that it was told, and then
//! starts it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::Mutex;

use crate::agent_client::Agent;
use crate::error::Error;
use crate::network::{NetnsId, PodNetwork};
use crate::process::Process;
use crate::vm_process::Vm;

/// The interfaces of a pod's network namespace.
#[derive(Clone, Debug)]
pub struct Interfaces {
    netns: PathBuf,
    /// Those that the machine has; whoever holds it is changing that.
    known: Arc<Mutex<BTreeSet<String>>>,
}

impl Interfaces {
    /// Of the namespace that the machine took over; of none, of the VMM's own,
    /// where whoever asks for the pod's pid comes to.
    pub fn new(netns: Option<&Path>, vmm: Process, known: BTreeSet<String>) -> Self {
        let own = || PathBuf::from(format!("/proc/{}/ns/net", vmm.pid));
        Self {
            netns: netns.map_or_else(own, Path::to_owned),
            known: Arc::new(Mutex::new(known)),
        }
    }

    /// Plugs those that have come since.
    ///
    /// # Errors
    /// The VMM or the agent could not.
    pub async fn catch_up(&self, vm: &Vm, agent: &Agent) -> Result<(), Error> {
        // Never the node's own.
        if NetnsId::of(&self.netns) == NetnsId::of(Path::new("/proc/self/ns/net")) {
            return Ok(());
        }
        let mut known = self.known.lock().await;
        let (netns, names) = (self.netns.clone(), known.clone());
        let found = tokio::task::spawn_blocking(move || PodNetwork::attach_new(&netns, &names));
        let PodNetwork { nics, mut guest } = match found.await {
            Ok(Ok(network)) => network,
            // The machine keeps what it has.
            Ok(Err(error)) => {
                tracing::warn!("late interfaces: {}", crate::error::chain(&error));
                return Ok(());
            }
            Err(_) => return Err(Error::ShuttingDown),
        };
        if nics.is_empty() {
            return Ok(());
        }
        let mut late = BTreeSet::new();
        for nic in nics {
            tracing::info!(name = nic.name, mac = %nic.mac, mtu = nic.mtu, "late interface");
            let name = nic.name.clone();
            vm.add_nic(nic).await?;
            known.insert(name.clone());
            late.insert(name);
        }
        agent.rescan_devices().await?;
        // What the pod itself has changed of the others stays so.
        guest
            .interfaces
            .retain(|interface| late.contains(&interface.name));
        Ok(agent.update_network(guest).await?)
    }
}
