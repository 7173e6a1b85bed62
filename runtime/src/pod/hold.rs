//! What a machine that does not end keeps from others: disks and devices of the node,
//! which it may still write to.

use std::time::Duration;

use tokio::time::sleep;

use super::{MachineState, Pod, Reply};
use crate::error::Error;
use crate::process::Process as HostProcess;

/// Pause between two looks whether a VMM that hangs has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

impl Pod {
    /// The VMM, while it has not ended and may write to what is the node's.
    fn holder(&self) -> Option<HostProcess> {
        let may_write = self.disks.may_be_written() || self.groups.may_be_plugged();
        self.state.vmm.filter(|vmm| may_write && vmm.is_alive())
    }

    /// Refuses while nobody else may have what the machine has, which was told to end.
    pub fn check_let_go(&mut self, reply: Reply<()>) {
        reply.send(match self.holder() {
            Some(HostProcess { pid, .. }) => Err(Error::Held { pid }),
            None => Ok(()),
        });
    }

    /// Answers once others may have it.
    pub fn await_let_go(&mut self, reply: Reply<()>) {
        let holder = self.holder();
        tokio::spawn(async move {
            if let Some(vmm) = holder {
                ended(vmm).await;
            }
            reply.send(Ok(()));
        });
    }

    /// Ends the machine and the shim, but not before others may have what it has.
    pub fn shut_down_sandbox(&mut self, reply: Reply<()>) {
        if self.holder().is_none() {
            return self.shut_down(true, reply);
        }
        let vm = match &self.machine {
            MachineState::Running(machine) | MachineState::Ended(machine, _) => {
                machine.vm().clone()
            }
            // Somebody deletes it just now.
            MachineState::None | MachineState::Booting => return self.check_let_go(reply),
        };
        self.later(async move {
            vm.kill().await;
            |pod: &mut Pod| match pod.holder() {
                Some(_) => pod.check_let_go(reply),
                None => pod.shut_down(true, reply),
            }
        });
    }
}

/// Waits for the end of a process that the kernel keeps for nobody knows how long.
pub(super) async fn ended(process: HostProcess) {
    while process.is_alive() {
        sleep(LOOK_AGAIN).await;
    }
}
