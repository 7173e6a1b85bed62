//! PCI devices of the node in the machine. The shim opens them, as the jail can
//! open nothing; what the kernel lets a holder of these descriptors do, the VMM
//! may do, and the IOMMU holds the device to guest memory.

mod abi;
mod description;
mod dma;
mod function;
mod groups;
mod hardware;

use std::io;

pub use dma::DmaSpace;
pub use groups::Groups;

/// A device of the node that cannot be the machine's.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// Not a PCI device of vfio-pci, or one that is no endpoint.
    #[error("it is no PCI endpoint of vfio-pci")]
    NoEndpoint,
    /// The machine has no other interrupts.
    #[error("it has no MSI-X interrupts, and a machine has no others")]
    NoMsix,
    /// Its MSI-X table or pending bits lie where there is nothing.
    #[error("its MSI-X table is not behind one of its memory BARs")]
    Table,
    /// A register that no BAR can be.
    #[error("its BAR {index} has {size:#x} bytes")]
    Bar {
        /// Which.
        index: u8,
        /// As the kernel says.
        size: u64,
    },
    /// The slot is another device's.
    #[error("slot {0} of the machine's bus is taken")]
    Slot(u8),
    /// A call failed.
    #[error("{call}")]
    Call {
        /// Which.
        call: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Names the call that failed.
fn failed(call: &'static str) -> impl Fn(io::Error) -> VfioError {
    move |source| VfioError::Call { call, source }
}
