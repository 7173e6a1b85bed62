//! What a container sees of the node's files: its root and its volumes, on their
//! way into the guest.

use husk_protocol::agent::Storage;

use crate::agent_client::Agent;
use crate::bundle::Bundle;
use crate::error::Error;
use crate::id::Id;
use crate::rootfs::{self, RootfsPlan};
use crate::shared_tree::{ContainerTree, SharedTree};
use crate::vm_plan::Disk;
use crate::vm_process::Vm;
use crate::volume;

/// The files of one container. What is mounted for it goes when this is dropped.
#[derive(Debug)]
pub struct ContainerFiles {
    tree: ContainerTree,
    disk: Option<String>,
}

/// What the agent and the machine are told about them.
#[derive(Debug)]
pub struct GuestFiles {
    /// The spec, with the guest's paths.
    pub oci_spec: Vec<u8>,
    /// What the agent mounts.
    pub storages: Vec<Storage>,
    /// What the machine needs plugged.
    pub disk: Option<Disk>,
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
    /// Serial of its disk, should it get one.
    pub serial: String,
    /// The pod's own files about names are mounted in it.
    pub pod_binds: bool,
}

impl FilesRequest {
    /// Mounts and opens what is needed.
    ///
    /// # Errors
    /// A source is not there, or the kernel refuses; nothing stays.
    pub async fn prepare(self) -> Result<(ContainerFiles, GuestFiles), Error> {
        // mount(2) may wait for a disk.
        tokio::task::spawn_blocking(move || self.prepare_blocking())
            .await
            .unwrap_or(Err(Error::ShuttingDown))
    }

    fn prepare_blocking(self) -> Result<(ContainerFiles, GuestFiles), Error> {
        let mut tree = ContainerTree::create(&self.tree, &self.id)?;
        let mut storages = Vec::new();
        let (root, disk) = match &self.rootfs {
            RootfsPlan::Tree(mounts) => (rootfs::mount_tree(&mut tree, mounts)?, None),
            RootfsPlan::Disk(mount) => {
                let disk = Disk {
                    file: mount.open()?,
                    read_only: mount.read_only(),
                    serial: self.serial,
                };
                let (storage, root) = mount.storage(&disk.serial, &self.id);
                storages.push(storage);
                (root, Some(disk))
            }
        };
        let pod_uid = self.bundle.pod_uid();
        let sources = volume::mount_volumes(&mut tree, self.bundle.mounts(), pod_uid.as_deref())?;
        let binds = if self.pod_binds {
            volume::pod_binds(self.bundle.mounts())
        } else {
            Vec::new()
        };
        let files = ContainerFiles {
            tree,
            disk: disk.as_ref().map(|disk| disk.serial.clone()),
        };
        let guest = GuestFiles {
            oci_spec: self.bundle.guest_spec(&root, &sources, &binds),
            storages,
            disk,
        };
        Ok((files, guest))
    }
}

impl ContainerFiles {
    /// Gives them up; the guest's paths that nobody uses any more. The guest has
    /// to let go of those before [`ContainerFiles::detach`].
    pub fn give_up(&mut self) -> Vec<String> {
        self.tree.give_up()
    }

    /// Takes them from the guest, which has deleted the container.
    pub async fn detach(self, machine: Option<(&Vm, &Agent)>) {
        if let (Some(serial), Some((vm, agent))) = (self.disk, machine) {
            // A machine that cannot is about to end or has ended.
            if let Err(error) = agent.remove_disk(&serial).await {
                tracing::warn!(serial, %error, "disk");
            }
            if let Err(error) = vm.remove_device(serial.clone()).await {
                tracing::warn!(serial, %error, "disk");
            }
        }
        let tree = self.tree;
        // umount(2) may wait for a disk.
        let _ = tokio::task::spawn_blocking(move || drop(tree)).await;
    }
}
