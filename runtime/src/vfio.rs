//! PCI devices of the node that a pod has: whole groups, as the node's IOMMU cannot
//! tell the devices of one apart (Linux's Documentation/driver-api/vfio.rst).

mod group;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use husk_vmm_spec::{DeviceId, PCI_SLOTS};
use tokio::sync::OnceCell;
use ttrpc::Code;

use crate::agent_client::Agent;
use crate::error::Error;
use crate::vm_process::{Vm, VmError};
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
    occupied: Arc<Mutex<Occupied>>,
    /// Held by who takes them from the machine.
    unplugging: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Groups {
    used: BTreeMap<u32, Weak<Group>>,
    /// How many were opened so far.
    opened: u64,
}

/// What the machine may have: of groups in use, and of others that are left in it.
#[derive(Debug, Default)]
struct Occupied {
    slots: BTreeSet<u8>,
    unused: Vec<(DeviceId, Vec<u8>)>,
}

/// A container's use of a group, until it is dropped. What the last one leaves has to
/// be taken from the machine ([`PodGroups::unplug_unused`]).
#[derive(Debug)]
pub struct GroupUse(Arc<Group>);

#[derive(Debug)]
struct Group {
    id: DeviceId,
    /// One for each of its functions, of the machine's bus.
    slots: Vec<u8>,
    /// Until the machine has it.
    open: Mutex<Option<OpenGroup>>,
    plugged: OnceCell<()>,
    occupied: Arc<Mutex<Occupied>>,
}

impl Drop for Group {
    fn drop(&mut self) {
        let open = self.open.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut occupied = locked(&self.occupied);
        match open {
            Some(_) => occupied.free(&self.slots),
            // The machine was told.
            None => occupied.unused.push((
                std::mem::take(&mut self.id),
                std::mem::take(&mut self.slots),
            )),
        }
    }
}

fn locked(occupied: &Mutex<Occupied>) -> MutexGuard<'_, Occupied> {
    occupied.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PodGroups {
    /// None yet; `allowed`: the node's configuration lets pods have some.
    pub fn new(allowed: bool) -> Self {
        Self {
            allowed,
            shared: Mutex::default(),
            occupied: Arc::default(),
            unplugging: tokio::sync::Mutex::default(),
        }
    }

    /// The group of this number, opened unless a container of the pod has it. Blocks.
    ///
    /// # Errors
    /// Pods of this node get none, or not this one.
    pub fn share(&self, number: u32) -> Result<GroupUse, VfioError> {
        if !self.allowed {
            return Err(VfioError::Off(number));
        }
        let mut groups = self.lock();
        if let Some(group) = groups.used.get(&number).and_then(Weak::upgrade) {
            return Ok(GroupUse(group));
        }
        let open = OpenGroup::open(number);
        let open = open.map_err(|source| VfioError::Group { number, source })?;
        groups.add(number, open, &self.occupied).map(GroupUse)
    }

    /// Takes from the machine what nobody uses any more.
    pub async fn unplug_unused(&self, vm: &Vm, agent: &Agent) {
        // What somebody else is taking shall be gone as well when this returns.
        let _turn = self.unplugging.lock().await;
        let groups = locked(&self.occupied).unused.clone();
        let mut gone = Vec::new();
        for (id, slots) in &groups {
            for slot in slots {
                if let Err(error) = agent.remove_pci(*slot).await {
                    tracing::warn!(id, slot, %error, "PCI device");
                }
            }
            match vm.remove_vfio(id.clone()).await {
                // It has none of this name: it could not plug it.
                Ok(()) | Err(VmError::Refused { .. }) => gone.push(id),
                // A machine that cannot is about to end, or is asked again when the
                // next container goes.
                Err(error) => tracing::warn!(id, %error, "PCI device"),
            }
        }
        let mut occupied = locked(&self.occupied);
        // Not before: their slots are free from here on.
        occupied.unused.retain(|(id, _)| !gone.contains(&id));
        for (_, slots) in groups.iter().filter(|(id, _)| gone.contains(&id)) {
            occupied.free(slots);
        }
    }

    /// The machine has one, as far as is known.
    pub fn may_be_plugged(&self) -> bool {
        !locked(&self.occupied).slots.is_empty()
    }

    /// Has one left in the machine that nobody uses any more.
    #[cfg(test)]
    pub fn pretend_left(&self, number: u32) {
        let added = self
            .lock()
            .add(number, OpenGroup::pretended(1), &self.occupied);
        added.unwrap().open.lock().unwrap().take();
    }

    fn lock(&self) -> MutexGuard<'_, Groups> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Groups {
    /// One that was just opened.
    fn add(
        &mut self,
        number: u32,
        open: OpenGroup,
        occupied: &Arc<Mutex<Occupied>>,
    ) -> Result<Arc<Group>, VfioError> {
        let slots = locked(occupied).take(open.functions());
        let slots = slots.ok_or(VfioError::NoRoom(number))?;
        self.opened += 1;
        let group = Arc::new(Group {
            // Its own: what is left of an earlier one goes by another name.
            id: format!("vfio-{number}.{}", self.opened),
            slots,
            open: Mutex::new(Some(open)),
            plugged: OnceCell::new(),
            occupied: Arc::clone(occupied),
        });
        self.used.retain(|_, group| group.strong_count() > 0);
        self.used.insert(number, Arc::downgrade(&group));
        Ok(group)
    }
}

impl Occupied {
    /// The last `count` slots of the bus that no group has; disks and interfaces take
    /// the first ones.
    fn take(&mut self, count: usize) -> Option<Vec<u8>> {
        // PCI_SLOTS fits.
        const LAST: u8 = PCI_SLOTS as u8;
        let is_free = |slot: &u8| !self.slots.contains(slot);
        let free: Vec<u8> = (1..LAST).rev().filter(is_free).take(count).collect();
        if free.len() < count {
            return None;
        }
        self.slots.extend(&free);
        Some(free)
    }

    fn free(&mut self, slots: &[u8]) {
        self.slots.retain(|slot| !slots.contains(slot));
    }
}

impl GroupUse {
    /// Where the guest finds its functions.
    pub fn slots(&self) -> &[u8] {
        &self.0.slots
    }

    /// Plugs it into a running machine, unless another container's use has.
    ///
    /// # Errors
    /// The machine or its guest could not.
    pub async fn plug(&self, vm: &Vm, agent: &Agent) -> Result<(), Error> {
        let plug = || async {
            let open = {
                let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
                open.take()
            };
            // One that was taken and not plugged cannot be had again in this pod's
            // container: the next container opens it anew.
            let open = open.ok_or(Error::Argument("a PCI device that could not be plugged"))?;
            let (container, group, devices): (OwnedFd, OwnedFd, Vec<OwnedFd>) = open.into_parts();
            let functions = devices.into_iter().zip(self.0.slots.iter().copied());
            let id = self.0.id.clone();
            vm.add_vfio(id, container, group, functions.collect())
                .await?;
            agent.rescan_devices().await?;
            Ok::<_, Error>(())
        };
        self.0.plugged.get_or_try_init(plug).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use husk_vmm_spec::Request;

    fn open(functions: usize) -> OpenGroup {
        OpenGroup::pretended(functions)
    }

    #[test]
    fn a_node_that_gives_none_says_so() {
        let error = PodGroups::new(false).share(7).unwrap_err();
        assert!(error.to_string().starts_with("/dev/vfio/7: "), "{error}");
        assert_eq!(error.code(), Code::FAILED_PRECONDITION);
    }

    #[test]
    fn slots_are_taken_from_the_last_and_given_back_when_they_are_unplugged() {
        let pod = PodGroups::new(true);
        let add = |number, functions| {
            let added = pod.lock().add(number, open(functions), &pod.occupied);
            added.map(|group| (group.slots.clone(), GroupUse(group)))
        };
        let (slots, first) = add(1, 2).unwrap();
        assert_eq!(slots, [31, 30]);
        // One that the machine was never told of.
        let (slots, second) = add(2, 1).unwrap();
        assert_eq!(slots, [29]);
        drop(second);
        first.0.open.lock().unwrap().take();
        drop(first);
        // The machine still has it.
        let (slots, _third) = add(1, 1).unwrap();
        assert_eq!(slots, [29]);
        let unused = std::mem::take(&mut locked(&pod.occupied).unused);
        assert_eq!(unused, [("vfio-1.1".into(), vec![31, 30])]);
        locked(&pod.occupied).free(&[31, 30]);
        assert_eq!(add(3, 1).unwrap().0, [31]);
        assert!(matches!(add(4, 31), Err(VfioError::NoRoom(4))));
    }

    /// The machine of another container, which has opened the same group since, keeps
    /// it.
    #[tokio::test]
    async fn what_could_not_be_plugged_takes_nobody_elses_device_away() {
        let pod = PodGroups::new(true);
        let add = || GroupUse(pod.lock().add(7, open(1), &pod.occupied).unwrap());
        let (vm, mut asked) = Vm::pretended(|request| match request {
            Request::AddVfio(spec) => match spec.id.ends_with(".1") {
                true => Err("no memory can be pinned".to_owned()),
                false => Ok(()),
            },
            Request::RemoveDevice(_) => Err("there is no such device".to_owned()),
            _ => Ok(()),
        });
        let (near, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let agent = Agent::new(near, Config::default().patience()).unwrap();
        let (first, second) = (add(), add());
        assert!(first.plug(&vm, &agent).await.is_err());
        drop(first);
        // The agent, which is not there, has not looked for it; the machine has it.
        assert!(second.plug(&vm, &agent).await.is_err());
        pod.unplug_unused(&vm, &agent).await;
        let mut named = Vec::new();
        while let Ok(request) = asked.try_recv() {
            named.push(match request {
                Request::AddVfio(spec) => ("add", spec.id),
                Request::RemoveDevice(id) => ("remove", id),
                other => panic!("{other:?}"),
            });
        }
        let expected = [
            ("add", "vfio-7.1"),
            ("add", "vfio-7.2"),
            ("remove", "vfio-7.1"),
        ];
        assert_eq!(named, expected.map(|(what, id)| (what, id.to_owned())));
        // Nor is what is not there asked for again.
        assert!(locked(&pod.occupied).unused.is_empty());
        assert_eq!(locked(&pod.occupied).slots, [30].into());
    }
}
