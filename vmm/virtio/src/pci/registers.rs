//! The common configuration structure (virtio 1.2, 4.1.4.3): feature
//! negotiation, the device's status, set-up of queues.

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::StateError;
use super::signals::Signals;
use super::state::{QueueState, RegistersState};

/// Bytes of the structure.
pub(super) const COMMON_BYTES: usize = 0x38;

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

/// What a write asks of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Bring the device to its initial state.
    Reset,
    /// The driver is ready.
    Activate,
    /// The driver enabled a queue that cannot be.
    RefuseQueue(u16),
}

/// The registers, apart from the interrupt vectors, which [`Signals`] has.
pub(super) struct Registers {
    offered: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

/// A queue as the driver sets it up.
struct QueueSetup {
    max_size: u16,
    size: u16,
    enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }

    fn save(&self) -> QueueState {
        QueueState {
            size: self.size,
            enabled: self.enabled,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
        }
    }

    /// Where the rings lie is checked when the device starts to work.
    fn restore(&mut self, saved: &QueueState) -> Result<(), StateError> {
        if !saved.size.is_power_of_two() || saved.size > self.max_size {
            return Err(StateError::Unlike("queue"));
        }
        self.size = saved.size;
        self.enabled = saved.enabled;
        self.descriptors = saved.descriptors;
        self.available = saved.available;
        self.used = saved.used;
        Ok(())
    }

    /// The ring, if it is aligned and in guest memory.
    fn ring(&self, memory: &GuestMemoryMmap, event_idx: bool) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        let addresses = [self.descriptors, self.available, self.used].map(GuestAddress);
        queue.try_set_desc_table_address(addresses[0]).ok()?;
        queue.try_set_avail_ring_address(addresses[1]).ok()?;
        queue.try_set_used_ring_address(addresses[2]).ok()?;
        // The queue takes address 0 for "not set up yet".
        let set_up = self.available != 0;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        (set_up && queue.is_valid(memory)).then_some(queue)
    }
}

impl Registers {
    pub(super) fn new(offered: u64, queue_sizes: &[u16]) -> Self {
        Self {
            offered: offered | 1 << VIRTIO_F_VERSION_1,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().copied().map(QueueSetup::new).collect(),
        }
    }

    /// Back to the initial state.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<_> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.offered, &sizes);
    }

    pub(super) fn save(&self) -> RegistersState {
        RegistersState {
            offered: self.offered,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            status: self.status,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(QueueSetup::save).collect(),
        }
    }

    /// Takes what was saved of a device with the same features and queues. True
    /// when its driver had said DRIVER_OK.
    pub(super) fn restore(&mut self, saved: &RegistersState) -> Result<bool, StateError> {
        const KNOWN: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        if saved.offered != self.offered || saved.queues.len() != self.queues.len() {
            return Err(StateError::Unlike("device"));
        }
        self.device_feature_select = saved.device_feature_select;
        self.driver_feature_select = saved.driver_feature_select;
        self.driver_features = saved.driver_features;
        self.queue_select = saved.queue_select;
        self.status = saved.status;
        let agreed = saved.status & FEATURES_OK != 0;
        let ready = saved.status & DRIVER_OK != 0;
        if saved.status & !KNOWN != 0 || ready && !agreed || agreed && !self.features_sound() {
            return Err(StateError::Unlike("device status"));
        }
        for (queue, saved) in self.queues.iter_mut().zip(&saved.queues) {
            queue.restore(saved)?;
        }
        Ok(ready)
    }

    pub(super) fn negotiated_features(&self) -> u64 {
        self.driver_features
    }

    /// The rings of the enabled queues.
    pub(super) fn rings(&self, memory: &GuestMemoryMmap, event_idx: bool) -> Vec<Option<Queue>> {
        self.queues
            .iter()
            .map(|queue| match queue.enabled {
                true => queue.ring(memory, event_idx),
                false => None,
            })
            .collect()
    }

    /// Fills `data` from the structure at `offset`.
    pub(super) fn read(&self, signals: &Signals, offset: usize, data: &mut [u8]) {
        let mut bytes = [0; COMMON_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(
            0x04,
            &half(self.offered, self.device_feature_select).to_le_bytes(),
        );
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(0x10, &signals.config_vector().to_le_bytes());
        // The transport takes no device with more queues than vectors.
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status(signals), signals.generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        let vector = signals.queue_vector(self.queue_select);
        put(0x1a, &vector.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(offset + i).map_or(0, |byte| *byte);
        }
    }

    /// Takes a write of a whole field (or of one half of an address). The driver
    /// must not make any other (4.1.3.1); those are dropped.
    pub(super) fn write(
        &mut self,
        signals: &Signals,
        memory: &GuestMemoryMmap,
        offset: usize,
        data: &[u8],
    ) -> Option<Action> {
        match (offset, data) {
            (0x00, &[a, b, c, d]) => self.device_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x08, &[a, b, c, d]) => self.driver_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x0c, &[a, b, c, d]) => self.set_driver_features(u32::from_le_bytes([a, b, c, d])),
            (0x10, &[a, b]) => signals.set_config_vector(u16::from_le_bytes([a, b])),
            (0x14, &[status]) => return self.set_status(signals, status),
            (0x16, &[a, b]) => self.queue_select = u16::from_le_bytes([a, b]),
            (0x18, &[a, b]) => {
                let size = u16::from_le_bytes([a, b]);
                if let Some(queue) = self.selected()
                    && size.is_power_of_two()
                    && size <= queue.max_size
                {
                    queue.size = size;
                }
            }
            (0x1a, &[a, b]) => {
                signals.set_queue_vector(self.queue_select, u16::from_le_bytes([a, b]));
            }
            (0x1c, &[1, 0]) => {
                let queue = self.selected()?;
                if queue.ring(memory, false).is_none() {
                    return Some(Action::RefuseQueue(self.queue_select));
                }
                queue.enabled = true;
            }
            (0x20..0x38, _) => {
                let queue = self.selected()?;
                let field = match offset {
                    0x20..0x28 => &mut queue.descriptors,
                    0x28..0x30 => &mut queue.available,
                    _ => &mut queue.used,
                };
                set_address(field, offset % 8, data);
            }
            _ => {}
        }
        None
    }

    fn status(&self, signals: &Signals) -> u8 {
        match signals.needs_reset() {
            true => self.status | NEEDS_RESET,
            false => self.status,
        }
    }

    /// Bits are set in the order of 3.1.1, and cleared by reset alone.
    fn set_status(&mut self, signals: &Signals, wanted: u8) -> Option<Action> {
        if wanted == 0 {
            return Some(Action::Reset);
        }
        if self.status & !wanted != 0 {
            return None;
        }
        let mut status = wanted & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        if status & (ACKNOWLEDGE | DRIVER) != ACKNOWLEDGE | DRIVER || !self.features_sound() {
            status &= !FEATURES_OK;
        }
        // DRIVER_OK comes after the driver has seen that FEATURES_OK stuck.
        let ready = self.status & status & FEATURES_OK != 0 && !signals.needs_reset();
        if !ready {
            status &= !DRIVER_OK | self.status;
        }
        let became_ready = status & !self.status & DRIVER_OK != 0;
        self.status = status;
        became_ready.then_some(Action::Activate)
    }

    fn features_sound(&self) -> bool {
        self.driver_features & !self.offered == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let kept = self.driver_features & !(u64::from(u32::MAX) << shift);
        self.driver_features = kept | u64::from(value) << shift;
    }

    /// The selected queue while it may be changed.
    fn selected(&mut self) -> Option<&mut QueueSetup> {
        let open = self.status & DRIVER_OK == 0;
        self.queues
            .get_mut(usize::from(self.queue_select))
            .filter(|queue| open && !queue.enabled)
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_address(field: &mut u64, at: usize, data: &[u8]) {
    let mut bytes = field.to_le_bytes();
    if let (0, 4 | 8) | (4, 4) = (at, data.len()) {
        bytes[at..at + data.len()].copy_from_slice(data);
        *field = u64::from_le_bytes(bytes);
    }
}
