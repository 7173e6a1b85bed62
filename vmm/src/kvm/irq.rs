//! Message-signalled interrupts: every vector is an event descriptor (irqfd)
//! and, while it is connected, a route from a GSI to a message.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_virtio::pci::{MsiMessage, MsiVectors};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// KVM takes up to 4096 routes (`KVM_MAX_IRQ_ROUTES`).
const GSIS: usize = 4096;

/// The machine's GSIs. KVM takes all routes at once, so they are kept here.
pub struct Routes {
    vm: Arc<VmFd>,
    gsis: Mutex<Vec<Gsi>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gsi {
    Free,
    Taken,
    Routed(MsiMessage),
}

impl Routes {
    /// No route yet.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            gsis: Mutex::new(Vec::new()),
        })
    }

    /// Vectors for a function, all disconnected.
    ///
    /// # Errors
    /// The host has no event descriptors left, or KVM no GSIs.
    pub fn vectors(self: &Arc<Self>, count: usize) -> io::Result<Box<dyn MsiVectors>> {
        let mut vectors = Vectors {
            routes: Arc::clone(self),
            events: Vec::new(),
            lines: Vec::new(),
        };
        for _ in 0..count {
            vectors
                .events
                .push(Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?));
            vectors.lines.push(Line {
                gsi: self.take()?,
                connected: false,
            });
        }
        Ok(Box::new(vectors))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Gsi>> {
        self.gsis.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> io::Result<u32> {
        let mut gsis = self.lock();
        let free = gsis.iter().position(|gsi| *gsi == Gsi::Free);
        let index = match free {
            Some(index) => index,
            None if gsis.len() < GSIS => {
                gsis.push(Gsi::Free);
                gsis.len() - 1
            }
            None => return Err(io::Error::other("no GSI is left")),
        };
        if let Some(gsi) = gsis.get_mut(index) {
            *gsi = Gsi::Taken;
        }
        Ok(index as u32)
    }

    fn give_back(&self, gsi: u32) {
        if let Some(gsi) = self.lock().get_mut(gsi as usize) {
            // The kernel's route stays until the next change; nothing raises it.
            *gsi = Gsi::Free;
        }
    }

    fn route(&self, gsi: u32, message: MsiMessage) -> io::Result<()> {
        let mut gsis = self.lock();
        let Some(slot) = gsis.get_mut(gsi as usize) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if *slot == Gsi::Routed(message) {
            return Ok(());
        }
        let before = std::mem::replace(slot, Gsi::Routed(message));
        let set = self.set_routes(&gsis);
        // A route that KVM refused is tried again when it is asked for again.
        if let (Err(_), Some(slot)) = (&set, gsis.get_mut(gsi as usize)) {
            *slot = before;
        }
        set
    }

    fn set_routes(&self, gsis: &[Gsi]) -> io::Result<()> {
        let entries: Vec<_> = gsis
            .iter()
            .enumerate()
            .filter_map(|(index, gsi)| match gsi {
                Gsi::Routed(message) => Some(entry(index as u32, *message)),
                Gsi::Free | Gsi::Taken => None,
            })
            .collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::other("more routes than KVM takes"))?;
        self.vm.set_gsi_routing(&table)?;
        Ok(())
    }
}

fn entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

/// The vectors of one function.
struct Vectors {
    routes: Arc<Routes>,
    events: Vec<Arc<EventFd>>,
    lines: Vec<Line>,
}

struct Line {
    gsi: u32,
    connected: bool,
}

impl Vectors {
    fn at(&mut self, vector: u16) -> io::Result<(&EventFd, &mut Line)> {
        let index = usize::from(vector);
        match (self.events.get(index), self.lines.get_mut(index)) {
            (Some(event), Some(line)) => Ok((event, line)),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl MsiVectors for Vectors {
    fn events(&self) -> &[Arc<EventFd>] {
        &self.events
    }

    fn connect(&mut self, vector: u16, message: MsiMessage) -> io::Result<()> {
        let routes = Arc::clone(&self.routes);
        let (event, line) = self.at(vector)?;
        routes.route(line.gsi, message)?;
        if !line.connected {
            routes.vm.register_irqfd(event, line.gsi)?;
            line.connected = true;
        }
        Ok(())
    }

    fn disconnect(&mut self, vector: u16) -> io::Result<()> {
        let routes = Arc::clone(&self.routes);
        let (event, line) = self.at(vector)?;
        if line.connected {
            routes.vm.unregister_irqfd(event, line.gsi)?;
            line.connected = false;
        }
        Ok(())
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        for (event, line) in self.events.iter().zip(&self.lines) {
            if line.connected {
                // Can only fail if it was not connected.
                let _ = self.routes.vm.unregister_irqfd(event, line.gsi);
            }
            self.routes.give_back(line.gsi);
        }
    }
}
