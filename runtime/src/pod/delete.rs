//! Deleting containers; the last takes the machine with it.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::events::task::TaskDelete;
use containerd_shim_protos::topics;
use futures::future::join_all;
use protobuf::MessageField;
use tokio::time::timeout;

use super::hold::ended;
use super::{MACHINE_GONE, MachineState, Pod, Reply, no_process, not_found};
use crate::agent_client::{AgentError, Exit};
use crate::clock;
use crate::container::{Container, Kind, State};
use crate::container_files::ContainerFiles;
use crate::error::Error;
use crate::machine::Machine;
use crate::vm_process::VmEnd;

/// How long a deletion waits for somebody to go on reading the output.
const SLOW_READER: Duration = Duration::from_secs(10);

/// How long it waits for output of children that have outlived the process, as
/// long as with runc.
const CHILDREN: Duration = Duration::from_secs(2);

/// How long the machine waits for deletions other than the last: the guest may
/// still write what was written to their disks.
const OTHERS: Duration = Duration::from_secs(45);

/// A process that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// What was told as its pid.
    pub pid: u32,
    /// How it ended.
    pub exit: Exit,
}

/// A container's deletion that is under way.
pub(super) struct Deletion {
    pub(super) deleted: Deleted,
    waiting: Vec<Reply<Deleted>>,
}

impl Pod {
    /// Forgets a container that has ended, or with `exec` a process of it.
    pub fn delete(&mut self, id: String, exec: String, reply: Reply<Deleted>) {
        if !exec.is_empty() {
            return self.delete_exec(&id, exec, reply);
        }
        // Who did not wait for the answer asks again: it is the same deletion.
        if let Some(deletion) = self.deleting.get_mut(&id) {
            return deletion.waiting.push(reply);
        }
        match self.begin_delete(&id) {
            Ok(container) => self.delete_container(id, container, reply),
            Err(error) => reply.send(Err(error)),
        }
    }

    fn begin_delete(&mut self, id: &str) -> Result<Container, Error> {
        let container = self.container_mut(id)?;
        match container.init.state() {
            State::Stopped(_) | State::Created => {}
            state @ (State::Creating | State::Starting | State::Running) => {
                container.unwanted = state == State::Creating;
                return Err(container.init.refuse("delete", id));
            }
        }
        let removed = self.containers.remove(id).ok_or_else(|| not_found(id))?;
        if id == self.settings.id.as_str() && self.is_used() {
            self.state.is_deleted = true;
            self.write_state();
        }
        Ok(removed)
    }

    fn delete_container(&mut self, id: String, mut container: Container, reply: Reply<Deleted>) {
        let pid = self.pid_for(&container);
        let exit = match container.init.state() {
            State::Stopped(exit) => exit,
            // It was never run: deleting it is what ends it.
            _ => Exit::now(MACHINE_GONE),
        };
        let deleted = Deleted { pid, exit };
        self.tell_ended(&id, &mut container, exit);
        let processes = container.execs.values_mut().map(|exec| &mut exec.process);
        let processes = processes.chain([&mut container.init]);
        let streams: Vec<_> = processes.filter_map(|p| p.stdio.take()).collect();
        let files = match &mut container.kind {
            Kind::Guest(files) => Some(files.take().map(|files| *files)),
            Kind::Sandbox => None,
        };
        let hooks = container.hooks.clone();
        // It counts as ended until it is gone, as with runc: who asks in between
        // shall not take its files for free.
        self.containers.insert(id.clone(), container);
        let waiting = vec![reply];
        let deletion = Deletion { deleted, waiting };
        self.deleting.insert(id.clone(), deletion);
        let running = self.machine().ok();
        let limits = self.drain_limits(SLOW_READER, CHILDREN);
        self.begin_work();
        let machine = self.take_last_machine();
        let machine_end = machine.map(|machine| self.end_last(machine));
        self.later(async move {
            let drained = streams.into_iter();
            let drained = drained.map(async |mut stdio| {
                stdio.drain(limits).await;
                stdio.close().await;
            });
            join_all(drained).await;
            if let Some(mut files) = files {
                // The guest lets go of them before they are unmounted here.
                let unused = files.as_mut().map(ContainerFiles::give_up);
                let unused = unused.unwrap_or_default();
                if let Some((_, agent)) = &running {
                    report(agent.delete_container(&id, unused).await);
                }
                if let Some(files) = files {
                    let running = running.as_ref().map(|(vm, agent)| (vm, agent));
                    files.detach(running).await;
                }
            }
            let held = match machine_end {
                Some(end) => end.await,
                None => None,
            };
            if let (Some(hooks), None) = (hooks, &held) {
                hooks.deleted().await;
            }
            move |pod: &mut Pod| match held {
                Some((machine, end)) => pod.container_held(id, machine, end),
                None => pod.container_deleted(&id),
            }
        });
    }

    /// Ends the machine once whoever does so is the last to have work under way. It is
    /// handed back where its VMM does not end and may still write to what is the
    /// node's, so that nobody may have that yet.
    pub(super) fn end_last(
        &self,
        machine: Machine,
    ) -> impl Future<Output = Option<(Machine, VmEnd)>> + Send + use<> {
        let others = self.settings.config.patience().of(OTHERS);
        let mut under_way = self.under_way.subscribe();
        let (disks, groups) = (Arc::clone(&self.disks), Arc::clone(&self.groups));
        async move {
            let _ = timeout(others, under_way.wait_for(|count| *count <= 1)).await;
            let end = machine.end().await;
            let may_write = disks.may_be_written() || groups.may_be_plugged();
            let is_held = may_write && machine.vm().process().is_alive();
            is_held.then_some((machine, end))
        }
    }

    /// What has not ended by itself does now, for those who wait for it.
    fn tell_ended(&self, id: &str, container: &mut Container, exit: Exit) {
        let pid = self.pid_for(container);
        for (exec, added) in &mut container.execs {
            match added.process.state() {
                State::Stopped(_) => {}
                // It was never run, and containerd has heard nothing of it.
                State::Created | State::Creating => added.process.finish_exit(exit),
                State::Starting | State::Running => {
                    added.process.finish_exit(exit);
                    self.send_exit(exec, id, pid, exit);
                }
            }
        }
        if !matches!(container.init.state(), State::Stopped(_)) {
            container.init.finish_exit(exit);
            self.send_exit(id, id, pid, exit);
        }
    }

    /// The machine, when no container is left to use it.
    pub(super) fn take_last_machine(&mut self) -> Option<Machine> {
        if self.is_used() {
            return None;
        }
        match mem::replace(&mut self.machine, MachineState::None) {
            MachineState::Running(machine) | MachineState::Ended(machine, _) => Some(machine),
            other => {
                self.machine = other;
                None
            }
        }
    }

    /// A creation or deletion has come to its end; the last one leaves nothing.
    pub(super) fn work_ended(&mut self) {
        self.end_work();
        // Not before the last mount of others' files is gone.
        if self.is_idle() {
            self.release();
        }
    }

    fn container_deleted(&mut self, id: &str) {
        // Unless the pod itself is over.
        self.containers.remove(id);
        let deletion = self.deleting.remove(id);
        self.fit_machine();
        if let Some(deletion) = deletion {
            self.tell_deleted(id, deletion);
        }
        // Not before that is written down, for those who trace it.
        self.work_ended();
    }

    /// The last container stays until the VMM has ended. Then it goes, though nobody may
    /// ask for that again: Docker asks once.
    fn container_held(&mut self, id: String, machine: Machine, end: VmEnd) {
        let process = machine.vm().process();
        if self.state.end.is_none() {
            self.note_end(&end, true);
        }
        self.machine = MachineState::Ended(machine, end);
        self.end_work();
        let deletion = self.deleting.remove(&id);
        for reply in deletion.into_iter().flat_map(|deletion| deletion.waiting) {
            reply.send(Err(Error::Held { pid: process.pid }));
        }
        if mem::replace(&mut self.awaits_vmm, true) {
            return;
        }
        self.later(async move {
            ended(process).await;
            move |pod: &mut Pod| {
                pod.awaits_vmm = false;
                // One that is under way goes on.
                pod.delete(id, String::new(), Reply::to_nobody());
            }
        });
    }

    fn tell_deleted(&self, id: &str, Deletion { deleted, waiting }: Deletion) {
        let event = TaskDelete {
            container_id: id.to_owned(),
            pid: deleted.pid,
            exit_status: deleted.exit.code,
            exited_at: MessageField::some(clock::timestamp(deleted.exit.at_ns)),
            ..TaskDelete::default()
        };
        self.events.send(topics::TASK_DELETE_EVENT_TOPIC, &event);
        for reply in waiting {
            reply.send(Ok(deleted));
        }
    }

    fn delete_exec(&mut self, id: &str, exec: String, reply: Reply<Deleted>) {
        let pid = self.pid_of(id);
        let container = match self.container_mut(id) {
            Ok(container) => container,
            Err(error) => return reply.send(Err(error)),
        };
        let state = container.execs.get(&exec).map(|e| e.process.state());
        let exit = match state {
            None => return reply.send(Err(no_process(&exec))),
            Some(State::Stopped(exit)) => Some(exit),
            Some(State::Created) => None,
            Some(state) => {
                return reply.send(Err(Error::State {
                    action: "delete",
                    id: exec,
                    state: state.name(),
                }));
            }
        };
        let removed = container.execs.remove(&exec);
        let limits = self.drain_limits(SLOW_READER, CHILDREN);
        let running = self.machine().ok();
        let id = id.to_owned();
        tokio::spawn(async move {
            if let Some(mut stdio) = removed.and_then(|exec| exec.process.stdio) {
                stdio.drain(limits).await;
                stdio.close().await;
            }
            // One that never ran is unknown to the guest.
            if let (Some(_), Some((_, agent))) = (exit, running) {
                report(agent.delete_process(&id, &exec).await);
            }
            let exit = exit.unwrap_or_else(|| Exit::now(0));
            reply.send(Ok(Deleted { pid, exit }));
        });
    }

    /// Ends the shim, unless it still has something to do; with `now` anyway.
    pub fn shut_down(&mut self, now: bool, reply: Reply<()>) {
        if self.is_idle() || now {
            self.over = true;
        }
        reply.send(Ok(()));
    }
}

/// The guest's part of a deletion may fail: it has no say in whether things are
/// gone.
pub(super) fn report(outcome: Result<(), AgentError>) {
    if let Err(error) = outcome {
        tracing::warn!(%error, "deletion in the guest");
    }
}
