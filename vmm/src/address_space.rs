//! Who answers an access of the guest that is not to memory.

use std::sync::Arc;

use crate::legacy::Legacy;
use crate::pci::PciBus;

/// The machine's ports and device memory.
pub struct AddressSpace {
    pci: Arc<PciBus>,
    legacy: Legacy,
}

/// The reset control register lies among the bus's ports; it is a byte, and the
/// bus takes only four of them.
const RESET_CONTROL: u16 = 0xcf9;

impl AddressSpace {
    /// The bus, and what is beside it.
    pub fn new(pci: Arc<PciBus>, legacy: Legacy) -> Self {
        Self { pci, legacy }
    }

    /// The bus.
    pub fn pci(&self) -> &PciBus {
        &self.pci
    }

    /// What is beside the bus.
    pub fn legacy(&self) -> &Legacy {
        &self.legacy
    }

    /// A guest reads `data.len()` bytes from a port.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        match port {
            RESET_CONTROL => self.legacy.read(port, data),
            0xcf8..=0xcff => self.pci.read_port(port, data),
            _ => self.legacy.read(port, data),
        }
    }

    /// A guest writes to a port.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        match port {
            RESET_CONTROL => self.legacy.write(port, data),
            0xcf8..=0xcff => self.pci.write_port(port, data),
            _ => self.legacy.write(port, data),
        }
    }

    /// A guest reads from an address that is not memory.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        self.pci.read(address, data);
    }

    /// A guest writes to an address that is not memory.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.pci.write(address, data);
    }
}
