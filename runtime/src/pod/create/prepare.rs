//! What takes time when a container is made: the machine boots, its files are
//! mounted, the guest prepares it.

use std::sync::Arc;

use husk_node::trace::stage;
use husk_protocol::agent::CreateContainerRequest;

use crate::agent_client::Agent;
use crate::container_files::{ContainerFiles, FilesRequest, GuestFiles, Unprepared};
use crate::error::Error;
use crate::hook::ContainerHooks;
use crate::id::Id;
use crate::machine::{Machine, MachineParts, MachineRequest, explained};
use crate::shared_tree::SharedTree;
use crate::stand_in::StandIn;
use crate::state_dir::State;
use crate::stdio::{OnFirstOutput, Owner, Stdio, StdioPaths};
use crate::vm_process::Vm;

/// A container that the guest has prepared.
pub(super) struct Prepared {
    pub(super) files: ContainerFiles,
    pub(super) stdio: Stdio,
    pub(super) stand_in: Option<StandIn>,
    pub(super) hooks: Arc<ContainerHooks>,
}

/// The streams of a container that is about to be made.
pub(super) struct Streams {
    pub(super) paths: StdioPaths,
    pub(super) owner: Owner,
    pub(super) on_first_output: OnFirstOutput,
}

/// A container's files and streams.
pub(super) struct Files {
    pub(super) files: FilesRequest,
    pub(super) streams: Streams,
    pub(super) hooks: Arc<ContainerHooks>,
}

/// Boots the machine of a pod.
pub(super) async fn boot_sandbox(request: MachineRequest) -> Result<(Machine, State), Error> {
    MachineParts::prepare(request).await?.boot(Vec::new()).await
}

/// Boots a machine for one container, which the guest then prepares.
pub(super) async fn boot_single(
    request: MachineRequest,
    files: Box<dyn FnOnce(SharedTree) -> Files + Send>,
) -> Result<(Machine, State, Prepared), Error> {
    let parts = MachineParts::prepare(request).await?;
    let Files {
        files,
        streams,
        hooks,
    } = files(parts.tree().clone());
    let id = files.id.clone();
    let (files, guest) = match files.prepare().await {
        Ok(prepared) => prepared,
        Err(failed) => {
            parts.end().await;
            let Unprepared { error, files } = *failed;
            if let Some(files) = files {
                files.detach(None).await;
            }
            return Err(error);
        }
    };
    let disks = match files.boot_disks() {
        Ok(disks) => disks,
        Err(error) => {
            parts.end().await;
            files.detach(None).await;
            return Err(error);
        }
    };
    let (machine, state) = match parts.boot(disks).await {
        Ok(booted) => booted,
        Err(error) => {
            files.detach(None).await;
            return Err(error);
        }
    };
    let (vm, agent) = (machine.vm(), machine.agent());
    let made = create_in_guest(vm, agent, &id, &files, guest, streams).await;
    let made = with_hooks(made, &hooks, machine.vm().process().pid).await;
    match made {
        Ok(stdio) => {
            // Whoever runs it alone looks for its namespaces at the VMM's pid.
            let prepared = Prepared {
                files,
                stdio,
                stand_in: None,
                hooks,
            };
            Ok((machine, state, prepared))
        }
        Err(error) => {
            machine.end().await;
            files.detach(None).await;
            Err(error)
        }
    }
}

/// Has the guest of a running machine prepare a container; `passed` is told which
/// parts of that are over.
pub(super) async fn create_member(
    vm: Vm,
    agent: Agent,
    files: Files,
    mut passed: impl FnMut(&str),
) -> Result<Prepared, Error> {
    let Files {
        files,
        streams,
        hooks,
    } = files;
    let id = files.id.clone();
    let (files, guest) = match files.prepare().await {
        Ok(prepared) => prepared,
        Err(failed) => {
            let Unprepared { error, files } = *failed;
            if let Some(files) = files {
                take_back(&vm, &agent, &id, files).await;
            }
            return Err(error);
        }
    };
    passed(stage::FILES);
    let outcome = create_in_guest(&vm, &agent, &id, &files, guest, streams).await;
    passed(stage::CREATE);
    let stand_in = stand_in(&vm).await;
    let pid = stand_in.as_ref().map_or(vm.process().pid, StandIn::tid);
    match with_hooks(outcome, &hooks, pid).await {
        Ok(stdio) => Ok(Prepared {
            files,
            stdio,
            stand_in,
            hooks,
        }),
        Err(error) => {
            take_back(&vm, &agent, &id, files).await;
            Err(error)
        }
    }
}

/// Takes the files of a container that has not been made. It may be there all the
/// same, when only the answer was late, and it has seen the files that are about
/// to go.
async fn take_back(vm: &Vm, agent: &Agent, id: &Id, mut files: ContainerFiles) {
    let unused = files.give_up();
    if let Err(error) = agent.delete_container(id.as_str(), unused).await {
        tracing::debug!(%error, "deletion in the guest");
    }
    files.detach(Some((vm, agent))).await;
}

/// A container that its hooks want no more of has not been made.
async fn with_hooks(
    made: Result<Stdio, Error>,
    hooks: &ContainerHooks,
    pid: u32,
) -> Result<Stdio, Error> {
    let stdio = made?;
    if let Err(error) = hooks.created(pid).await {
        hooks.deleted().await;
        return Err(error.into());
    }
    Ok(stdio)
}

/// Without one, it can be no other's target.
async fn stand_in(vm: &Vm) -> Option<StandIn> {
    let started = StandIn::start(vm.process()).await;
    started
        .inspect_err(|error| tracing::warn!(%error, "no pid of its own"))
        .ok()
}

async fn create_in_guest(
    vm: &Vm,
    agent: &Agent,
    id: &Id,
    files: &ContainerFiles,
    guest: GuestFiles,
    streams: Streams,
) -> Result<Stdio, Error> {
    files.hand_over(vm, agent).await?;
    let terminal = streams.paths.terminal;
    let Streams {
        paths,
        owner,
        on_first_output,
    } = streams;
    let (stdio, guest_streams) = Stdio::open(&paths, &owner, on_first_output).await?;
    let ports = guest_streams.port_numbers();
    vm.add_host_ports(guest_streams.host_ports).await?;
    let request = CreateContainerRequest {
        container_id: id.as_str().to_owned(),
        oci_spec: guest.oci_spec,
        storages: guest.storages,
        devices: guest.devices,
        all_devices: guest.all_devices,
        pci_slots: guest.pci_slots.into_iter().map(u32::from).collect(),
        streams: Some(guest_streams.ports).into(),
        terminal,
        ..CreateContainerRequest::default()
    };
    match agent.create_container(&request).await {
        Ok(()) => Ok(stdio),
        Err(error) => {
            vm.remove_host_ports(ports).await;
            Err(explained(vm, agent, error).await)
        }
    }
}
