//! What a bus knows of a function.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::{FunctionState, StateError};

/// A PCI function: a configuration space, and base address registers (BARs)
/// with memory behind them.
///
/// The guest chooses offsets, widths and values: every method takes all of them
/// without harm, whatever they are. Reads of nothing give zeroes (configuration
/// space, BAR), writes to nothing are dropped.
pub trait PciFunction: Send {
    /// Fills `data` from configuration space at `offset`.
    fn read_config(&mut self, offset: u16, data: &mut [u8]);

    /// Takes a write to configuration space at `offset`. True when this changed
    /// what [`PciFunction::bars`] gives: the bus then moves its mappings and
    /// the notifications' ioeventfds.
    #[must_use]
    fn write_config(&mut self, offset: u16, data: &[u8]) -> bool;

    /// Its base address registers and where the guest wants them now. The bus
    /// decides whether that place is free.
    fn bars(&self) -> Vec<Bar>;

    /// Fills `data` from what is behind `bar`, at `offset`.
    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// Takes a write to what is behind `bar`, at `offset`.
    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// Its registers, while the machine is paused.
    ///
    /// # Errors
    /// It has lost its working half.
    fn save(&self) -> Result<FunctionState, StateError>;

    /// Takes the registers that [`PciFunction::save`] gave for a function that
    /// was made alike, and goes on from there. It has just been made; the bus
    /// places its BARs afterwards.
    ///
    /// # Errors
    /// They are not those of such a function, or the host refuses something. The
    /// function is of no use then.
    fn restore(&mut self, saved: &FunctionState) -> Result<(), StateError>;

    /// The bus has put these of its BARs where they say, and no other: what KVM maps
    /// for the guest belongs there.
    fn placed(&mut self, _bars: &[Bar]) {}

    /// Places behind its BARs where a write of any width and value is nothing
    /// but a notification, so that KVM may write the event descriptor itself
    /// (ioeventfd without data match). Fixed for the function's life.
    fn notifications(&self) -> Vec<Notification> {
        Vec::new()
    }
}

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Register, 0 to 5.
    pub index: u8,
    /// Bytes behind it, a power of two.
    pub size: u64,
    /// Width of the address.
    pub kind: BarKind,
    /// What the register holds; meaningless unless `decoded`.
    pub address: u64,
    /// Memory decoding is on and `address + size` is below the end of the
    /// address space: accesses at `address` are meant for this function.
    pub decoded: bool,
}

/// Width of a memory BAR's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// 32 bits.
    Memory32,
    /// 64 bits; takes the next register too.
    Memory64,
}

/// A place behind a BAR that only notifies.
#[derive(Clone, Debug)]
pub struct Notification {
    /// Register, 0 to 5.
    pub bar: u8,
    /// Offset behind it.
    pub offset: u64,
    /// What to write.
    pub event: Arc<EventFd>,
}
