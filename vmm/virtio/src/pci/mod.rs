//! Virtio over PCI (virtio 1.2, 4.1), and what a PCI bus needs to know of a
//! function on it.

mod config_space;
mod function;
mod msi;
mod msix;
mod registers;
mod signals;
mod state;
mod transport;

pub use config_space::{ConfigSpace, Identity};
pub use function::{Bar, BarKind, Notification, PciFunction};
pub use msi::{MsiMessage, MsiVectors};
pub use msix::{
    CAPABILITY as MSIX_CAPABILITY, CONTROL_ENABLE as MSIX_ENABLE,
    CONTROL_WRITABLE as MSIX_WRITABLE, Msix,
};
pub use state::{FunctionState, StateError, VirtioState};
pub use transport::{Reporter, TransportError, VirtioPci};
