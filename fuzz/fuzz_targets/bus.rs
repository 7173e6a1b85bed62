//! All that a guest reaches by ports and memory-mapped registers of a whole
//! machine: PCI configuration space, BARs that move over each other and over
//! memory, MSI-X entries to any address, with KVM behind.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock, Mutex};

use arbitrary::Arbitrary;
use husk_fuzz::skip;
use husk_virtio::event_loop::EventLoop;
use husk_vmm::address_space::AddressSpace;
use husk_vmm::arch::x86_64::layout;
use husk_vmm::console::ConsoleOutput;
use husk_vmm::devices::{Devices, When};
use husk_vmm::exit::ExitLatch;
use husk_vmm::kvm::irq::Routes;
use husk_vmm::kvm::memory;
use husk_vmm::kvm::vm::Vm;
use husk_vmm::legacy::Legacy;
use husk_vmm::packet::Descriptors;
use husk_vmm::pci::{HostBridge, PciBus, PvPanic};
use husk_vmm_spec::{BlockSpec, Descriptor, DeviceSpec, HostPort, VsockSpec};
use libfuzzer_sys::fuzz_target;
use rustix::fs::MemfdFlags;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion};

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Port {
    Pci(u8),
    Serial(u8),
    Any(u16),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    /// Behind a BAR, unless the guest has moved it.
    Bar(u8, u16),
    Window(u32),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Act {
    In(Port, u8),
    Out(Port, u32, u8),
    /// Reads, and then writes, a register of a slot's configuration space.
    Config(u8, u8, u32, u8),
    /// Moves a BAR.
    Move(u8, Place),
    Read(Place, u8),
    Write(Place, u64, u8),
    Plug(u8),
    Unplug(u8),
    PlugMemory(u8),
    Pause,
}

static KVM: LazyLock<File> = LazyLock::new(|| {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    kvm.unwrap_or_else(|error| skip(format!("/dev/kvm: {error}")))
});

struct Machine {
    space: AddressSpace,
    devices: Devices,
    event_loop: EventLoop,
    memory: GuestMemoryAtomic<vm_memory::GuestMemoryMmap>,
    _vm: Vm,
}

fn disk(id: &str) -> (DeviceSpec, Descriptors) {
    let file: File = rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC)
        .expect("a memfd")
        .into();
    file.set_len(4096).expect("memory");
    let spec = DeviceSpec::Block(BlockSpec {
        id: id.into(),
        file: Descriptor(0),
        read_only: false,
        serial: id.into(),
        rate: Default::default(),
    });
    (spec, Descriptors::from(vec![OwnedFd::from(file)]))
}

fn machine() -> Machine {
    let memory = memory::create(4, 128).expect("memory");
    let kvm = KVM.try_clone().expect("a descriptor");
    let vm = Vm::new(kvm.into(), &memory, 1).expect("a machine");
    let exit = Arc::new(ExitLatch::new().expect("an event descriptor"));
    let (_, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).expect("a pipe");
    let console = ConsoleOutput::new(Some(writer));
    let ranges = memory.iter().map(|region| {
        let start = region.start_addr().0;
        start..start + region.len()
    });
    let bus = Arc::new(PciBus::new(Arc::clone(vm.fd()), ranges));
    bus.add_at_boot(Arc::new(Mutex::new(HostBridge::new())))
        .expect("a slot");
    bus.add_at_boot(Arc::new(Mutex::new(PvPanic::new(Arc::clone(&exit)))))
        .expect("a slot");
    let event_loop = EventLoop::start("devices", || Ok(())).expect("a thread");
    let memory = GuestMemoryAtomic::new(memory);
    let mut devices = Devices::new(
        Arc::clone(&bus),
        Routes::new(Arc::clone(vm.fd())),
        memory.clone(),
        event_loop.handle(),
        Arc::clone(&console),
    );
    devices.add_basics(&console).expect("devices");
    let pluggable = layout::pluggable_range(4 << 20, 128 << 20);
    devices
        .add_memory(pluggable, When::AtBoot)
        .expect("a device");
    let (near, _) = UnixStream::pair().expect("a pair");
    let vsock = VsockSpec {
        cid: 3,
        host_ports: vec![HostPort {
            port: 1,
            stream: Descriptor(0),
        }],
    };
    let mut descriptors = Descriptors::from(vec![OwnedFd::from(near)]);
    devices
        .add_vsock(&vsock, &mut descriptors)
        .expect("a device");
    let (spec, mut descriptors) = disk("disk");
    devices
        .add(&spec, &mut descriptors, When::AtBoot)
        .expect("a device");
    devices.provide_for_later(0).expect("memory");
    let space = AddressSpace::new(bus, Legacy::new(console, exit));
    Machine {
        space,
        devices,
        event_loop,
        memory,
        _vm: vm,
    }
}

impl Port {
    fn number(self) -> u16 {
        match self {
            Self::Pci(port) => 0xcf8 + u16::from(port % 8),
            Self::Serial(port) => 0x3f8 + u16::from(port % 8),
            Self::Any(port) => port,
        }
    }
}

impl Place {
    fn address(self) -> u64 {
        let start = layout::PCI_WINDOW.start;
        match self {
            Self::Bar(slot, offset) => start + u64::from(slot % 8) * 0x8000 + u64::from(offset),
            Self::Window(offset) => start + u64::from(offset),
            Self::Any(address) => address,
        }
    }
}

/// As wide as an instruction's access.
fn width(choice: u8) -> usize {
    1 << (choice % 4)
}

fn config(space: &AddressSpace, slot: u8, register: u8, value: u32, choice: u8) {
    let address = 0x8000_0000 | u32::from(slot % 32) << 11 | u32::from(register & 0xfc);
    space.write_port(0xcf8, &address.to_le_bytes());
    let port = 0xcfc + u16::from(register & 3);
    let width = width(choice % 3);
    space.read_port(port, &mut [0; 4][..width]);
    space.write_port(port, &value.to_le_bytes()[..width]);
}

fuzz_target!(init: husk_fuzz::start(), |acts: Vec<Act>| {
    let mut machine = machine();
    let space = &machine.space;
    for slot in 0..8 {
        config(space, slot, 4, 6, 2);
    }
    for act in acts.into_iter().take(256) {
        let space = &machine.space;
        match act {
            Act::In(port, choice) => {
                space.read_port(port.number(), &mut [0; 4][..width(choice % 3)]);
            }
            Act::Out(port, value, choice) => {
                space.write_port(port.number(), &value.to_le_bytes()[..width(choice % 3)]);
            }
            Act::Config(slot, register, value, choice) => {
                config(space, slot, register, value, choice);
            }
            Act::Move(slot, place) => config(space, slot, 0x10, place.address() as u32, 2),
            Act::Read(place, choice) => {
                space.read(place.address(), &mut [0; 8][..width(choice)]);
            }
            Act::Write(place, value, choice) => {
                space.write(place.address(), &value.to_le_bytes()[..width(choice)]);
            }
            Act::Plug(id) => {
                let (spec, mut descriptors) = disk(&format!("d{}", id % 4));
                let _ = machine.devices.add(&spec, &mut descriptors, When::Later);
            }
            Act::Unplug(id) => {
                let _ = machine.devices.remove(&format!("d{}", id % 4));
            }
            Act::PlugMemory(mib) => {
                let _ = machine.devices.plug_memory(mib.into());
            }
            Act::Pause => {
                machine.event_loop.handle().pause().expect("the loop lives");
                machine.event_loop.handle().resume().expect("the loop lives");
            }
        }
    }
    machine.event_loop.handle().pause().expect("the loop lives");
    let memory = machine.memory.memory();
    drop(machine);
    for region in memory.iter() {
        // SAFETY: nobody is left who knows these addresses, which a VMM keeps as
        // long as it lives.
        let _ = unsafe { rustix::mm::munmap(region.as_ptr().cast(), region.len() as usize) };
    }
});
