//! The few ports that a kernel without ACPI still knows: a serial port that
//! only speaks, and the ways to reset.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use husk_vmm_spec::ExitReason;
use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use crate::bounded::at_most;
use crate::console::{ConsoleOutput, SharedOutput};
use crate::exit::ExitLatch;

/// First of the eight ports of COM1.
const SERIAL: u16 = 0x3f8;
const SERIAL_END: u16 = SERIAL + 7;

/// The i8042's status and command port.
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_DATA: u16 = 0x60;
/// Pulses the processor's reset line.
const KEYBOARD_RESET: u8 = 0xfe;

/// Reset control register of Intel's chip sets, and its reset bit.
const RESET_CONTROL: u16 = 0xcf9;
const RESET_CONTROL_RESET: u8 = 1 << 2;

/// The devices behind these ports.
pub struct Legacy {
    serial: Mutex<Serial<NoInterrupt, NoEvents, SharedOutput>>,
    exit: Arc<ExitLatch>,
}

impl Legacy {
    /// What the guest says on the serial port goes to `console`.
    pub fn new(console: Arc<ConsoleOutput>, exit: Arc<ExitLatch>) -> Self {
        Self {
            serial: Mutex::new(Serial::new(NoInterrupt, SharedOutput(console))),
            exit,
        }
    }

    /// A machine that was saved goes on: the serial port was set up as `saved`
    /// says.
    pub fn restored(
        console: Arc<ConsoleOutput>,
        exit: Arc<ExitLatch>,
        saved: &SavedSerial,
    ) -> Self {
        let state = SerialState::from(saved);
        // Fails for more input than fits, which nobody saved.
        let serial = Serial::from_state(
            &state,
            NoInterrupt,
            NoEvents,
            SharedOutput(Arc::clone(&console)),
        )
        .unwrap_or_else(|_| Serial::new(NoInterrupt, SharedOutput(console)));
        Self {
            serial: Mutex::new(serial),
            exit,
        }
    }

    /// How the guest has set the serial port up.
    pub fn save(&self) -> SavedSerial {
        let serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        SavedSerial::from(&serial.state())
    }

    /// Fills `data` from `port`: all ones where nothing is.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL..=SERIAL_END => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                for byte in data {
                    *byte = serial.read((port - SERIAL) as u8);
                }
            }
            // Nothing to read and ready for a command, so that nobody waits.
            KEYBOARD_COMMAND | KEYBOARD_DATA | RESET_CONTROL => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// Takes a write to `port`; dropped where nothing is.
    pub fn write(&self, port: u16, data: &[u8]) {
        match port {
            SERIAL..=SERIAL_END => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                for byte in data {
                    // Cannot fail: neither trigger nor output does.
                    let _ = serial.write((port - SERIAL) as u8, *byte);
                }
            }
            KEYBOARD_COMMAND if data.first() == Some(&KEYBOARD_RESET) => {
                self.exit.set(ExitReason::Reset);
            }
            RESET_CONTROL if data.first().is_some_and(|b| b & RESET_CONTROL_RESET != 0) => {
                self.exit.set(ExitReason::Reset);
            }
            _ => {}
        }
    }
}

/// What the serial port's receiver keeps (a 16550's FIFO is smaller).
const RECEIVED_MAX: usize = 64;

/// The serial port's registers, in the order of [`SerialState`], and what it has
/// received: what a guest sent to itself (loopback).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSerial(
    [u8; 9],
    #[serde(deserialize_with = "at_most::<RECEIVED_MAX, _, _>")] Vec<u8>,
);

impl From<&SerialState> for SavedSerial {
    fn from(state: &SerialState) -> Self {
        let registers = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        Self(registers, state.in_buffer.clone())
    }
}

impl From<&SavedSerial> for SerialState {
    fn from(saved: &SavedSerial) -> Self {
        let [
            divisor_low,
            divisor_high,
            enable,
            identification,
            line,
            status,
            modem,
            modem_status,
            scratch,
        ] = saved.0;
        Self {
            baud_divisor_low: divisor_low,
            baud_divisor_high: divisor_high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status: status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: saved.1.clone(),
        }
    }
}

/// The serial port has no interrupt line.
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_sent_to_itself_is_still_there() {
        let parts = || {
            (
                ConsoleOutput::new(None),
                Arc::new(ExitLatch::new().unwrap()),
            )
        };
        let (console, exit) = parts();
        let legacy = Legacy::new(console, exit);
        // Loopback, by the modem control register.
        legacy.write(SERIAL + 4, &[0x10]);
        legacy.write(SERIAL, b"ab");
        let saved = legacy.save();
        let saved: SavedSerial =
            postcard::from_bytes(&postcard::to_allocvec(&saved).unwrap()).unwrap();
        let (console, exit) = parts();
        let restored = Legacy::restored(console, exit, &saved);
        for byte in *b"ab" {
            let mut status = [0];
            restored.read(SERIAL + 5, &mut status);
            assert_eq!(status[0] & 1, 1, "there is data");
            let mut data = [0];
            restored.read(SERIAL, &mut data);
            assert_eq!(data, [byte]);
        }
        assert_eq!(restored.save(), {
            let mut nothing = [0];
            legacy.read(SERIAL, &mut nothing);
            legacy.read(SERIAL, &mut nothing);
            legacy.save()
        });
    }
}
