//! A machine's start, from its specification to processors that wait for the
//! word to enter the guest: with a kernel that boots, or where a guest was saved.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use husk_virtio::GuestMemory;
use husk_virtio::event_loop::EventLoop;
use husk_vmm_spec::{BootSpec, Descriptor, DeviceSpec, SavedSpec, StartSpec, ValidVmSpec, VmSpec};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion};

use crate::address_space::AddressSpace;
use crate::arch::x86_64::boot_params::{self, LoadError};
use crate::arch::x86_64::elf::{self, ElfError};
use crate::arch::x86_64::kaslr::{self, KaslrError};
use crate::arch::x86_64::{layout, mptable, regs};
use crate::console::ConsoleOutput;
use crate::devices::{Devices, PlugError, When};
use crate::exit::ExitLatch;
use crate::kvm::irq::Routes;
use crate::kvm::memory::{self, MemoryError};
use crate::kvm::saved_memory;
use crate::kvm::vcpu::{self, Begin, VcpuError, VcpuThreads, Vcpus};
use crate::kvm::vm::{KvmError, Vm};
use crate::legacy::Legacy;
use crate::machine::Machine;
use crate::packet::Descriptors;
use crate::pci::{BusError, HostBridge, PciBus, PvPanic, SlotError};
use crate::saved::{MachineState, SavedError};
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
    /// The kernel's addresses.
    #[error(transparent)]
    Kaslr(#[from] KaslrError),
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
    /// What was saved.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// What was saved is on another bus.
    #[error(transparent)]
    Slot(#[from] SlotError),
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

fn host(what: &'static str) -> impl Fn(io::Error) -> BootError {
    move |source| BootError::Host { what, source }
}

/// Makes the machine that `spec` describes from `descriptors`. Its processors
/// are paused; every thread but the caller's is confined.
///
/// # Errors
/// The host or KVM refuses something, the kernel is none, or what was saved is
/// not for this machine.
pub fn start(
    spec: &ValidVmSpec,
    descriptors: &mut Descriptors,
    confinement: Confinement,
) -> Result<Machine, BootError> {
    let spec = spec.spec();
    match &spec.start {
        StartSpec::Boot(boot) => self::boot(spec, boot, descriptors, confinement),
        StartSpec::Restore(saved) => restore(spec, saved, descriptors, confinement),
    }
}

fn boot(
    spec: &VmSpec,
    boot: &BootSpec,
    descriptors: &mut Descriptors,
    confinement: Confinement,
) -> Result<Machine, BootError> {
    // Memory, and what the kernel finds in it.
    let (ram, pluggable) = (spec.memory.boot_mib, spec.memory.pluggable_mib);
    let memory = memory::create(ram, pluggable)?;
    let [ram, pluggable] = [ram, pluggable].map(|mib| u64::from(mib) << 20);
    let vm = Vm::new(take(descriptors, "kvm", spec.kvm)?, &memory, spec.vcpus.max)?;
    let kernel_file = File::from(take(descriptors, "boot.kernel", boot.kernel)?);
    let kernel = elf::load(&memory, &kernel_file)?;
    let moved = kaslr::move_at_random(&memory, kernel, &kernel_file, &boot.command_line)?;
    let initramfs = match boot.initramfs {
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
    boot_params::write(&memory, ram, &boot.command_line, initramfs, moved)?;
    let table = |what| move |source| BootError::Table { what, source };
    mptable::write(&memory, spec.vcpus.max).map_err(table("the MP table"))?;
    regs::write_tables(&memory).map_err(table("the page tables"))?;

    // The bus and the devices on it.
    let memory = GuestMemoryAtomic::new(memory);
    let mut board = Board::new(spec, descriptors, &vm, &memory, confinement)?;
    let region = layout::pluggable_range(ram, pluggable);
    if spec.vfio {
        board.devices.provide_for_vfio(vm.fd(), region.clone());
    }
    board.devices.add_memory(region, When::AtBoot)?;
    board.add_vsock(spec, descriptors)?;
    board.add_rest(spec, descriptors, When::AtBoot)?;
    board.devices.provide_for_later(0)?;

    // Processors.
    let vcpus = vcpu::create_all(&vm, spec.vcpus.max, Begin::Entry(kernel.entry))?;
    let legacy = Legacy::new(Arc::clone(&board.console), Arc::clone(&board.exit));
    board.finish(vm, memory, vcpus, legacy, confinement)
}

/// The guest's devices are those it was saved with, in the same slots; what is
/// new comes after them, and waits for the guest to look for it.
fn restore(
    spec: &VmSpec,
    saved: &SavedSpec,
    descriptors: &mut Descriptors,
    confinement: Confinement,
) -> Result<Machine, BootError> {
    let state = File::from(take(descriptors, "start.state", saved.state)?);
    let state = MachineState::read(&state, &saved.origin)?;

    // Memory.
    let (ram, pluggable) = (spec.memory.boot_mib, spec.memory.pluggable_mib);
    let file = File::from(take(descriptors, "start.memory", saved.memory)?);
    let memory = saved_memory::restore(file, &state.memory, ram, pluggable)?;
    let [ram, pluggable] = [ram, pluggable].map(|mib| u64::from(mib) << 20);
    let vm = Vm::new(take(descriptors, "kvm", spec.kvm)?, &memory, spec.vcpus.max)?;

    // Processors come first: devices may interrupt them as soon as they go on.
    let vcpus = vcpu::create_all(&vm, spec.vcpus.max, Begin::Saved(&state.processors))?;
    // The guest does not see how long it was away. At once: the processors' counters
    // have just been set, and a clock that differs from them is not trusted.
    vm.set_clock(state.clock_ns)?;

    // The bus and the devices on it.
    let memory = GuestMemoryAtomic::new(memory);
    let mut board = Board::new(spec, descriptors, &vm, &memory, confinement)?;
    board.add_vsock(spec, descriptors)?;
    board.bus.restore(&state.bus)?;
    let region = layout::pluggable_range(ram, pluggable);
    if spec.vfio {
        board.devices.provide_for_vfio(vm.fd(), region.clone());
    }
    board.devices.add_memory(region, When::AtRestore)?;
    board.devices.provide_for_later(spec.filesystems.len())?;
    board.add_rest(spec, descriptors, When::AtRestore)?;

    let console = Arc::clone(&board.console);
    let legacy = Legacy::restored(console, Arc::clone(&board.exit), &state.serial);
    board.finish(vm, memory, vcpus, legacy, confinement)
}

/// What processors find beside memory.
struct Board {
    exit: Arc<ExitLatch>,
    console: Arc<ConsoleOutput>,
    bus: Arc<PciBus>,
    device_loop: EventLoop,
    devices: Devices,
}

impl Board {
    /// With the functions that every machine has.
    fn new(
        spec: &VmSpec,
        descriptors: &mut Descriptors,
        vm: &Vm,
        memory: &GuestMemory,
        confinement: Confinement,
    ) -> Result<Self, BootError> {
        let exit = Arc::new(ExitLatch::new().map_err(host("event descriptor"))?);
        let console = ConsoleOutput::new(match spec.console {
            Some(console) => Some(take(descriptors, "console.output", console.output)?),
            None => None,
        });
        let ranges: Vec<_> = memory
            .memory()
            .iter()
            .map(|region| {
                let start = region.start_addr().0;
                start..start + region.len()
            })
            .collect();
        let bus = Arc::new(PciBus::new(Arc::clone(vm.fd()), ranges));
        bus.add_at_boot(Arc::new(Mutex::new(HostBridge::new())))?;
        bus.add_at_boot(Arc::new(Mutex::new(PvPanic::new(Arc::clone(&exit)))))?;
        // Devices that go on wait like the processors, until all is checked.
        let device_loop =
            EventLoop::start_paused("devices", move || confinement.enter(Role::Devices))
                .map_err(host("device thread"))?;
        let mut devices = Devices::new(
            Arc::clone(&bus),
            Routes::new(Arc::clone(vm.fd())),
            memory.clone(),
            device_loop.handle(),
            Arc::clone(&console),
        );
        devices.add_basics(&console)?;
        Ok(Self {
            exit,
            console,
            bus,
            device_loop,
            devices,
        })
    }

    fn add_vsock(&mut self, spec: &VmSpec, descriptors: &mut Descriptors) -> Result<(), PlugError> {
        match &spec.vsock {
            Some(vsock) => self.devices.add_vsock(vsock, descriptors),
            None => Ok(()),
        }
    }

    /// Adds the devices that have names.
    fn add_rest(
        &mut self,
        spec: &VmSpec,
        descriptors: &mut Descriptors,
        when: When,
    ) -> Result<(), PlugError> {
        let blocks = spec.blocks.iter().cloned().map(DeviceSpec::Block);
        let nets = spec.nets.iter().cloned().map(DeviceSpec::Net);
        let filesystems = spec.filesystems.iter().cloned().map(DeviceSpec::Fs);
        blocks
            .chain(nets)
            .chain(filesystems)
            .try_for_each(|device| self.devices.add(&device, descriptors, when))
    }

    /// Starts the processors' threads, which wait.
    fn finish(
        self,
        vm: Vm,
        memory: GuestMemory,
        vcpus: Vcpus,
        legacy: Legacy,
        confinement: Confinement,
    ) -> Result<Machine, BootError> {
        let space = Arc::new(AddressSpace::new(self.bus, legacy));
        let vcpus = VcpuThreads::start(vcpus, &space, &self.exit, &self.console, confinement)?;
        vcpus.wait_paused();
        Ok(Machine {
            vcpus,
            paused: true,
            space,
            device_loop: self.device_loop,
            devices: self.devices,
            exit: self.exit,
            console: self.console,
            memory,
            vm,
        })
    }
}
