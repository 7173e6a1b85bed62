//! A machine as the control socket sees it.

use std::sync::Arc;

use husk_virtio::GuestMemory;
use husk_virtio::event_loop::{EventLoop, LoopGone};
use husk_vmm_spec::VmStats;

use crate::console::ConsoleOutput;
use crate::devices::Devices;
use crate::exit::ExitLatch;
use crate::kvm::vcpu::VcpuThreads;
use crate::kvm::vm::Vm;

/// A machine that has been booted. Fields are dropped from the first down:
/// nothing runs any more when memory goes.
pub struct Machine {
    pub(crate) vcpus: VcpuThreads,
    pub(crate) device_loop: EventLoop,
    pub(crate) devices: Devices,
    pub(crate) exit: Arc<ExitLatch>,
    pub(crate) console: Arc<ConsoleOutput>,
    #[allow(dead_code, reason = "lives as long as the threads that use it")]
    pub(crate) memory: GuestMemory,
    #[allow(dead_code, reason = "lives as long as the threads that use it")]
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
    pub fn pause(&self) -> Result<(), LoopGone> {
        self.vcpus.pause();
        self.device_loop.handle().pause()
    }

    /// Lets devices and processors go on.
    ///
    /// # Errors
    /// The device thread has ended.
    pub fn resume(&self) -> Result<(), LoopGone> {
        self.device_loop.handle().resume()?;
        self.vcpus.resume();
        Ok(())
    }

    /// Ends the processors for good and has the devices finish what they do.
    pub fn stop(&mut self) {
        self.vcpus.stop();
        // If the thread has ended, it touches nothing either.
        let _ = self.device_loop.handle().pause();
    }

    /// Counters since the start.
    pub fn stats(&self) -> VmStats {
        VmStats {
            exits: self.vcpus.exits(),
            console_dropped_bytes: self.console.dropped(),
        }
    }
}
