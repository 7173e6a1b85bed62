//! A machine as the control socket sees it.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use husk_virtio::GuestMemory;
use husk_virtio::event_loop::{EventLoop, LoopGone};
use husk_vmm_spec::VmStats;

use crate::address_space::AddressSpace;
use crate::console::ConsoleOutput;
use crate::devices::Devices;
use crate::exit::ExitLatch;
use crate::kvm::vcpu::VcpuThreads;
use crate::kvm::vm::Vm;
use crate::saved::{self, SavedError};

/// How long devices may take to finish when the guest has ended: a disk of the host's
/// that hangs would have nobody hear of the end.
const FINISH_LIMIT: Duration = Duration::from_secs(5);

/// A machine that has been booted. Fields are dropped from the first down:
/// nothing runs any more when memory goes.
pub struct Machine {
    pub(crate) vcpus: VcpuThreads,
    /// Nothing changes guest memory.
    pub(crate) paused: bool,
    pub(crate) space: Arc<AddressSpace>,
    pub(crate) device_loop: EventLoop,
    pub(crate) devices: Devices,
    pub(crate) exit: Arc<ExitLatch>,
    pub(crate) console: Arc<ConsoleOutput>,
    pub(crate) memory: GuestMemory,
    pub(crate) vm: Vm,
}

impl Machine {
    /// Why it ends; readable (as a descriptor) once that is known.
    pub fn exit(&self) -> &ExitLatch {
        &self.exit
    }

    /// Its devices, to add and remove some.
    pub fn devices(&mut self) -> &mut Devices {
        &mut self.devices
    }

    /// Takes all processors out of the guest, then has the devices finish what
    /// they do. Afterwards nothing changes guest memory.
    ///
    /// # Errors
    /// The device thread has ended.
    pub fn pause(&mut self) -> Result<(), LoopGone> {
        self.vcpus.pause();
        self.device_loop.handle().pause()?;
        self.paused = true;
        Ok(())
    }

    /// Writes the machine, which must be paused, into two files, from which others
    /// like it can begin.
    ///
    /// # Errors
    /// It is not paused, has something that cannot be saved, or a file does not
    /// take it. The machine is as it was.
    pub fn save(&self, origin: &str, state: File, memory: &File) -> Result<(), SavedError> {
        if !self.paused {
            return Err(SavedError::Running);
        }
        saved::save(self, origin, state, memory)
    }

    /// Lets devices and processors go on.
    ///
    /// # Errors
    /// The device thread has ended.
    pub fn resume(&mut self) -> Result<(), LoopGone> {
        self.paused = false;
        self.device_loop.handle().resume()?;
        self.vcpus.resume();
        Ok(())
    }

    /// Ends the processors for good and has the devices finish what they do. False:
    /// they have not in time, and dropping the machine would wait for them.
    #[must_use]
    pub fn stop(&mut self) -> bool {
        self.vcpus.stop();
        // If the thread has ended, it touches nothing either.
        let finished = self.device_loop.handle().pause_within(FINISH_LIMIT);
        finished.unwrap_or(true)
    }

    /// Counters since the start.
    pub fn stats(&self) -> VmStats {
        VmStats {
            exits: self.vcpus.exits(),
            console_dropped_bytes: self.console.dropped(),
        }
    }
}
