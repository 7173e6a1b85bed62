//! A function of the node on the machine's bus. Its configuration space and its
//! MSI-X table are ours; what else is behind its BARs is the device's.

use std::io;

use husk_virtio::pci::{
    Bar, ConfigSpace, FunctionState, MSIX_ENABLE, MsiVectors, Msix, PciFunction, Reporter,
    StateError,
};

use super::abi::CONFIG_REGION;
use super::description::{Description, Place};
use super::hardware::Hardware;
use super::{VfioError, failed};

const COMMAND: u16 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_NO_PIN: u16 = 1 << 10;

/// The function.
pub(super) struct VfioFunction {
    name: String,
    description: Description,
    msix: Msix,
    /// The device's interrupts are on.
    interrupts: bool,
    reporter: Reporter,
    /// Gone once it is retired.
    hardware: Option<Box<dyn Hardware>>,
}

impl VfioFunction {
    /// What `description` says of `hardware`, with as many vectors.
    pub(super) fn new(
        name: &str,
        description: Description,
        hardware: Box<dyn Hardware>,
        vectors: Box<dyn MsiVectors>,
        reporter: Reporter,
    ) -> Result<Self, VfioError> {
        // Nothing of who had it before.
        hardware.reset();
        // The guest reaches its registers as our bus says, not as this says.
        let command = COMMAND_MEMORY | COMMAND_NO_PIN;
        hardware
            .write(CONFIG_REGION, COMMAND.into(), &command.to_le_bytes())
            .map_err(failed("switch the registers on"))?;
        Ok(Self {
            name: name.to_owned(),
            description,
            msix: Msix::new(vectors),
            interrupts: false,
            reporter,
            hardware: Some(hardware),
        })
    }

    /// Stops the device for good and gives it up. A vCPU may be about to access a
    /// register though the function is off the bus; that does nothing any more.
    pub(super) fn retire(&mut self) {
        if let Some(mut hardware) = self.hardware.take() {
            let bars: Vec<u8> = self.space().bars().map(|bar| bar.index).collect();
            for bar in bars {
                self.tell(hardware.place(bar, None));
            }
            let off = COMMAND_NO_PIN.to_le_bytes();
            self.tell(hardware.write(CONFIG_REGION, COMMAND.into(), &off));
            if self.interrupts {
                self.tell(hardware.interrupt(&[]));
            }
            hardware.reset();
        }
    }

    fn space(&self) -> &ConfigSpace {
        &self.description.space
    }

    fn tell(&self, result: io::Result<()>) {
        if let Err(error) = result {
            (self.reporter)(&self.name, &error);
        }
    }

    fn u16_at(&self, offset: u16) -> u16 {
        let mut value = [0; 2];
        self.space().read(offset, &mut value);
        u16::from_le_bytes(value)
    }

    /// Whether the guest reaches the device with such an access.
    fn passes(&self, offset: u16, length: usize) -> bool {
        let (start, end) = (usize::from(offset), usize::from(offset) + length);
        let mut passed = self.description.passed.iter();
        passed.any(|range| range.start <= start && end <= range.end)
    }

    /// The guest says whether the device may access its memory.
    fn set_bus_master(&self) {
        let wanted = self.u16_at(COMMAND) & COMMAND_BUS_MASTER;
        let command = wanted | COMMAND_MEMORY | COMMAND_NO_PIN;
        if let Some(hardware) = &self.hardware {
            let bytes = command.to_le_bytes();
            self.tell(hardware.write(CONFIG_REGION, COMMAND.into(), &bytes));
        }
    }

    fn set_msix(&mut self, control: u16) {
        let set = self.msix.set_control(control);
        self.tell(set);
        let wanted = control & MSIX_ENABLE != 0;
        if wanted != self.interrupts
            && let Some(hardware) = &self.hardware
        {
            let events = self.msix.events();
            let switched = hardware.interrupt(if wanted { events } else { &[] });
            self.tell(switched);
            self.interrupts = wanted;
        }
    }
}

/// Where in a place an access to a BAR begins.
fn within(place: &Place, bar: u8, offset: u64) -> Option<usize> {
    let is_there = place.bar == bar && place.range.contains(&offset);
    // A table has 32 KiB at most.
    is_there.then(|| (offset - place.range.start) as usize)
}

fn touches(offset: u16, length: usize, register: u16) -> bool {
    let (start, end) = (usize::from(offset), usize::from(offset) + length);
    start < usize::from(register) + 2 && usize::from(register) < end
}

impl PciFunction for VfioFunction {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        match &self.hardware {
            Some(hardware) if self.passes(offset, data.len()) => {
                let read = hardware.read(CONFIG_REGION, offset.into(), data);
                self.tell(read);
            }
            _ => self.space().read(offset, data),
        }
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) -> bool {
        if self.passes(offset, data.len()) {
            if let Some(hardware) = &self.hardware {
                self.tell(hardware.write(CONFIG_REGION, offset.into(), data));
            }
            return false;
        }
        let moved = self.description.space.write(offset, data);
        if touches(offset, data.len(), COMMAND) {
            self.set_bus_master();
        }
        let control = self.description.msix + 2;
        if touches(offset, data.len(), control) {
            self.set_msix(self.u16_at(control));
        }
        moved
    }

    fn bars(&self) -> Vec<Bar> {
        self.space().bars().collect()
    }

    fn placed(&mut self, bars: &[Bar]) {
        let Some(mut hardware) = self.hardware.take() else {
            return;
        };
        let own: Vec<u8> = self.space().bars().map(|bar| bar.index).collect();
        let address = |index: u8| {
            let bar = bars.iter().find(|bar| bar.index == index);
            bar.map(|bar| bar.address)
        };
        // Two may change places: KVM takes none that lies on another.
        for index in &own {
            self.tell(hardware.place(*index, None));
        }
        for index in own {
            self.tell(hardware.place(index, address(index)));
        }
        self.hardware = Some(hardware);
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        let Some(hardware) = &self.hardware else {
            return;
        };
        if let Some(at) = within(&self.description.table, bar, offset) {
            self.msix.read_table(at, data);
        } else if let Some(at) = within(&self.description.pending, bar, offset) {
            self.msix.read_pending(at, data);
        } else {
            self.tell(hardware.read(bar.into(), offset, data));
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        let Some(hardware) = &self.hardware else {
            return;
        };
        if let Some(at) = within(&self.description.table, bar, offset) {
            let written = self.msix.write_table(at, data);
            self.tell(written);
        } else if within(&self.description.pending, bar, offset).is_none() {
            self.tell(hardware.write(bar.into(), offset, data));
        }
    }

    fn save(&self) -> Result<FunctionState, StateError> {
        Err(StateError::OfNode)
    }

    fn restore(&mut self, _saved: &FunctionState) -> Result<(), StateError> {
        Err(StateError::OfNode)
    }
}

#[cfg(test)]
mod tests;
