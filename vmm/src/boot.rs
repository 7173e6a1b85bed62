//! A machine's start, from its specification to processors that wait for the
//! word to enter the guest.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use husk_virtio::event_loop::EventLoop;
use husk_vmm_spec::{Descriptor, DeviceSpec, ValidVmSpec};
use vm_memory::{GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion};

use crate::address_space::AddressSpace;
use crate::arch::x86_64::boot_params::{self, LoadError};
use crate::arch::x86_64::elf::{self, ElfError};
use crate::arch::x86_64::{layout, mptable, regs};
use crate::console::ConsoleOutput;
use crate::devices::{Devices, PlugError, When};
use crate::exit::ExitLatch;
use crate::kvm::irq::Routes;
use crate::kvm::memory::{self, MemoryError};
use crate::kvm::vcpu::{self, VcpuError, VcpuThreads};
use crate::kvm::vm::{KvmError, Vm};
use crate::legacy::Legacy;
use crate::machine::Machine;
use crate::packet::Descriptors;
use crate::pci::{BusError, HostBridge, PciBus, PvPanic};
use crate::seccomp::{Confinement, Role};

/// A machine that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel.
    #[error("the kernel cannot be loaded")]
    Kernel(#[from] ElfError),
    /// The initramfs, or the tables beside it.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A table that the processors need.
    #[error("write {what} into guest memory")]
    Table {
        /// Which.
        what: &'static str,
        /// Why not.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// The PCI bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A device.
    #[error(transparent)]
    Device(#[from] PlugError),
    /// Processors.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A descriptor or thread that the host does not give.
    #[error("{what}")]
    Host {
        /// What it was to be.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn take(
    descriptors: &mut Descriptors,
    what: &'static str,
    descriptor: Descriptor,
) -> Result<OwnedFd, BootError> {
    descriptors
        .take(descriptor)
        .map_err(|source| BootError::Host { what, source })
}

/// Makes the machine that `spec` describes from `descriptors`. Its processors
/// are paused; every thread but the caller's is confined.
///
/// # Errors
/// The host or KVM refuses something, or the kernel is none.
pub fn boot(
    spec: &ValidVmSpec,
    descriptors: &mut Descriptors,
    confinement: Confinement,
) -> Result<Machine, BootError> {
    let spec = spec.spec();
    let host = |what| move |source| BootError::Host { what, source };

    // Memory, and what the kernel finds in it.
    let (ram, pluggable) = (spec.memory.boot_mib, spec.memory.pluggable_mib);
    let memory = memory::create(ram, pluggable)?;
    let [ram, pluggable] = [ram, pluggable].map(|mib| u64::from(mib) << 20);
    let vm = Vm::new(take(descriptors, "kvm", spec.kvm)?, &memory, spec.vcpus.max)?;
    let kernel = elf::load(
        &memory,
        &File::from(take(descriptors, "boot.kernel", spec.boot.kernel)?),
    )?;
    let initramfs = match spec.boot.initramfs {
        Some(file) => Some(boot_params::load_initramfs(
            &memory,
            kernel,
            &File::from(take(descriptors, "boot.initramfs", file)?),
        )?),
        None => None,
    };
    let filled = layout::filled_at_boot(ram, initramfs.map(|initramfs| initramfs.start));
    memory::populate(
        &memory,
        memory::large_page_of(filled.start)..memory::large_page_of(filled.end),
    );
    boot_params::write(&memory, ram, &spec.boot.command_line, initramfs)?;
    let table = |what| move |source| BootError::Table { what, source };
    mptable::write(&memory, spec.vcpus.max).map_err(table("the MP table"))?;
    regs::write_tables(&memory).map_err(table("the page tables"))?;

    // The bus and the devices on it.
    let exit = Arc::new(ExitLatch::new().map_err(host("event descriptor"))?);
    let console = ConsoleOutput::new(match spec.console {
        Some(console) => Some(take(descriptors, "console.output", console.output)?),
        None => None,
    });
    let ranges = memory.iter().map(|region| {
        let start = region.start_addr().0;
        start..start + region.len()
    });
    let bus = Arc::new(PciBus::new(Arc::clone(vm.fd()), ranges));
    bus.add_at_boot(Arc::new(Mutex::new(HostBridge::new())))?;
    bus.add_at_boot(Arc::new(Mutex::new(PvPanic::new(Arc::clone(&exit)))))?;
    let device_loop = EventLoop::start("devices", move || confinement.enter(Role::Devices))
        .map_err(host("device thread"))?;

    let memory = GuestMemoryAtomic::new(memory);
    let mut devices = Devices::new(
        Arc::clone(&bus),
        Routes::new(Arc::clone(vm.fd())),
        memory.clone(),
        device_loop.handle(),
        Arc::clone(&console),
    );
    devices.add_basics(&console)?;
    devices.add_memory(layout::pluggable_range(ram, pluggable))?;
    if let Some(vsock) = &spec.vsock {
        devices.add_vsock(vsock, descriptors)?;
    }
    let blocks = spec.blocks.iter().cloned().map(DeviceSpec::Block);
    let nets = spec.nets.iter().cloned().map(DeviceSpec::Net);
    let filesystems = spec.filesystems.iter().cloned().map(DeviceSpec::Fs);
    for device in blocks.chain(nets).chain(filesystems) {
        devices.add(&device, descriptors, When::AtBoot)?;
    }
    devices.provide_for_later();

    // Processors.
    let vcpus = vcpu::create_all(&vm, spec.vcpus.max, kernel.entry)?;
    let legacy = Legacy::new(Arc::clone(&console), Arc::clone(&exit));
    let space = Arc::new(AddressSpace::new(Arc::clone(&bus), legacy));
    let vcpus = VcpuThreads::start(vcpus, &space, &exit, &console, confinement)?;
    vcpus.wait_paused();
    Ok(Machine {
        vcpus,
        device_loop,
        devices,
        exit,
        console,
        memory,
        vm,
    })
}
