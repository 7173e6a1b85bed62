//! The end of the machine, and what is told of it.

use std::time::Duration;

use husk_node::state::{EndFacts, EndKind};
use tokio::time::timeout;

use super::exit::ended_now;
use super::{MACHINE_GONE, MachineState, Pod, PodHandle};
use crate::clock;
use crate::config::Patience;
use crate::container::{Kind, State as ProcessState};
use crate::vm_process::{Vm, VmEnd};

/// How long a machine may go on without its agent or its file server.
const WITHOUT_PART: Duration = Duration::from_secs(1);

/// A part without which a machine is ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    Agent,
    FileServer,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::FileServer => "file server",
        }
    }

    fn kind(self) -> EndKind {
        match self {
            Self::Agent => EndKind::LostAgent,
            Self::FileServer => EndKind::LostFileServer,
        }
    }
}

impl Pod {
    /// The machine is gone, and with it every process in it.
    pub(super) fn machine_ended(&mut self, end: VmEnd) {
        let machine = match std::mem::replace(&mut self.machine, MachineState::None) {
            MachineState::Running(machine) => machine,
            // Whoever ended it knows already, and may have left it here.
            other => {
                self.machine = other;
                return;
            }
        };
        let was_asked = machine.vm().is_dismissed() && self.lost_part.is_none();
        if was_asked {
            tracing::info!("machine: {end}");
        } else {
            tracing::error!("machine: {end}");
        }
        self.note_end(&end, was_asked);
        self.machine = MachineState::Ended(machine, end);
        let sandbox_code = self.sandbox_exit.unwrap_or(MACHINE_GONE);
        let mut ended = Vec::new();
        for (id, container) in &self.containers {
            let code = match container.kind {
                Kind::Sandbox => sandbox_code,
                Kind::Guest(_) => MACHINE_GONE,
            };
            for (exec, added) in &container.execs {
                // One that was never started has no end to tell.
                if added.process.state() != ProcessState::Created {
                    ended.push((id.clone(), exec.clone(), MACHINE_GONE));
                }
            }
            ended.push((id.clone(), String::new(), code));
        }
        for (id, exec, code) in ended {
            self.process_exited(&id, &exec, ended_now(code));
        }
    }

    /// Writes down how the machine ended.
    pub(super) fn note_end(&mut self, end: &VmEnd, was_asked: bool) {
        let (kind, reason) = match self.lost_part {
            Some(part) => (part.kind(), format!("the {} had ended", part.name())),
            None => (end.kind(), end.reason()),
        };
        self.state.end = Some(EndFacts {
            kind,
            reason,
            was_asked,
            console: end.last_lines(),
            at_ns: clock::wall_ns(),
        });
        self.write_state();
    }
}

/// Ends a machine that has lost a part of it, unless it is about to end anyway.
pub(super) async fn end_without(part: Part, vm: &Vm, pod: &PodHandle, patience: Patience) {
    if timeout(patience.of(WITHOUT_PART), vm.ended())
        .await
        .is_err()
        && !vm.is_dismissed()
    {
        tracing::error!("the {} has ended; so does the machine", part.name());
        pod.send(Box::new(move |pod| pod.lost_part = Some(part)));
        vm.kill().await;
    }
}
