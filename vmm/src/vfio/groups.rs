//! The groups of the node's devices that the machine has.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use husk_virtio::pci::Reporter;
use husk_vmm_spec::VfioSpec;
use kvm_bindings::{
    KVM_DEV_VFIO_GROUP, KVM_DEV_VFIO_GROUP_ADD, KVM_DEV_VFIO_GROUP_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

use super::function::VfioFunction;
use super::hardware::NodeFunction;
use super::{DmaSpace, VfioError, failed};
use crate::kvm::irq::Routes;
use crate::packet::Descriptors;
use crate::pci::PciBus;

/// All of them, and what they are plugged into.
pub struct Groups {
    vm: Arc<VmFd>,
    bus: Arc<PciBus>,
    routes: Arc<Routes>,
    dma: Arc<DmaSpace>,
    reporter: Reporter,
    /// Tells KVM which groups the machine has; made for the first.
    kvm: Option<DeviceFd>,
    plugged: Vec<Group>,
}

/// Fields are dropped from the first down: a group is given up after its devices.
struct Group {
    id: String,
    functions: Vec<(usize, Arc<Mutex<VfioFunction>>)>,
    group: OwnedFd,
    container: Arc<OwnedFd>,
}

impl Groups {
    /// None yet.
    pub fn new(
        vm: Arc<VmFd>,
        bus: Arc<PciBus>,
        routes: Arc<Routes>,
        dma: Arc<DmaSpace>,
        reporter: Reporter,
    ) -> Self {
        Self {
            vm,
            bus,
            routes,
            dma,
            reporter,
            kvm: None,
            plugged: Vec::new(),
        }
    }

    /// Whether there is one of this name.
    pub fn has(&self, id: &str) -> bool {
        self.plugged.iter().any(|group| group.id == id)
    }

    /// One of them.
    pub fn any(&self) -> Option<&str> {
        self.plugged.first().map(|group| group.id.as_str())
    }

    /// Plugs the functions of a group.
    ///
    /// # Errors
    /// The kernel refuses, or a function cannot be a machine's. Nothing has changed
    /// then.
    pub fn add(&mut self, spec: &VfioSpec, descriptors: &mut Descriptors) -> Result<(), VfioError> {
        let mut take = |descriptor| {
            let taken = descriptors.take(descriptor);
            taken.map_err(failed("take a descriptor"))
        };
        let container = Arc::new(take(spec.container)?);
        let group = take(spec.group)?;
        // First, as all of the rest is quick.
        self.dma.add(&container).map_err(failed(
            "VFIO_IOMMU_MAP_DMA of guest memory, which is pinned on the node",
        ))?;
        let mut plugged = Group {
            id: spec.id.clone(),
            functions: Vec::new(),
            group,
            container,
        };
        let mut made = self.tell_kvm(KVM_DEV_VFIO_GROUP_ADD, plugged.group.as_fd());
        for function in &spec.functions {
            made = made.and_then(|()| {
                let device = take(function.device)?;
                let function = self.function(&spec.id, device, function.slot)?;
                plugged.functions.push(function);
                Ok(())
            });
        }
        match made {
            Ok(()) => self.plugged.push(plugged),
            Err(_) => self.take_off(plugged),
        }
        made
    }

    /// Takes the functions of a group off the bus. When this returns, they touch no
    /// guest memory and the node has them back. False: there is no such group.
    pub fn remove(&mut self, id: &str) -> bool {
        let index = self.plugged.iter().position(|group| group.id == id);
        match index {
            Some(index) => {
                let group = self.plugged.swap_remove(index);
                self.take_off(group);
                true
            }
            None => false,
        }
    }

    fn function(
        &self,
        name: &str,
        device: OwnedFd,
        slot: u8,
    ) -> Result<(usize, Arc<Mutex<VfioFunction>>), VfioError> {
        let (hardware, description) = NodeFunction::new(device, Arc::clone(&self.vm), slot)?;
        let vectors = self.routes.vectors(description.vectors);
        let vectors = vectors.map_err(failed("interrupt vectors"))?;
        let function = VfioFunction::new(
            name,
            description,
            Box::new(hardware),
            vectors,
            Arc::clone(&self.reporter),
        )?;
        let function = Arc::new(Mutex::new(function));
        let plugged = self.bus.plug_into(usize::from(slot), function.clone());
        plugged.map_err(|_| VfioError::Slot(slot))?;
        Ok((usize::from(slot), function))
    }

    fn take_off(&mut self, group: Group) {
        for (slot, function) in &group.functions {
            self.bus.unplug(*slot);
            // A vCPU that found it before may still hold it.
            let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
            function.retire();
        }
        if let Err(error) = self.tell_kvm(KVM_DEV_VFIO_GROUP_DEL, group.group.as_fd()) {
            (self.reporter)(&group.id, &error);
        }
        self.dma.remove(&group.container);
    }

    /// KVM has to know: some devices bypass the caches of processors, which it then
    /// lets the guest flush (`KVM_DEV_TYPE_VFIO`, Linux's
    /// Documentation/virt/kvm/devices/vfio.rst).
    fn tell_kvm(&mut self, change: u32, group: BorrowedFd<'_>) -> Result<(), VfioError> {
        let kvm = match self.kvm.take() {
            Some(kvm) => kvm,
            None => {
                let mut device = kvm_create_device {
                    type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
                    ..Default::default()
                };
                let made = self.vm.create_device(&mut device);
                made.map_err(|error| failed("KVM_CREATE_DEVICE")(error.into()))?
            }
        };
        let number = group.as_raw_fd();
        let attribute = kvm_device_attr {
            group: KVM_DEV_VFIO_GROUP,
            attr: change.into(),
            addr: &raw const number as u64,
            flags: 0,
        };
        let told = self.kvm.insert(kvm).set_device_attr(&attribute);
        told.map_err(|error| failed("KVM_SET_DEVICE_ATTR")(io::Error::from(error)))
    }
}
