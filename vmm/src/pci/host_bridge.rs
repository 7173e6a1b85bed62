//! The function at 0:0.0. Kernels look for it to believe in the bus.

use husk_virtio::pci::{Bar, ConfigSpace, FunctionState, Identity, PciFunction, StateError};

/// Red Hat's generic host bridge: no kernel has a quirk for it.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    // Bridge, host.
    class: 0x06_00_00,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// A host bridge without registers of its own.
pub struct HostBridge(ConfigSpace);

impl HostBridge {
    /// The bridge.
    pub fn new() -> Self {
        Self(ConfigSpace::new(IDENTITY))
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) -> bool {
        self.0.write(offset, data)
    }

    fn bars(&self) -> Vec<Bar> {
        Vec::new()
    }

    fn read_bar(&mut self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn write_bar(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn save(&self) -> Result<FunctionState, StateError> {
        Ok(FunctionState {
            config: self.0.save(),
            virtio: None,
        })
    }

    fn restore(&mut self, saved: &FunctionState) -> Result<(), StateError> {
        if saved.virtio.is_some() {
            return Err(StateError::Unlike("device"));
        }
        self.0.restore(&saved.config)
    }
}
