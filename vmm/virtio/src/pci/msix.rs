//! The MSI-X table of a function (PCI 3.0, 6.8.2).

use std::io;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll as poll_now};
use vmm_sys_util::eventfd::EventFd;

use super::{MsiMessage, MsiVectors, StateError};
use crate::fd::borrow;

/// Id of the MSI-X capability.
pub const CAPABILITY: u8 = 0x11;
/// Bits of the capability's message control that the guest may write.
pub const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;
/// Vectors of a function: what fits the page of its table.
pub(super) const VECTORS_MAX: usize = 256;

/// Of message control: the function sends messages.
pub const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const ENTRY_BYTES: usize = 16;
const ENTRY_CONTROL: usize = 12;
const ENTRY_MASKED: u8 = 1;

/// Table, pending bits and their connection to the machine.
pub struct Msix {
    vectors: Box<dyn MsiVectors>,
    entries: Vec<Entry>,
    control: u16,
}

struct Entry {
    bytes: [u8; ENTRY_BYTES],
    /// The message that the vector sends now; `None` while it only counts.
    connected: Option<MsiMessage>,
}

impl Entry {
    fn masked(&self) -> bool {
        self.bytes[ENTRY_CONTROL] & ENTRY_MASKED != 0
    }

    fn message(&self) -> MsiMessage {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = self.bytes;
        MsiMessage {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            data: u32::from_le_bytes([i, j, k, l]),
        }
    }
}

impl Msix {
    /// A table with an entry for each of `vectors`, all masked.
    pub fn new(vectors: Box<dyn MsiVectors>) -> Self {
        let count = vectors.events().len().min(VECTORS_MAX);
        let mut bytes = [0; ENTRY_BYTES];
        bytes[ENTRY_CONTROL] = ENTRY_MASKED;
        let entry = || Entry {
            bytes,
            connected: None,
        };
        Self {
            vectors,
            entries: std::iter::repeat_with(entry).take(count).collect(),
            control: 0,
        }
    }

    /// The vectors' event descriptors.
    pub fn events(&self) -> &[Arc<EventFd>] {
        &self.vectors.events()[..self.entries.len()]
    }

    /// The capability's message control changed.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_control(&mut self, control: u16) -> io::Result<()> {
        let control = control & CONTROL_WRITABLE;
        if control == self.control {
            return Ok(());
        }
        if self.control & CONTROL_ENABLE == 0 {
            self.forget_pending();
        }
        self.control = control;
        (0..self.entries.len()).try_for_each(|vector| self.update(vector))
    }

    /// The table, and the vectors that are pending.
    pub(super) fn save(&self) -> (Vec<[u8; ENTRY_BYTES]>, Vec<u16>) {
        let table = self.entries.iter().map(|entry| entry.bytes).collect();
        let pending = (0..self.entries.len()).filter(|vector| self.is_pending(*vector));
        // VECTORS_MAX fits.
        (table, pending.map(|vector| vector as u16).collect())
    }

    /// Takes a table and the capability's message control.
    pub(super) fn restore(
        &mut self,
        table: &[[u8; ENTRY_BYTES]],
        control: u16,
    ) -> Result<(), StateError> {
        if table.len() != self.entries.len() {
            return Err(StateError::Unlike("interrupt table"));
        }
        self.write_table(0, table.as_flattened())
            .and_then(|()| self.set_control(control))
            .map_err(StateError::Vector)
    }

    /// Fills `data` from the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset + i;
            if let Some(entry) = self.entries.get(at / ENTRY_BYTES) {
                *byte = entry.bytes[at % ENTRY_BYTES];
            }
        }
    }

    /// Takes a write to the table.
    ///
    /// # Errors
    /// KVM refused.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) -> io::Result<()> {
        for (i, byte) in data.iter().enumerate() {
            let at = offset + i;
            if let Some(entry) = self.entries.get_mut(at / ENTRY_BYTES) {
                entry.bytes[at % ENTRY_BYTES] = match at % ENTRY_BYTES {
                    ENTRY_CONTROL => byte & ENTRY_MASKED,
                    field if field > ENTRY_CONTROL => 0,
                    _ => *byte,
                };
            }
        }
        let end = (offset + data.len()).div_ceil(ENTRY_BYTES);
        (offset / ENTRY_BYTES..end.min(self.entries.len()))
            .try_for_each(|vector| self.update(vector))
    }

    /// Fills `data` from the pending bits.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset + i) * 8;
            for bit in 0..8 {
                *byte |= u8::from(self.is_pending(first + bit)) << bit;
            }
        }
    }

    /// Drops interrupts that were counted and not sent.
    pub(super) fn forget_pending(&self) {
        for (entry, event) in self.entries.iter().zip(self.vectors.events()) {
            if entry.connected.is_none() && is_readable(event) {
                let _ = event.read();
            }
        }
    }

    fn is_pending(&self, vector: usize) -> bool {
        self.entries
            .get(vector)
            .zip(self.vectors.events().get(vector))
            .is_some_and(|(entry, event)| entry.connected.is_none() && is_readable(event))
    }

    /// Connects or disconnects a vector as its masks say.
    fn update(&mut self, vector: usize) -> io::Result<()> {
        let sends = self.control == CONTROL_ENABLE;
        let Some(entry) = self.entries.get_mut(vector) else {
            return Ok(());
        };
        let wanted = (sends && !entry.masked()).then(|| entry.message());
        if wanted == entry.connected {
            return Ok(());
        }
        // VECTORS_MAX fits.
        let number = vector as u16;
        entry.connected = None;
        match wanted {
            Some(message) => self.vectors.connect(number, message)?,
            None => self.vectors.disconnect(number)?,
        }
        entry.connected = wanted;
        Ok(())
    }
}

/// Whether the descriptor has counted something, without taking it.
fn is_readable(event: &EventFd) -> bool {
    let mut poll = [PollFd::from_borrowed_fd(borrow(event), PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll_now(&mut poll, Some(&now)).is_ok_and(|ready| ready > 0)
}
