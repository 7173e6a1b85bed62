//! PCI devices of the node that a pod has: whole groups, as the node's IOMMU cannot
//! tell the devices of one apart (Linux's Documentation/driver-api/vfio.rst).

mod group;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use husk_vmm_spec::{DeviceId, PCI_SLOTS};
use tokio::sync::OnceCell;
use ttrpc::Code;

use crate::agent_client::Agent;
use crate::error::Error;
use crate::vm_process::Vm;
use group::OpenGroup;
pub use group::{GroupError, number};

/// A group that a container cannot have.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// The operator has not said so.
    #[error(
        "/dev/vfio/{0}: pods get no PCI devices of this node: `vfio` is false in its configuration"
    )]
    Off(u32),
    /// All slots are taken.
    #[error("/dev/vfio/{0}: the pod's machine has no room for more PCI devices")]
    NoRoom(u32),
    /// The node cannot give it.
    #[error("/dev/vfio/{number}")]
    Group {
        /// Which.
        number: u32,
        /// Why not.
        #[source]
        source: GroupError,
    },
}

impl VfioError {
    /// What containerd is told.
    pub fn code(&self) -> Code {
        match self {
            Self::Off(_) | Self::NoRoom(_) => Code::FAILED_PRECONDITION,
            Self::Group { source, .. } => source.code(),
        }
    }
}

/// The groups of a pod.
#[derive(Debug)]
pub struct PodGroups {
    allowed: bool,
    shared: Mutex<Groups>,
    /// Each group has one.
    unused: Arc<Unused>,
    /// Held by who takes them from the machine.
    unplugging: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Groups {
    used: BTreeMap<u32, Weak<Group>>,
}

/// What the machine has and nobody uses any more.
type Unused = Mutex<Vec<(DeviceId, Vec<u8>)>>;

/// A container's use of a group, until it is dropped. What the last one leaves has to
/// be taken from the machine ([`PodGroups::unplug_unused`]).
#[derive(Debug)]
pub struct GroupUse {
    group: Arc<Group>,
    pod: Arc<PodGroups>,
}

#[derive(Debug)]
struct Group {
    id: DeviceId,
    /// One for each of its functions, of the machine's bus.
    slots: Vec<u8>,
    /// Until the machine has it.
    open: Mutex<Option<OpenGroup>>,
    plugged: OnceCell<()>,
    unused: Arc<Unused>,
}

impl Drop for Group {
    fn drop(&mut self) {
        let open = self.open.get_mut().unwrap_or_else(PoisonError::into_inner);
        if open.is_none() {
            let mut unused = self.unused.lock().unwrap_or_else(PoisonError::into_inner);
            unused.push((
                std::mem::take(&mut self.id),
                std::mem::take(&mut self.slots),
            ));
        }
    }
}

impl PodGroups {
    /// None yet; `allowed`: the node's configuration lets pods have some.
    pub fn new(allowed: bool) -> Self {
        Self {
            allowed,
            shared: Mutex::default(),
            unused: Arc::default(),
            unplugging: tokio::sync::Mutex::default(),
        }
    }

    /// The group of this number, opened unless a container of the pod has it. Blocks.
    ///
    /// # Errors
    /// Pods of this node get none, or not this one.
    pub fn share(self: &Arc<Self>, number: u32) -> Result<GroupUse, VfioError> {
        if !self.allowed {
            return Err(VfioError::Off(number));
        }
        let mut groups = self.lock();
        if let Some(group) = groups.used.get(&number).and_then(Weak::upgrade) {
            return Ok(self.user(group));
        }
        let open = OpenGroup::open(number);
        let open = open.map_err(|source| VfioError::Group { number, source })?;
        groups.used.retain(|_, group| group.strong_count() > 0);
        let slots = groups.free_slots(open.functions(), &self.unused);
        let group = Arc::new(Group {
            id: format!("vfio-{number}"),
            slots: slots.ok_or(VfioError::NoRoom(number))?,
            open: Mutex::new(Some(open)),
            plugged: OnceCell::new(),
            unused: Arc::clone(&self.unused),
        });
        groups.used.insert(number, Arc::downgrade(&group));
        Ok(self.user(group))
    }

    fn user(self: &Arc<Self>, group: Arc<Group>) -> GroupUse {
        GroupUse {
            group,
            pod: Arc::clone(self),
        }
    }

    /// Takes from the machine what nobody uses any more.
    pub async fn unplug_unused(&self, vm: &Vm, agent: &Agent) {
        // What somebody else is taking shall be gone as well when this returns.
        let _turn = self.unplugging.lock().await;
        let unused = || self.unused.lock().unwrap_or_else(PoisonError::into_inner);
        let mut groups = unused().clone();
        let mut taken = Vec::new();
        for (id, slots) in &groups {
            for slot in slots {
                if let Err(error) = agent.remove_pci(*slot).await {
                    tracing::warn!(id, slot, %error, "PCI device");
                }
            }
            // A machine that cannot is about to end, or is asked again when the next
            // container goes.
            match vm.remove_vfio(id.clone()).await {
                Ok(()) => taken.push(id.clone()),
                Err(error) => tracing::warn!(id, %error, "PCI device"),
            }
        }
        groups.retain(|(id, _)| taken.contains(id));
        // Not before: their slots are free from here on.
        unused().retain(|group| !groups.contains(group));
    }

    fn lock(&self) -> MutexGuard<'_, Groups> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Groups {
    /// The last `count` slots of the bus that no group has; disks and interfaces take
    /// the first ones.
    fn free_slots(&self, count: usize, unused: &Unused) -> Option<Vec<u8>> {
        // PCI_SLOTS fits.
        const LAST: u8 = PCI_SLOTS as u8;
        // Before the lock, and so given up behind it: the last use of a group takes the
        // lock when it goes.
        let used: Vec<_> = self.used.values().filter_map(Weak::upgrade).collect();
        let unused = unused.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = |slot: &u8| {
            !used.iter().any(|group| group.slots.contains(slot))
                && !unused.iter().any(|(_, slots)| slots.contains(slot))
        };
        let free: Vec<u8> = (1..LAST).rev().filter(is_free).take(count).collect();
        (free.len() == count).then_some(free)
    }
}

impl GroupUse {
    /// Where the guest finds its functions.
    pub fn slots(&self) -> &[u8] {
        &self.group.slots
    }

    /// All groups of its pod.
    pub fn pod(&self) -> Arc<PodGroups> {
        Arc::clone(&self.pod)
    }

    /// Plugs it into a running machine, unless another container's use has.
    ///
    /// # Errors
    /// The machine or its guest could not.
    pub async fn plug(&self, vm: &Vm, agent: &Agent) -> Result<(), Error> {
        let plug = || async {
            let open = {
                let mut open = self
                    .group
                    .open
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                open.take()
            };
            // One that was taken and not plugged cannot be had again in this pod's
            // container: the next container opens it anew.
            let open = open.ok_or(Error::Argument("a PCI device that could not be plugged"))?;
            let (container, group, devices): (OwnedFd, OwnedFd, Vec<OwnedFd>) = open.into_parts();
            let functions = devices.into_iter().zip(self.group.slots.iter().copied());
            let id = self.group.id.clone();
            vm.add_vfio(id, container, group, functions.collect())
                .await?;
            agent.rescan_devices().await?;
            Ok::<_, Error>(())
        };
        self.group.plugged.get_or_try_init(plug).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(slots: &[u8], unused: &Arc<Unused>) -> Arc<Group> {
        Arc::new(Group {
            id: "vfio-1".into(),
            slots: slots.to_vec(),
            open: Mutex::default(),
            plugged: OnceCell::new(),
            unused: Arc::clone(unused),
        })
    }

    #[test]
    fn a_node_that_gives_none_says_so() {
        let error = Arc::new(PodGroups::new(false)).share(7).unwrap_err();
        assert!(error.to_string().starts_with("/dev/vfio/7: "), "{error}");
        assert_eq!(error.code(), Code::FAILED_PRECONDITION);
    }

    #[test]
    fn slots_are_taken_from_the_last_and_given_back_when_they_are_unplugged() {
        let unused = Arc::new(Unused::default());
        let mut groups = Groups::default();
        assert_eq!(groups.free_slots(2, &unused), Some(vec![31, 30]));
        let first = group(&[31, 30], &unused);
        groups.used.insert(1, Arc::downgrade(&first));
        assert_eq!(groups.free_slots(1, &unused), Some(vec![29]));
        drop(first);
        // The machine still has it.
        assert_eq!(groups.free_slots(1, &unused), Some(vec![29]));
        assert_eq!(
            unused.lock().unwrap()[..],
            [("vfio-1".into(), vec![31, 30])]
        );
        unused.lock().unwrap().clear();
        assert_eq!(groups.free_slots(1, &unused), Some(vec![31]));
        assert_eq!(groups.free_slots(32, &unused), None);
    }
}
