//! What a container sees of the node's files: its root and its volumes, on their
//! way into the guest.

use std::sync::Arc;

use husk_protocol::agent::{DeviceNumber, Storage};
use husk_protocol::limit;

use crate::agent_client::Agent;
use crate::blocking;
use crate::bundle::Bundle;
use crate::device::Devices;
use crate::disk::{DiskUse, PodDisks};
use crate::error::Error;
use crate::id::Id;
use crate::mirror::MirrorUse;
use crate::rootfs::{self, RootfsPlan, layers};
use crate::shared_tree::{ContainerTree, SharedTree};
use crate::vfio::{GroupUse, PodGroups};
use crate::vm_plan::Disk;
use crate::vm_process::Vm;
use crate::volume;

/// The files of one container. What is mounted for it goes when this is dropped.
#[derive(Debug)]
pub struct ContainerFiles {
    tree: ContainerTree,
    disks: Vec<DiskUse>,
    mirrors: Vec<MirrorUse>,
    groups: Vec<GroupUse>,
    pod_disks: Arc<PodDisks>,
    pod_groups: Arc<PodGroups>,
}

/// Files that could not all be had.
#[derive(Debug)]
pub struct Unprepared {
    /// Why not.
    pub error: Error,
    /// Those that could. Others may have shared them, and gone meanwhile: then
    /// the guest has to give them up like those of a container that was there.
    pub files: Option<ContainerFiles>,
}

/// What the agent and the machine are told about them.
#[derive(Debug)]
pub struct GuestFiles {
    /// The spec, with the guest's paths.
    pub oci_spec: Vec<u8>,
    /// What the agent mounts.
    pub storages: Vec<Storage>,
    /// What the numbers of devices in the spec stand for.
    pub devices: Vec<DeviceNumber>,
    /// The container gets all devices of the guest.
    pub all_devices: bool,
    /// Where the guest finds PCI devices of the node.
    pub pci_slots: Vec<u8>,
}

/// What the files are made from.
#[derive(Debug)]
pub struct FilesRequest {
    /// The container.
    pub id: Id,
    /// Its bundle.
    pub bundle: Bundle,
    /// Its root.
    pub rootfs: RootfsPlan,
    /// The pod's shared tree.
    pub tree: SharedTree,
    /// The pod's disks.
    pub disks: Arc<PodDisks>,
    /// Its PCI devices of the node.
    pub groups: Arc<PodGroups>,
    /// The pod's own files about names are mounted in it.
    pub pod_binds: bool,
}

impl FilesRequest {
    /// Mounts and opens what is needed.
    ///
    /// # Errors
    /// A source is not there, or the kernel refuses.
    pub async fn prepare(self) -> Result<(ContainerFiles, GuestFiles), Box<Unprepared>> {
        // mount(2) may wait for a disk.
        let prepared = blocking::run(move || self.prepare_blocking()).await;
        let (error, files) = match prepared {
            Ok(Ok((files, Ok(guest)))) => return Ok((files, guest)),
            Ok(Ok((files, Err(error)))) => (error, Some(files)),
            Ok(Err(error)) => (error, None),
            Err(error) => (Error::Thread(error), None),
        };
        Err(Box::new(Unprepared { error, files }))
    }

    fn prepare_blocking(self) -> Result<(ContainerFiles, Result<GuestFiles, Error>), Error> {
        let mut files = ContainerFiles {
            tree: ContainerTree::create(&self.tree, &self.id)?,
            disks: Vec::new(),
            mirrors: Vec::new(),
            groups: Vec::new(),
            pod_disks: Arc::clone(&self.disks),
            pod_groups: Arc::clone(&self.groups),
        };
        let guest = self.fill(&mut files);
        Ok((files, guest))
    }

    fn fill(mut self, files: &mut ContainerFiles) -> Result<GuestFiles, Error> {
        let tree = &mut files.tree;
        let mut storages = Vec::new();
        let root = match &self.rootfs {
            RootfsPlan::Tree(mounts) => {
                let layered = layers::mount(tree, mounts, &self.disks, &self.id)?;
                match layered {
                    Some(layered) => {
                        storages.extend(layered.storages);
                        files.disks.extend(layered.disks);
                        layered.root
                    }
                    None => rootfs::mount_tree(tree, mounts)?,
                }
            }
            RootfsPlan::Disk(mount) => {
                let disk = self.disks.add(mount.open()?, mount.read_only());
                let (storage, root) = mount.storage(disk.serial(), &self.id);
                storages.push(storage);
                files.disks.push(disk);
                root
            }
        };
        let mut devices = Devices::open(&self.id, &self.bundle, &self.disks, &self.groups)?;
        let pod_uid = self.bundle.pod_uid();
        let mounts = self.bundle.mounts();
        let mirrors = &mut files.mirrors;
        let sources =
            volume::mount_volumes(tree, &mut devices, mirrors, mounts, pod_uid.as_deref())?;
        let (mut devices, disks, groups) = devices.finish();
        files.disks.extend(disks);
        files.groups.extend(groups);
        // The guest looks for each, which most containers need not wait for.
        if self.bundle.limits_io() {
            let below = files.disks.iter().flat_map(DiskUse::stands_on);
            add_below(&mut devices.numbers, below);
        }
        storages.extend(devices.storages);
        let binds = if self.pod_binds {
            volume::pod_binds(self.bundle.mounts())
        } else {
            Vec::new()
        };
        self.bundle.keep_devices(&devices.asked);
        Ok(GuestFiles {
            oci_spec: self.bundle.guest_spec(&root, &sources, &binds),
            storages,
            devices: devices.numbers,
            all_devices: devices.all,
            pci_slots: devices.pci_slots,
        })
    }
}

/// As many of those that disks stand on as the agent takes: what is said of I/O to the
/// rest does not hold, but without devices of its own the container could not be.
fn add_below(devices: &mut Vec<DeviceNumber>, below: impl Iterator<Item = DeviceNumber>) {
    let room = limit::DEVICES.saturating_sub(devices.len());
    devices.extend(below.take(room));
}

impl ContainerFiles {
    /// Gives them up; the guest's paths that nobody uses any more. The guest has
    /// to let go of those before [`ContainerFiles::detach`].
    pub fn give_up(&mut self) -> Vec<String> {
        self.tree.give_up()
    }

    /// The disks that a machine for them boots with.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn boot_disks(&self) -> Result<Vec<Disk>, Error> {
        let disks = self.disks.iter().map(DiskUse::for_boot);
        disks.collect::<Result<_, _>>().map_err(Error::Disk)
    }

    /// Hands a running machine what it does not have yet: plugs disks and PCI
    /// devices, and gives the guest its copies of what it has copies of.
    ///
    /// # Errors
    /// The machine or its guest could not.
    pub async fn hand_over(&self, vm: &Vm, agent: &Agent) -> Result<(), Error> {
        for disk in &self.disks {
            disk.plug(vm, agent).await?;
        }
        for group in &self.groups {
            group.plug(vm, agent).await?;
        }
        for mirror in &self.mirrors {
            mirror.fill(agent).await?;
        }
        Ok(())
    }

    /// Takes them from the guest, which has deleted the container.
    pub async fn detach(self, machine: Option<(&Vm, &Agent)>) {
        let Self {
            tree,
            disks,
            mirrors,
            groups,
            pod_disks,
            pod_groups,
        } = self;
        drop((disks, mirrors, groups));
        if let Some((vm, agent)) = machine {
            pod_disks.unplug_unused(vm, agent).await;
            // Whether or not it had some: it may have been the last to let go of one that
            // it never came to have.
            pod_groups.unplug_unused(vm, agent).await;
            tree.tree().mirrors().remove_unused(agent).await;
        }
        // umount(2) may wait for a disk.
        blocking::discard(tree).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use husk_vmm_spec::Request;

    #[tokio::test]
    async fn what_is_left_of_another_container_is_unplugged() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, mut asked) = Vm::pretended(|_| Ok(()));
        let (near, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let agent = Agent::new(near, Config::default().patience()).unwrap();
        let pod_groups = Arc::new(PodGroups::new(true));
        let files = ContainerFiles {
            tree: ContainerTree::create(
                &SharedTree::pretended(dir.path()),
                &Id::new("container", "c").unwrap(),
            )
            .unwrap(),
            disks: Vec::new(),
            mirrors: Vec::new(),
            groups: Vec::new(),
            pod_disks: Arc::default(),
            pod_groups: Arc::clone(&pod_groups),
        };
        // The other one is gone; this one was about to share it.
        pod_groups.pretend_left(7);
        files.detach(Some((&vm, &agent))).await;
        let gone = Request::RemoveDevice("vfio-7.1".into());
        assert_eq!(asked.try_recv().unwrap(), gone);
    }

    #[test]
    fn a_container_has_no_more_devices_than_the_agent_takes() {
        let number = |major| DeviceNumber {
            major,
            ..DeviceNumber::default()
        };
        let mut devices = vec![number(1); 250];
        add_below(&mut devices, (0..17).map(|_| number(2)));
        assert_eq!(devices.len(), 256);
        assert_eq!(devices[249..251], [number(1), number(2)]);
    }
}
