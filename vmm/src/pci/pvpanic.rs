//! Tells an orderly end from a crash (QEMU's docs/specs/pvpanic.rst). One byte:
//! the guest reads the events that it may report, and writes one to report it.

use std::sync::Arc;

use husk_virtio::pci::{
    Bar, BarKind, ConfigSpace, FunctionState, Identity, PciFunction, StateError,
};
use husk_vmm_spec::ExitReason;

use crate::exit::ExitLatch;

const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0011,
    revision: 1,
    // System peripheral, other.
    class: 0x08_80_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// A page, so that no other function's registers share it.
const BAR_BYTES: u64 = 4096;

const PANICKED: u8 = 1 << 0;
const SHUTDOWN: u8 = 1 << 2;

/// The device.
pub struct PvPanic {
    config: ConfigSpace,
    exit: Arc<ExitLatch>,
}

impl PvPanic {
    /// A device that ends the machine through `exit`.
    pub fn new(exit: Arc<ExitLatch>) -> Self {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(0, BAR_BYTES, BarKind::Memory32);
        Self { config, exit }
    }
}

impl PciFunction for PvPanic {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) -> bool {
        self.config.write(offset, data)
    }

    fn bars(&self) -> Vec<Bar> {
        self.config.bars().collect()
    }

    fn read_bar(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(events)) = (offset, data.first_mut()) {
            *events = PANICKED | SHUTDOWN;
        }
    }

    fn write_bar(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        let (0, Some(&event)) = (offset, data.first()) else {
            return;
        };
        if event & PANICKED != 0 {
            self.exit.set(ExitReason::Panic);
        } else if event & SHUTDOWN != 0 {
            self.exit.set(ExitReason::Shutdown);
        }
    }

    fn save(&self) -> Result<FunctionState, StateError> {
        Ok(FunctionState {
            config: self.config.save(),
            virtio: None,
        })
    }

    fn restore(&mut self, saved: &FunctionState) -> Result<(), StateError> {
        if saved.virtio.is_some() {
            return Err(StateError::Unlike("device"));
        }
        self.config.restore(&saved.config)
    }
}
