//! The machine's virtio devices: made from what the spec says, put on the bus.

use std::any::Any;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use husk_virtio::balloon::Balloon;
use husk_virtio::block::{Block, DiskError, Engine, Spares};
use husk_virtio::console::Console;
use husk_virtio::event_loop::{LoopGone, LoopHandle};
use husk_virtio::fs::{self, BackEndError, Fs, Shadow};
use husk_virtio::mem::{Mem, Resize};
use husk_virtio::net::Net;
use husk_virtio::pci::{Reporter, VirtioPci};
use husk_virtio::rate::{Limits, Rate, RateError};
use husk_virtio::rng::Rng;
use husk_virtio::vsock::{AddHostPorts, RemoveHostPorts, Vsock};
use husk_virtio::{GuestMemory, Pins, VirtioDevice};
use husk_vmm_spec::{
    BucketSpec, DeviceId, DeviceSpec, HostPort, RateSpec, SpecError, VfioSpec, VsockSpec,
};
use kvm_ioctls::VmFd;
use vm_memory::GuestAddressSpace;

use crate::console::ConsoleOutput;
use crate::exit::describe;
use crate::kvm::irq::Routes;
use crate::kvm::memory::is_shared;
use crate::packet::Descriptors;
use crate::pci::{BusError, PciBus};
use crate::vfio::{DmaSpace, Groups, VfioError};

// A rate that a specification may have can be.
const _: () = assert!(husk_vmm_spec::TOKENS_MAX == husk_virtio::rate::TOKENS_MAX);

/// File systems that can be added to a restored guest while it runs.
const SHADOWS_FOR_LATER: usize = 1;

/// A device that could not be added or removed, or a message it did not get.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The specification is wrong.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// There were as many before as could be provided for.
    #[error("file system {0:?}: too many were added to a restored guest")]
    NoShadow(DeviceId),
    /// The name is taken.
    #[error("device {0:?} exists already")]
    Exists(DeviceId),
    /// The name is not known, or is that of a device that stays.
    #[error("there is no device {0:?}")]
    Unknown(DeviceId),
    /// It may still use memory and descriptors, and goes once it does not.
    #[error("device {0:?}: the host has not finished its I/O")]
    Busy(DeviceId),
    /// There is no vsock device.
    #[error("the machine has no vsock device")]
    NoVsock,
    /// It began as one that gets none.
    #[error("the machine was not made for PCI devices of the node")]
    NoVfio,
    /// A PCI device of the node.
    #[error("PCI device {id:?}")]
    Vfio {
        /// Its group.
        id: DeviceId,
        /// Why not.
        #[source]
        source: VfioError,
    },
    /// No memory can be plugged.
    #[error("the machine has no pluggable memory")]
    NoMemory,
    /// The host refuses something.
    #[error("device {name:?}")]
    Host {
        /// Which device.
        name: String,
        /// What it was.
        #[source]
        source: io::Error,
    },
    /// A disk cannot be what it should be.
    #[error("disk {id:?}")]
    Disk {
        /// Which.
        id: DeviceId,
        /// Why not.
        #[source]
        source: DiskError,
    },
    /// The server of a shared file system.
    #[error("file system {id:?}")]
    FileServer {
        /// Which.
        id: DeviceId,
        /// What is wrong with its server.
        #[source]
        source: BackEndError,
    },
    /// A rate that cannot be.
    #[error("rate of device")]
    Rate(#[from] RateError),
    /// No room on the bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The device thread has ended.
    #[error(transparent)]
    Loop(#[from] LoopGone),
}

/// What a device is wired to.
pub struct Devices {
    bus: Arc<PciBus>,
    routes: Arc<Routes>,
    memory: GuestMemory,
    event_loop: LoopHandle,
    reporter: Reporter,
    plugged: Vec<Plugged>,
    vsock: Option<Arc<Mutex<VirtioPci>>>,
    pluggable_memory: Option<Arc<Mutex<VirtioPci>>>,
    vfio: Option<Vfio>,
    pins: Pins,
    provided: Provided,
}

/// PCI devices of the node, and what they reach.
struct Vfio {
    dma: Arc<DmaSpace>,
    groups: Groups,
}

/// What was made for devices that come later, when no thread can make it.
#[derive(Default)]
struct Provided {
    /// For disks.
    rings: Spares,
    /// For file systems, where guest memory is private. Each is used once.
    shadows: Vec<Shadow>,
}

/// A device that can be unplugged.
struct Plugged {
    id: DeviceId,
    slot: usize,
    /// It was to be removed, and had not come to rest.
    goes: bool,
    function: Arc<Mutex<VirtioPci>>,
}

/// When a device comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// The guest does not run yet: we assign its addresses.
    AtBoot,
    /// The guest does not go on yet: it will look for it and assign its addresses.
    AtRestore,
    /// The guest will look for it and assign its addresses.
    Later,
}

impl Devices {
    /// No device yet. What brings one to a standstill is told on `console`.
    pub fn new(
        bus: Arc<PciBus>,
        routes: Arc<Routes>,
        memory: GuestMemory,
        event_loop: LoopHandle,
        console: Arc<ConsoleOutput>,
    ) -> Self {
        let reporter: Reporter = Arc::new(move |name, error| {
            let why = describe(error).message;
            console.put(format!("husk-vmm: device {name}: {why}\n").as_bytes());
        });
        Self {
            bus,
            routes,
            memory,
            event_loop,
            reporter,
            plugged: Vec::new(),
            vsock: None,
            pluggable_memory: None,
            vfio: None,
            pins: Pins::default(),
            provided: Provided::default(),
        }
    }

    /// Has the machine take PCI devices of the node. Comes before the memory in
    /// `pluggable` does.
    pub fn provide_for_vfio(&mut self, vm: &Arc<VmFd>, pluggable: Range<u64>) {
        let dma = Arc::new(DmaSpace::new(
            self.memory.clone(),
            pluggable,
            self.pins.clone(),
        ));
        let groups = Groups::new(
            Arc::clone(vm),
            Arc::clone(&self.bus),
            Arc::clone(&self.routes),
            Arc::clone(&dma),
            Arc::clone(&self.reporter),
        );
        self.vfio = Some(Vfio { dma, groups });
    }

    /// Makes what later devices need and what no thread can make once it is
    /// confined: a ring for each slot of the bus that is free, and where guest
    /// memory is private, shadows for `file_systems` and one more.
    ///
    /// # Errors
    /// The host refuses something.
    pub fn provide_for_later(&mut self, file_systems: usize) -> Result<(), PlugError> {
        self.provided.rings = Spares::new(self.bus.free_slots());
        if !is_shared(&self.memory.memory()) {
            let shadows = (0..file_systems + SHADOWS_FOR_LATER).map(|_| Shadow::new());
            self.provided.shadows =
                shadows
                    .collect::<Result<_, _>>()
                    .map_err(|source| PlugError::Host {
                        name: "memory for file systems".into(),
                        source,
                    })?;
        }
        Ok(())
    }

    /// Adds what every machine has: the console, if its output goes anywhere, a
    /// source of entropy, and what takes free memory back.
    ///
    /// # Errors
    /// The host refuses something.
    pub fn add_basics(&mut self, console: &ConsoleOutput) -> Result<(), PlugError> {
        let failed = |source| PlugError::Host {
            name: "console".into(),
            source,
        };
        if let Some(pipe) = console.share_pipe().map_err(failed)? {
            let device = Console::new(pipe, console.share_dropped()).map_err(failed)?;
            self.put_on_bus("console", Box::new(device), When::AtBoot)?;
        }
        self.put_on_bus("rng", Box::new(Rng), When::AtBoot)?;
        self.put_on_bus(
            "balloon",
            Box::new(Balloon::new(self.pins.clone())),
            When::AtBoot,
        )?;
        Ok(())
    }

    /// Adds what plugs memory in `range`, unless that is empty.
    ///
    /// # Errors
    /// The host refuses something.
    pub fn add_memory(&mut self, range: Range<u64>, when: When) -> Result<(), PlugError> {
        if !range.is_empty() {
            let mut device = Mem::new(range);
            if let Some(Vfio { dma, .. }) = &self.vfio {
                let dma = Arc::clone(dma);
                device = device.watched_by(Arc::new(move |change| dma.follow(change)));
            }
            let device = Box::new(device);
            let (function, _slot) = self.put_on_bus("memory", device, when)?;
            self.pluggable_memory = Some(function);
        }
        Ok(())
    }

    /// Tells the guest how much of the pluggable memory to have, MiB.
    ///
    /// # Errors
    /// There is none.
    pub fn plug_memory(&self, mib: u32) -> Result<(), PlugError> {
        let device = self.pluggable_memory.as_ref();
        let message = Box::new(Resize(u64::from(mib) << 20));
        tell(device.ok_or(PlugError::NoMemory)?, message)
    }

    /// Adds the vsock device.
    ///
    /// # Errors
    /// A port's socket did not come, or the host refuses something.
    pub fn add_vsock(
        &mut self,
        spec: &VsockSpec,
        descriptors: &mut Descriptors,
    ) -> Result<(), PlugError> {
        let ports = take_ports(&spec.host_ports, descriptors)?;
        let device = Box::new(Vsock::new(spec.cid, ports));
        let (function, _slot) = self.put_on_bus("vsock", device, When::AtBoot)?;
        self.vsock = Some(function);
        Ok(())
    }

    /// Adds a device that has a name.
    ///
    /// # Errors
    /// The specification is wrong, the name taken, the bus full, or the host
    /// refuses something. Nothing has changed then.
    pub fn add(
        &mut self,
        spec: &DeviceSpec,
        descriptors: &mut Descriptors,
        when: When,
    ) -> Result<(), PlugError> {
        let id = spec.id();
        self.check_new(id)?;
        // What was provided for a device is used up once it is made.
        if self.bus.free_slots() == 0 {
            return Err(BusError::Full.into());
        }
        let is_shared = is_shared(&self.memory.memory());
        let device = make(spec, descriptors, when, is_shared, &mut self.provided)?;
        let (function, slot) = self.put_on_bus(id, device, when)?;
        self.plugged.push(Plugged {
            id: id.to_owned(),
            slot,
            goes: false,
            function,
        });
        Ok(())
    }

    /// Adds PCI devices of the node.
    ///
    /// # Errors
    /// The machine takes none, the name is taken, or the host refuses something.
    /// Nothing has changed then.
    pub fn add_vfio(
        &mut self,
        spec: &VfioSpec,
        descriptors: &mut Descriptors,
    ) -> Result<(), PlugError> {
        self.check_new(&spec.id)?;
        let vfio = self.vfio.as_mut().ok_or(PlugError::NoVfio)?;
        let added = vfio.groups.add(spec, descriptors);
        added.map_err(|source| PlugError::Vfio {
            id: spec.id.clone(),
            source,
        })
    }

    fn check_new(&self, id: &str) -> Result<(), PlugError> {
        let mut plugged = self.plugged.iter();
        let is_group = self.vfio.as_ref().is_some_and(|vfio| vfio.groups.has(id));
        match is_group || plugged.any(|plugged| plugged.id == id) {
            true => Err(PlugError::Exists(id.to_owned())),
            false => Ok(()),
        }
    }

    /// Takes a device off the bus. When this returns, it touches neither guest
    /// memory nor its descriptors.
    ///
    /// # Errors
    /// There is no such device, or the host has not finished its I/O in time: it goes
    /// once that is so ([`Devices::remove_late_ones`]).
    pub fn remove(&mut self, id: &str) -> Result<(), PlugError> {
        let groups = self.vfio.as_mut().map(|vfio| &mut vfio.groups);
        if groups.is_some_and(|groups| groups.remove(id)) {
            return Ok(());
        }
        let index = self.plugged.iter().position(|plugged| plugged.id == id);
        let index = index.ok_or_else(|| PlugError::Unknown(id.to_owned()))?;
        match self.let_go(index) {
            true => Ok(()),
            false => Err(PlugError::Busy(id.to_owned())),
        }
    }

    /// Takes a device off the bus if it comes to rest: a guest whose own removal of it
    /// still waits has to be able to read that it does.
    fn let_go(&mut self, index: usize) -> bool {
        let plugged = &mut self.plugged[index];
        plugged.goes = true;
        let function = plugged.function.lock();
        // A vCPU that finds it until it is off the bus has no use of it.
        let rests = function.unwrap_or_else(PoisonError::into_inner).retire();
        if rests {
            self.bus.unplug(plugged.slot);
            self.plugged.swap_remove(index);
        }
        rests
    }

    /// Takes the devices off the bus that were to be removed and have come to rest
    /// since. To be called when [`LoopHandle::given_back`] is readable.
    pub fn remove_late_ones(&mut self) {
        self.event_loop.forget_given_back();
        for index in (0..self.plugged.len()).rev() {
            if self.plugged[index].goes {
                self.let_go(index);
            }
        }
    }

    /// What keeps the machine from being saved: a device whose other half is not
    /// in this process, or has more state than its registers.
    pub fn not_to_be_saved(&self) -> Option<&str> {
        let memory = self.pluggable_memory.as_ref().map(|_| "memory");
        let group = self.vfio.as_ref().and_then(|vfio| vfio.groups.any());
        memory
            .or(group)
            .or_else(|| self.plugged.first().map(|plugged| plugged.id.as_str()))
    }

    /// Lets the guest dial more ports.
    ///
    /// # Errors
    /// A socket did not come, or there is no vsock device.
    pub fn add_host_ports(
        &self,
        ports: &[HostPort],
        descriptors: &mut Descriptors,
    ) -> Result<(), PlugError> {
        let message = AddHostPorts(take_ports(ports, descriptors)?);
        self.tell_vsock(Box::new(message))
    }

    /// The guest may not dial these ports any more.
    ///
    /// # Errors
    /// There is no vsock device.
    pub fn remove_host_ports(&self, ports: Vec<u32>) -> Result<(), PlugError> {
        self.tell_vsock(Box::new(RemoveHostPorts(ports)))
    }

    fn tell_vsock(&self, message: Box<dyn Any + Send>) -> Result<(), PlugError> {
        tell(self.vsock.as_ref().ok_or(PlugError::NoVsock)?, message)
    }

    fn put_on_bus(
        &self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        when: When,
    ) -> Result<(Arc<Mutex<VirtioPci>>, usize), PlugError> {
        let vectors = VirtioPci::vectors_for(device.as_ref());
        let function = self
            .routes
            .vectors(vectors)
            .and_then(|vectors| {
                VirtioPci::new(
                    name,
                    device,
                    self.memory.clone(),
                    self.event_loop.clone(),
                    vectors,
                    Arc::clone(&self.reporter),
                )
            })
            .map_err(|source| PlugError::Host {
                name: name.to_owned(),
                source,
            })?;
        let function = Arc::new(Mutex::new(function));
        let slot = match when {
            When::AtBoot => self.bus.add_at_boot(function.clone())?,
            When::AtRestore | When::Later => self.bus.plug(function.clone())?,
        };
        Ok((function, slot))
    }
}

fn tell(function: &Mutex<VirtioPci>, message: Box<dyn Any + Send>) -> Result<(), PlugError> {
    function
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .control(message)?;
    Ok(())
}

fn take_ports(
    ports: &[HostPort],
    descriptors: &mut Descriptors,
) -> Result<Vec<(u32, OwnedFd)>, PlugError> {
    ports
        .iter()
        .map(|port| {
            descriptors
                .take(port.stream)
                .map(|stream| (port.port, stream))
                .map_err(|source| PlugError::Host {
                    name: format!("vsock host port {}", port.port),
                    source,
                })
        })
        .collect()
}

fn make(
    spec: &DeviceSpec,
    descriptors: &mut Descriptors,
    when: When,
    memory_is_shared: bool,
    provided: &mut Provided,
) -> Result<Box<dyn VirtioDevice>, PlugError> {
    let failed = |source| PlugError::Host {
        name: spec.id().to_owned(),
        source,
    };
    match spec {
        DeviceSpec::Block(block) => {
            let file = descriptors.take(block.file).map_err(failed)?;
            let engine = match when {
                When::AtBoot => Engine::new(),
                When::AtRestore | When::Later => provided.rings.take(),
            };
            let disk = Block::new(file.into(), block.read_only, &block.serial, engine);
            let mut disk = disk.map_err(|source| PlugError::Disk {
                id: block.id.clone(),
                source,
            })?;
            disk.limit(limits(block.rate)?).map_err(failed)?;
            Ok(Box::new(disk))
        }
        DeviceSpec::Net(net) => {
            let tap = descriptors.take(net.tap).map_err(failed)?;
            let mut interface = Net::new(tap, net.mac.0, net.mtu).map_err(failed)?;
            interface.limit(limits(net.rate)?).map_err(failed)?;
            Ok(Box::new(interface))
        }
        DeviceSpec::Fs(spec) => {
            let socket = descriptors.take(spec.socket).map_err(failed)?;
            let patience = match when {
                When::AtBoot | When::AtRestore => fs::START_PATIENCE,
                When::Later => fs::PATIENCE,
            };
            let device = Fs::new(socket, &spec.tag, patience);
            let device = device.map_err(|source| PlugError::FileServer {
                id: spec.id.clone(),
                source,
            })?;
            if memory_is_shared {
                return Ok(Box::new(device));
            }
            let shadow = provided.shadows.pop();
            let shadow = shadow.ok_or_else(|| PlugError::NoShadow(spec.id.clone()))?;
            Ok(Box::new(device.through(shadow)))
        }
    }
}

fn limits(rate: RateSpec) -> Result<Limits, RateError> {
    let bucket = |bucket: Option<BucketSpec>| {
        bucket
            .map(|bucket| Rate::new(bucket.per_second, bucket.burst))
            .transpose()
    };
    Ok(Limits {
        bytes: bucket(rate.bytes)?,
        operations: bucket(rate.operations)?,
    })
}
