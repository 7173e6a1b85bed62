//! The bus: configuration mechanism 1 (PCI 3.0, 3.2.2.3.2), and the addresses
//! where functions answer.
//!
//! Two locks, taken in this order: `config` is held for a whole configuration
//! access and for plugging; `map` only to look up or change who answers where.
//! Registers are accessed with neither held where they lie in memory space, and
//! with `config` held through a window in configuration space.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use husk_virtio::pci::{Bar, FunctionState, Notification, PciFunction, StateError};
use husk_vmm_spec::PCI_SLOTS as SLOTS;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use serde::{Deserialize, Serialize};

use crate::arch::x86_64::layout;
use crate::bounded::at_most;

/// First port: the address register; the data register follows it.
pub const ADDRESS_PORT: u16 = 0xcf8;
/// The data register's first port.
pub const DATA_PORT: u16 = 0xcfc;

const ADDRESS_ENABLE: u32 = 1 << 31;

const BAR_0: u16 = 0x10;

/// A function that the bus and its owner both reach.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// A function that the bus cannot take.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// All slots are taken.
    #[error("all {SLOTS} slots of the PCI bus are taken")]
    Full,
    /// That slot is not free, or not on this bus.
    #[error("slot {0} of the PCI bus is not free")]
    Taken(usize),
    /// No addresses are left for its registers.
    #[error("no addresses are left for {size:#x} bytes of PCI registers")]
    NoAddresses {
        /// What did not fit.
        size: u64,
    },
}

/// What of a bus is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusState {
    /// The address register.
    address: u32,
    /// Each slot that is taken.
    #[serde(deserialize_with = "at_most::<SLOTS, _, _>")]
    functions: Vec<(u8, FunctionState)>,
}

/// A function that cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// The function itself says so.
    #[error("PCI slot {slot}")]
    Function {
        /// Which.
        slot: usize,
        /// What it says.
        #[source]
        source: StateError,
    },
    /// There are others.
    #[error("other PCI slots are taken than when the machine was saved")]
    Slots,
}

/// The bus.
pub struct PciBus {
    vm: Arc<VmFd>,
    /// Addresses that functions cannot have.
    taken: Vec<Range<u64>>,
    config: Mutex<Config>,
    map: RwLock<Vec<Mapping>>,
}

struct Config {
    address: u32,
    slots: [Option<Slot>; SLOTS],
    /// First address of the window that was not handed out at boot.
    next_address: u64,
}

struct Slot {
    function: SharedFunction,
    notifications: Vec<Notification>,
    /// Where KVM writes event descriptors by itself.
    ioeventfds: Vec<(u64, Notification)>,
}

/// A function answers here.
#[derive(Clone)]
struct Mapping {
    range: Range<u64>,
    slot: usize,
    bar: u8,
    function: SharedFunction,
}

impl PciBus {
    /// An empty bus of the machine `vm`, whose memory is at `memory`.
    pub fn new(vm: Arc<VmFd>, memory: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut taken: Vec<_> = memory.into_iter().collect();
        taken.push(layout::PCI_WINDOW.end..layout::HOLE_END);
        Self {
            vm,
            taken,
            config: Mutex::new(Config {
                address: 0,
                slots: [const { None }; SLOTS],
                next_address: layout::PCI_WINDOW.start,
            }),
            map: RwLock::new(Vec::new()),
        }
    }

    /// Puts a function into the first free slot and, as firmware would, gives it
    /// addresses. Answers the slot.
    ///
    /// # Errors
    /// No slot or addresses are left.
    pub fn add_at_boot(&self, function: SharedFunction) -> Result<usize, BusError> {
        let mut config = self.config();
        let bars = lock(&function).bars();
        let mut next = config.next_address;
        for bar in bars {
            let no_room = BusError::NoAddresses { size: bar.size };
            let start = next.checked_next_multiple_of(bar.size);
            let end = start.and_then(|start| start.checked_add(bar.size));
            let (Some(start), Some(end)) = (start, end) else {
                return Err(no_room);
            };
            if end > layout::PCI_WINDOW.end {
                return Err(no_room);
            }
            // Decoding is off, so nothing moves yet.
            let _moved = lock(&function).write_config(
                BAR_0 + 4 * u16::from(bar.index),
                &(start as u32).to_le_bytes(),
            );
            next = end;
        }
        let slot = config.add(function)?;
        config.next_address = next;
        Ok(slot)
    }

    /// Puts a function into a free slot; the guest finds it when it looks again,
    /// and gives it addresses. Answers the slot.
    ///
    /// # Errors
    /// No slot is left.
    pub fn plug(&self, function: SharedFunction) -> Result<usize, BusError> {
        self.config().add(function)
    }

    /// Likewise, into that slot.
    ///
    /// # Errors
    /// It is taken.
    pub fn plug_into(&self, slot: usize, function: SharedFunction) -> Result<(), BusError> {
        self.config().put(slot, function)
    }

    /// How many slots are free.
    pub fn free_slots(&self) -> usize {
        let config = self.config();
        config.slots.iter().filter(|slot| slot.is_none()).count()
    }

    /// Takes the function out of a slot.
    pub fn unplug(&self, slot: usize) -> Option<SharedFunction> {
        let mut config = self.config();
        self.map_mut(|map| map.retain(|mapping| mapping.slot != slot));
        let mut removed = config.slots.get_mut(slot)?.take()?;
        self.drop_ioeventfds(&mut removed);
        Some(removed.function)
    }

    /// What the guest has written to the registers of all functions.
    ///
    /// # Errors
    /// A device has failed with its thread.
    pub fn save(&self) -> Result<BusState, SlotError> {
        let config = self.config();
        let mut functions = Vec::new();
        for (slot, taken) in config.slots.iter().enumerate() {
            if let Some(taken) = taken {
                let state = lock(&taken.function).save();
                let state = state.map_err(|source| SlotError::Function { slot, source })?;
                // SLOTS fit.
                functions.push((slot as u8, state));
            }
        }
        Ok(BusState {
            address: config.address,
            functions,
        })
    }

    /// Has functions that were just made go on as those that were saved. The
    /// processors must have been restored: what was pending may interrupt them.
    ///
    /// # Errors
    /// They are not alike, or the host refuses something.
    pub fn restore(&self, saved: &BusState) -> Result<(), SlotError> {
        let mut config = self.config();
        let taken = config.slots.iter().enumerate();
        let taken = taken.filter(|(_, taken)| taken.is_some());
        if !taken
            .map(|(slot, _)| slot)
            .eq(saved.functions.iter().map(|(slot, _)| usize::from(*slot)))
        {
            return Err(SlotError::Slots);
        }
        config.address = saved.address;
        let slots = config.slots.iter_mut().enumerate();
        let slots = slots.filter_map(|(number, slot)| Some((number, slot.as_mut()?)));
        for ((number, slot), (_, state)) in slots.zip(&saved.functions) {
            let restored = lock(&slot.function).restore(state);
            restored.map_err(|source| SlotError::Function {
                slot: number,
                source,
            })?;
            self.remap(number, slot);
        }
        Ok(())
    }

    /// Takes a guest's read from `port`, which is one of the eight.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let config = self.config();
        if port == ADDRESS_PORT && data.len() == 4 {
            data.copy_from_slice(&config.address.to_le_bytes());
        } else if let Some((slot, offset)) = config.target(port, data.len())
            && let Some(Some(slot)) = config.slots.get(slot)
        {
            lock(&slot.function).read_config(offset, data);
        }
    }

    /// Takes a guest's write to `port`, which is one of the eight.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        let mut config = self.config();
        if port == ADDRESS_PORT {
            if let Ok(address) = <[u8; 4]>::try_from(data) {
                config.address = u32::from_le_bytes(address);
            }
        } else if let Some((number, offset)) = config.target(port, data.len())
            && let Some(Some(slot)) = config.slots.get_mut(number)
        {
            let moved = lock(&slot.function).write_config(offset, data);
            if moved {
                self.remap(number, slot);
            }
        }
    }

    /// Takes a guest's read from memory space; zeroes where nobody answers.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(mapping) = self.find(address, data.len()) {
            lock(&mapping.function).read_bar(mapping.bar, address - mapping.range.start, data);
        }
    }

    /// Takes a guest's write to memory space; dropped where nobody answers.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some(mapping) = self.find(address, data.len()) {
            lock(&mapping.function).write_bar(mapping.bar, address - mapping.range.start, data);
        }
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        lock(&self.config)
    }

    fn find(&self, address: u64, length: usize) -> Option<Mapping> {
        let end = address.checked_add(length as u64)?;
        self.map
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .find(|mapping| mapping.range.start <= address && end <= mapping.range.end)
            .cloned()
    }

    fn map_mut<R>(&self, change: impl FnOnce(&mut Vec<Mapping>) -> R) -> R {
        change(&mut self.map.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes a function answer where its BARs now say. A BAR that would lie over
    /// memory or over another function answers nowhere.
    fn remap(&self, number: usize, slot: &mut Slot) {
        self.drop_ioeventfds(slot);
        let bars = lock(&slot.function).bars();
        let placed: Vec<Bar> = self.map_mut(|map| {
            map.retain(|mapping| mapping.slot != number);
            bars.into_iter()
                .filter(|bar| bar.decoded)
                .filter(|bar| {
                    let range = bar.address..bar.address.saturating_add(bar.size);
                    let overlaps =
                        |other: &Range<u64>| other.start < range.end && range.start < other.end;
                    let free = !self.taken.iter().any(overlaps)
                        && !map.iter().any(|mapping| overlaps(&mapping.range));
                    if free {
                        map.push(Mapping {
                            range,
                            slot: number,
                            bar: bar.index,
                            function: Arc::clone(&slot.function),
                        });
                    }
                    free
                })
                .collect()
        });
        lock(&slot.function).placed(&placed);
        for bar in placed {
            for notification in slot.notifications.iter().filter(|n| n.bar == bar.index) {
                let address = bar.address.saturating_add(notification.offset);
                // If KVM has no room, the write reaches the function instead.
                if self
                    .vm
                    .register_ioevent(
                        &notification.event,
                        &IoEventAddress::Mmio(address),
                        NoDatamatch,
                    )
                    .is_ok()
                {
                    slot.ioeventfds.push((address, notification.clone()));
                }
            }
        }
    }

    fn drop_ioeventfds(&self, slot: &mut Slot) {
        for (address, notification) in slot.ioeventfds.drain(..) {
            // Can only fail if it was not registered.
            let _ = self.vm.unregister_ioevent(
                &notification.event,
                &IoEventAddress::Mmio(address),
                NoDatamatch,
            );
        }
    }
}

impl Config {
    fn add(&mut self, function: SharedFunction) -> Result<usize, BusError> {
        let free = self.slots.iter().position(Option::is_none);
        let number = free.ok_or(BusError::Full)?;
        self.put(number, function)?;
        Ok(number)
    }

    fn put(&mut self, number: usize, function: SharedFunction) -> Result<(), BusError> {
        let notifications = lock(&function).notifications();
        let slot = self.slots.get_mut(number).filter(|slot| slot.is_none());
        *slot.ok_or(BusError::Taken(number))? = Some(Slot {
            function,
            notifications,
            ioeventfds: Vec::new(),
        });
        Ok(())
    }

    /// Slot and offset that an access to the data register means. Only bus 0 and
    /// functions 0 exist.
    fn target(&self, port: u16, length: usize) -> Option<(usize, u16)> {
        let byte = port.checked_sub(DATA_PORT)?;
        if self.address & ADDRESS_ENABLE == 0 || usize::from(byte) + length > 4 {
            return None;
        }
        let bus_and_function = self.address & 0x7fff_0700;
        let slot = (self.address >> 11 & 0x1f) as usize;
        let register = (self.address & 0xfc) as u16;
        (bus_and_function & 0x00ff_0700 == 0).then_some((slot, register + byte))
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
