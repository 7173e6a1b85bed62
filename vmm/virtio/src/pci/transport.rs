//! A virtio device as a PCI function (virtio 1.2, 4.1).
//!
//! vCPU threads come here one at a time (the bus has a lock around each
//! function). The device's working half is on an event loop's thread, and never
//! comes here: what it says goes through [`Signals`].

use std::any::Any;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::{io, mem};

use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::msix::{self, Msix};
use super::registers::{Action, COMMON_BYTES, Registers};
use super::signals::Signals;
use super::{
    Bar, BarKind, ConfigSpace, FunctionState, Identity, MsiVectors, Notification, PciFunction,
    StateError, VirtioState,
};
use crate::event_loop::{Leaving, LoopGone, LoopHandle, WorkerId};
use crate::{
    ActivateError, Activation, ActiveQueue, DeviceType, GuestMemory, Interrupt, VirtioDevice,
    Worker,
};

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;

// Types of structures (4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_WINDOW: u8 = 5;

// One BAR with a page for each structure.
const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x8000;
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = PAGE;
const DEVICE: u64 = 2 * PAGE;
const NOTIFY: u64 = 3 * PAGE;
const TABLE: u64 = 4 * PAGE;
const PENDING: u64 = 5 * PAGE;

/// Bytes between the places where queues are notified.
const NOTIFY_MULTIPLIER: u32 = 4;

/// Where the body of the window capability's fields are, from its id on
/// (4.1.4.9).
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;

/// How long a device that is reset or taken away may take to come to rest: less than
/// whoever asked for it waits for the answer. A driver waits in the meantime.
const REST_LIMIT: Duration = Duration::from_secs(4);

/// Told of what brings a device to a standstill: the function's name and why.
/// Called from any thread; must not block.
pub type Reporter = Arc<dyn Fn(&str, &dyn Error) + Send + Sync>;

/// Why a device came to a standstill, besides failures of its own.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The driver enabled a queue that is misaligned or not in guest memory.
    #[error("queue {0} cannot be where the driver put it")]
    Queue(u16),
    /// The device did not start to work.
    #[error("activation")]
    Activate(#[source] ActivateError),
    /// An interrupt vector could not be set up.
    #[error("interrupt vector")]
    Vector(#[source] io::Error),
    /// The device's event loop is gone, and its working half with it.
    #[error(transparent)]
    Loop(#[from] LoopGone),
    /// The driver reset it, and the host has not finished what it does for it.
    #[error("reset while the host does not finish its I/O")]
    Busy,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    config: ConfigSpace,
    msix_capability: u16,
    window: u16,
    registers: Registers,
    msix: Msix,
    notifies: Vec<Arc<EventFd>>,
    signals: Arc<Signals>,
    memory: GuestMemory,
    event_loop: LoopHandle,
    /// Gone once it is retired.
    device: Option<Box<dyn VirtioDevice>>,
    working: Working,
}

/// How a device's queues begin.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begin {
    /// The driver has just set them up.
    New,
    /// Their driver was saved and goes on.
    Again,
}

/// Where the device's working half is.
enum Working {
    /// With the device: it is idle.
    Idle,
    /// With the event loop: it is active.
    Active(WorkerId),
    /// With the event loop, which was told to give it back.
    Leaving(Leaving),
    /// Lost with the event loop.
    Lost,
    /// Gone: the function is off the bus.
    Retired,
}

impl VirtioPci {
    /// How many vectors `device` should get: one for each queue and one for
    /// changes of its configuration.
    pub fn vectors_for(device: &dyn VirtioDevice) -> usize {
        device.queue_sizes().len() + 1
    }

    /// Makes a function out of `device`.
    ///
    /// # Errors
    /// Event descriptors could not be had, or the device has too many queues.
    pub fn new(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        event_loop: LoopHandle,
        vectors: Box<dyn MsiVectors>,
        report: Reporter,
    ) -> io::Result<Self> {
        let queues = device.queue_sizes().len();
        if queues >= msix::VECTORS_MAX || vectors.events().is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let notifies = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        let msix = Msix::new(vectors);
        let events = msix.events().to_vec();
        let vectors = events.len();
        let signals = Arc::new(Signals::new(name.into(), report, events, queues)?);

        let mut config = ConfigSpace::new(identity(device.device_type()));
        config.add_bar(BAR, BAR_BYTES, BarKind::Memory32);
        let msix_capability = config.add_capability(msix::CAPABILITY, &msix_body(vectors));
        config.allow_writes(msix_capability + 2, &msix::CONTROL_WRITABLE.to_le_bytes());
        let notify_bytes = queues as u32 * NOTIFY_MULTIPLIER;
        for (structure, offset, len, more) in [
            (CAP_COMMON, COMMON, COMMON_BYTES as u32, None),
            (CAP_ISR, ISR, 1, None),
            (CAP_DEVICE, DEVICE, PAGE as u32, None),
            (CAP_NOTIFY, NOTIFY, notify_bytes, Some(NOTIFY_MULTIPLIER)),
        ] {
            let body = structure_body(structure, offset, len, more);
            config.add_capability(CAPABILITY_VENDOR, &body);
        }
        let window = structure_body(CAP_WINDOW, 0, 0, Some(0));
        let window = config.add_capability(CAPABILITY_VENDOR, &window);
        config.allow_writes(window + WINDOW_BAR, &[0xff]);
        config.allow_writes(window + WINDOW_OFFSET, &[0xff; 12]);

        Ok(Self {
            registers: Registers::new(device.offered_features(), device.queue_sizes()),
            config,
            msix_capability,
            window,
            msix,
            notifies,
            signals,
            memory,
            event_loop,
            device: Some(device),
            working: Working::Idle,
        })
    }

    /// Hands a message to the device, wherever its working half is.
    ///
    /// # Errors
    /// The event loop has stopped.
    pub fn control(&mut self, message: Box<dyn Any + Send>) -> Result<(), LoopGone> {
        match self.working {
            Working::Idle => {
                self.device.as_mut().ok_or(LoopGone)?.control(message);
                Ok(())
            }
            Working::Active(id) => self.event_loop.control(id, message),
            Working::Leaving(_) | Working::Lost | Working::Retired => Err(LoopGone),
        }
    }

    /// Stops the device for good and gives up what it holds. A vCPU may be about to
    /// access a register though the function is off the bus; that does nothing any
    /// more. False: what it does for the guest has not come to rest within
    /// [`REST_LIMIT`], or had not when this was last asked for.
    #[must_use]
    pub fn retire(&mut self) -> bool {
        let (working, _) = self.take_back();
        self.working = working;
        if let Working::Leaving(_) = self.working {
            return false;
        }
        // With a loop that is gone, so is what worked there.
        self.working = Working::Retired;
        self.device = None;
        true
    }

    /// Takes the working half back from the event loop, for which [`REST_LIMIT`] has
    /// to do the first time. What is left is still to be put into `working`.
    fn take_back(&mut self) -> (Working, Option<Box<dyn Worker>>) {
        let (leaving, limit) = match mem::replace(&mut self.working, Working::Lost) {
            Working::Active(id) => match self.event_loop.remove(id) {
                Ok(leaving) => (leaving, REST_LIMIT),
                Err(LoopGone) => return (Working::Lost, None),
            },
            // Nobody waits twice: other processors may wait for this one.
            Working::Leaving(leaving) => (leaving, Duration::ZERO),
            other => return (other, None),
        };
        match leaving.wait(limit) {
            Ok(Some(worker)) => (Working::Idle, Some(worker)),
            Ok(None) => (Working::Leaving(leaving), None),
            Err(LoopGone) => (Working::Lost, None),
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Reset => self.reset(),
            Action::Activate => {
                if let Err(error) = self.activate(Begin::New) {
                    self.signals.fail(&error);
                }
            }
            Action::RefuseQueue(queue) => self.signals.fail(&TransportError::Queue(queue)),
        }
    }

    fn activate(&mut self, begin: Begin) -> Result<(), TransportError> {
        if let Working::Leaving(_) = self.working {
            return Err(TransportError::Busy);
        }
        self.signals.set_driver_ok();
        let features = self.registers.negotiated_features();
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut rings = self.registers.rings(&self.memory.memory(), event_idx);
        if begin == Begin::Again {
            for (queue, ring) in (0..).zip(&mut rings) {
                if let Some(ring) = ring {
                    self.go_on(ring).ok_or(TransportError::Queue(queue))?;
                }
            }
        }
        let notifies: Vec<_> = (0..)
            .zip(&self.notifies)
            .zip(&rings)
            .filter(|(_, ring)| ring.is_some())
            .map(|((queue, notify), _)| (queue, Arc::clone(notify)))
            .collect();
        let queues = rings
            .into_iter()
            .zip(&self.notifies)
            .map(|(queue, notify)| {
                queue.map(|queue| ActiveQueue {
                    queue,
                    notify: Arc::clone(notify),
                })
            })
            .collect();
        let worker = self
            .device
            .as_mut()
            .ok_or(LoopGone)?
            .activate(Activation {
                memory: self.memory.clone(),
                queues,
                negotiated_features: features,
                interrupt: Arc::clone(&self.signals) as Arc<dyn Interrupt>,
            })
            .map_err(TransportError::Activate)?;
        let signals = Arc::clone(&self.signals);
        let on_failure = Box::new(move |error: &crate::DeviceError| signals.fail(error));
        self.working = Working::Lost;
        self.working = Working::Active(self.event_loop.add(worker, notifies, on_failure)?);
        Ok(())
    }

    /// Has the device go on where the used ring ends.
    fn go_on(&self, ring: &mut Queue) -> Option<()> {
        let used = ring
            .used_idx(&*self.memory.memory(), Ordering::Acquire)
            .ok()?;
        ring.set_next_used(used.0);
        ring.set_next_avail(used.0);
        Some(())
    }

    /// Notifications and interrupts may have been on their way when the machine
    /// was saved. Both sides look once more: neither minds one too many.
    fn wake_both_sides(&self) -> io::Result<()> {
        for (queue, notify) in (0..).zip(&self.notifies) {
            notify.write(1)?;
            self.signals.signal_queue(queue)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        let taken = self.take_back();
        self.finish_reset(taken);
    }

    /// A reset that was late, for a driver that waits for it.
    fn look_whether_it_rests(&mut self) {
        if let Working::Leaving(_) = self.working {
            match self.take_back() {
                (working @ Working::Leaving(_), _) => self.working = working,
                taken => self.finish_reset(taken),
            }
        }
    }

    fn finish_reset(&mut self, (working, worker): (Working, Option<Box<dyn Worker>>)) {
        self.working = working;
        if let (Some(device), Some(worker)) = (&mut self.device, worker) {
            device.reset(worker);
        }
        self.registers.reset();
        self.signals.reset();
        self.msix.forget_pending();
        for notify in &self.notifies {
            let _ = notify.read();
        }
        match self.working {
            Working::Lost => self.signals.fail(&TransportError::Loop(LoopGone)),
            // The status does not become zero, so the driver waits (4.1.4.3.2).
            Working::Leaving(_) => self.signals.fail(&TransportError::Busy),
            Working::Idle | Working::Active(_) | Working::Retired => {}
        }
    }

    fn check_vectors(&self, result: io::Result<()>) {
        if let Err(error) = result {
            self.signals.fail(&TransportError::Vector(error));
        }
    }

    /// The access that the window capability describes, if `offset` and `len`
    /// touch its data (4.1.4.9.1).
    fn window_access(&self, offset: u16, len: usize) -> Option<(u64, usize)> {
        let data = usize::from(self.window + WINDOW_DATA);
        let first = usize::from(offset);
        if first >= data + 4 || first + len <= data {
            return None;
        }
        let mut word = [0; 4];
        self.config.read(self.window + WINDOW_BAR, &mut word[..1]);
        let bar = word[0];
        self.config.read(self.window + WINDOW_OFFSET, &mut word);
        let at = u64::from(u32::from_le_bytes(word));
        self.config.read(self.window + WINDOW_LENGTH, &mut word);
        let len = u32::from_le_bytes(word);
        let sound = bar == BAR && matches!(len, 1 | 2 | 4) && at % u64::from(len) == 0;
        sound.then_some((at, len as usize))
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if let Some((at, len)) = self.window_access(offset, data.len()) {
            let mut value = [0; 4];
            self.read_bar(BAR, at, &mut value[..len]);
            let _ = self.config.write(self.window + WINDOW_DATA, &value[..len]);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) -> bool {
        let moved = self.config.write(offset, data);
        if let Some((at, len)) = self.window_access(offset, data.len()) {
            let mut value = [0; 4];
            self.config.read(self.window + WINDOW_DATA, &mut value);
            self.write_bar(BAR, at, &value[..len]);
        }
        let mut control = [0; 2];
        self.config.read(self.msix_capability + 2, &mut control);
        let result = self.msix.set_control(u16::from_le_bytes(control));
        self.check_vectors(result);
        moved
    }

    fn bars(&self) -> Vec<Bar> {
        self.config.bars().collect()
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != BAR || offset >= BAR_BYTES {
            return;
        }
        let at = (offset % PAGE) as usize;
        match offset - offset % PAGE {
            COMMON => {
                self.look_whether_it_rests();
                self.registers.read(&self.signals, at, data);
            }
            ISR if at == 0 && !data.is_empty() => data[0] = self.signals.take_isr(),
            DEVICE => {
                if let Some(device) = &self.device {
                    device.read_config(at as u64, data);
                }
            }
            TABLE => self.msix.read_table(at, data),
            PENDING => self.msix.read_pending(at, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if bar != BAR || offset >= BAR_BYTES || matches!(self.working, Working::Retired) {
            return;
        }
        let at = (offset % PAGE) as usize;
        match offset - offset % PAGE {
            COMMON => {
                let memory = self.memory.memory();
                let action = self.registers.write(&self.signals, &memory, at, data);
                drop(memory);
                if let Some(action) = action {
                    self.act(action);
                }
            }
            DEVICE => {
                if let Some(device) = &mut self.device {
                    device.write_config(at as u64, data);
                }
            }
            NOTIFY => {
                if let Some(notify) = self.notifies.get(at / NOTIFY_MULTIPLIER as usize) {
                    let _ = notify.write(1);
                }
            }
            TABLE => {
                let result = self.msix.write_table(at, data);
                self.check_vectors(result);
            }
            _ => {}
        }
    }

    fn save(&self) -> Result<FunctionState, StateError> {
        if let Working::Leaving(_) | Working::Lost | Working::Retired = self.working {
            return Err(LoopGone.into());
        }
        let (table, pending) = self.msix.save();
        Ok(FunctionState {
            config: self.config.save(),
            virtio: Some(VirtioState {
                registers: self.registers.save(),
                signals: self.signals.save(),
                table,
                pending,
            }),
        })
    }

    fn restore(&mut self, saved: &FunctionState) -> Result<(), StateError> {
        let Some(virtio) = &saved.virtio else {
            return Err(StateError::Unlike("device"));
        };
        self.config.restore(&saved.config)?;
        let ready = self.registers.restore(&virtio.registers)?;
        self.signals.restore(&virtio.signals, ready)?;
        let mut control = [0; 2];
        self.config.read(self.msix_capability + 2, &mut control);
        self.msix
            .restore(&virtio.table, u16::from_le_bytes(control))?;
        for vector in &virtio.pending {
            self.signals
                .restore_pending(*vector)
                .map_err(StateError::Vector)?;
        }
        // One that has failed waits for its reset.
        if ready && !virtio.signals.needs_reset {
            if let Some(device) = &mut self.device {
                device.restored();
            }
            self.activate(Begin::Again)?;
            self.wake_both_sides().map_err(StateError::Vector)?;
        }
        Ok(())
    }

    fn notifications(&self) -> Vec<Notification> {
        (0_u64..)
            .zip(&self.notifies)
            .map(|(queue, notify)| Notification {
                bar: BAR,
                offset: NOTIFY + queue * u64::from(NOTIFY_MULTIPLIER),
                event: Arc::clone(notify),
            })
            .collect()
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.working = self.take_back().0;
    }
}

fn identity(device_type: DeviceType) -> Identity {
    let number = device_type as u16;
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + number,
        revision: 1,
        class: match device_type {
            DeviceType::Net => 0x02_00_00,
            DeviceType::Block | DeviceType::Fs => 0x01_80_00,
            DeviceType::Console => 0x07_80_00,
            DeviceType::Vsock => 0x02_80_00,
            DeviceType::Mem => 0x05_80_00,
            DeviceType::Rng | DeviceType::Balloon => 0xff_00_00,
        },
        subsystem_vendor: VENDOR,
        subsystem: DEVICE_BASE + number,
    }
}

/// The MSI-X capability after id and pointer.
fn msix_body(vectors: usize) -> [u8; 10] {
    let mut body = [0; 10];
    // VECTORS_MAX fits.
    body[..2].copy_from_slice(&(vectors as u16 - 1).to_le_bytes());
    body[2..6].copy_from_slice(&(TABLE as u32 | u32::from(BAR)).to_le_bytes());
    body[6..].copy_from_slice(&(PENDING as u32 | u32::from(BAR)).to_le_bytes());
    body
}

/// `struct virtio_pci_cap` after id and pointer, and the word that some have
/// after it (4.1.4).
fn structure_body(structure: u8, offset: u64, len: u32, more: Option<u32>) -> Vec<u8> {
    let total = if more.is_some() { 20 } else { 16 };
    let mut body = vec![total, structure, BAR, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend(more.into_iter().flat_map(u32::to_le_bytes));
    body
}

#[cfg(test)]
mod tests;
