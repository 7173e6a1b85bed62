//! A saved machine: what is in the file beside guest memory.
//!
//! ```text
//! "husk-vm\0"   what it is
//! version       u32, little endian
//! MachineState  postcard
//! ```
//!
//! The shim keeps one for machines made from the same builds and seals it; a VMM
//! of another version, or on another processor, refuses it. It is parsed like
//! anything that comes from outside all the same: its length is bounded, and
//! every value is checked where it is used.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::kvm::saved_memory::{self, Filled};
use crate::kvm::vcpu::ProcessorsState;
use crate::kvm::vm::KvmError;
use crate::legacy::SavedSerial;
use crate::machine::Machine;
use crate::pci::{BusState, SlotError};

/// The first bytes of a file.
pub const MAGIC: [u8; 8] = *b"husk-vm\0";

/// Raised with every change of [`MachineState`], or of what its parts mean.
pub const VERSION: u32 = 2;

/// Longest file. A processor takes some 8 KiB, and there are at most 240.
const STATE_BYTES: u64 = 4 << 20;

/// A machine that could not be saved, or a file that holds none.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// It would change while it is read.
    #[error("the machine is not paused")]
    Running,
    /// It has ended.
    #[error("the machine has ended")]
    Ended,
    /// A device that cannot be saved.
    #[error("device {0:?} cannot be saved: it must be removed before")]
    Device(String),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A function on the bus.
    #[error(transparent)]
    Bus(#[from] SlotError),
    /// A file.
    #[error("{what} of a saved machine")]
    File {
        /// Which part.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The file holds something else, or is damaged.
    #[error("the file holds no saved machine of version {VERSION}")]
    Format,
    /// It was saved for something else.
    #[error("the machine was saved from {saved:?}, not from {asked:?}")]
    Origin {
        /// As the file says.
        saved: String,
        /// As the specification says.
        asked: String,
    },
}

/// A machine without its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// As [`husk_vmm_spec::SavedSpec::origin`].
    origin: String,
    /// The guest's clock (kvm-clock), nanoseconds.
    pub(crate) clock_ns: u64,
    pub(crate) processors: ProcessorsState,
    pub(crate) serial: SavedSerial,
    pub(crate) bus: BusState,
    /// Where there is something in the file beside this one.
    pub(crate) memory: Filled,
}

impl MachineState {
    /// Reads what [`save`] wrote, if that was for `origin`.
    ///
    /// # Errors
    /// The file holds something else.
    pub fn read(file: &File, origin: &str) -> Result<Self, SavedError> {
        // By place: the descriptor's own position is that of everybody who reads
        // from the same file.
        let size = file.metadata().map_err(file_error("state"))?.len();
        let size = size.min(STATE_BYTES + 1);
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, 0)
            .map_err(file_error("state"))?;
        let state = Self::parse(&bytes).ok_or(SavedError::Format)?;
        if state.origin != origin {
            return Err(SavedError::Origin {
                saved: state.origin,
                asked: origin.to_owned(),
            });
        }
        Ok(state)
    }

    /// Reads a whole file.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() as u64 > STATE_BYTES {
            return None;
        }
        let rest = bytes.strip_prefix(&MAGIC)?;
        let rest = rest.strip_prefix(&VERSION.to_le_bytes())?;
        match postcard::take_from_bytes(rest).ok()? {
            (state, []) => Some(state),
            _ => None,
        }
    }

    fn to_bytes(&self) -> Result<Vec<u8>, SavedError> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend(postcard::to_allocvec(self).map_err(|_| SavedError::Format)?);
        match bytes.len() as u64 <= STATE_BYTES {
            true => Ok(bytes),
            false => Err(SavedError::Format),
        }
    }
}

/// Writes a machine that is paused into two files.
///
/// # Errors
/// It cannot be saved, or a file does not take it. The machine is as it was.
pub fn save(
    machine: &Machine,
    origin: &str,
    mut state_file: File,
    memory_file: &File,
) -> Result<(), SavedError> {
    if machine.exit.reason().is_some() {
        return Err(SavedError::Ended);
    }
    if let Some(id) = machine.devices.not_to_be_saved() {
        return Err(SavedError::Device(id.to_owned()));
    }
    let processors = machine.vcpus.save(&machine.vm.msr_indices()?)?;
    // At once: the processors' counters have just been read, and go on.
    let clock_ns = machine.vm.clock()?;
    let memory = vm_memory::GuestAddressSpace::memory(&machine.memory);
    let filled = saved_memory::save(&memory, memory_file).map_err(file_error("memory"))?;
    let state = MachineState {
        origin: origin.to_owned(),
        clock_ns,
        processors,
        serial: machine.space.legacy().save(),
        bus: machine.space.pci().save()?,
        memory: filled,
    };
    let bytes = state.to_bytes()?;
    // Wherever the descriptor's position was.
    state_file
        .rewind()
        .and_then(|()| state_file.write_all(&bytes))
        .map_err(file_error("state"))
}

fn file_error(what: &'static str) -> impl Fn(io::Error) -> SavedError {
    move |source| SavedError::File { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file in which everything is as short as it can be.
    fn file(vcpus: u16, functions: u8) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        // Origin, clock, CPUID leaves.
        bytes.extend([0; 3]);
        bytes.extend(postcard::to_allocvec(&vcpus).unwrap());
        bytes.extend(vec![0; 10 * usize::from(vcpus)]);
        // Serial port, the bus's address.
        bytes.extend([0; 10 + 1]);
        bytes.push(functions);
        bytes.extend(vec![0; 3 * usize::from(functions)]);
        // Memory.
        bytes.push(0);
        bytes
    }

    #[test]
    fn a_short_file_is_no_large_machine() {
        let is_machine = |vcpus, functions| MachineState::parse(&file(vcpus, functions)).is_some();
        assert!(is_machine(0, 0));
        assert!(is_machine(240, 32));
        assert!(!is_machine(241, 0));
        assert!(!is_machine(0, 33));
    }
}
