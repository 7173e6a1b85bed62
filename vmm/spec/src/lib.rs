//! The contract between Husk's shim and its VMM: the virtual machine asked for
//! and the requests, replies and events of its control socket. Data only.
//!
//! One message is one packet of a `SOCK_SEQPACKET` socket: JSON, with the
//! descriptors it speaks of beside it (`SCM_RIGHTS`). A [`Descriptor`] is an
//! index into the descriptors of the same packet. The shim's first packet is a
//! [`VmSpec`], every later one a [`Request`]; every packet of the VMM is a
//! [`Message`].

mod control;
mod device;
mod valid;
mod vfio;
mod vm;

pub use control::{ExitReason, Failure, Message, Reply, Request, Timeline, VmStats};
pub use device::{
    BlockSpec, BucketSpec, DeviceId, DeviceSpec, FsSpec, HostPort, MacAddress, NetSpec, RateSpec,
    SERIAL_BYTES, TAG_BYTES, TOKENS_MAX, VsockSpec,
};
pub use valid::{
    CID_MIN, COMMAND_LINE_BYTES, MEMORY_MAX_MIB, MEMORY_MIN_MIB, ORIGIN_BYTES, PLUGGABLE_UNIT_MIB,
    SpecError, VCPU_MAX, ValidVmSpec,
};
pub use vfio::{VFIO_FUNCTIONS_MAX, VfioFunctionSpec, VfioSpec};
pub use vm::{
    BootSpec, ConsoleSpec, Descriptor, JailSpec, MemorySpec, SavedSpec, StartSpec, VcpuSpec, VmSpec,
};

/// Descriptor number of the control socket in the VMM process.
pub const CONTROL_FD: i32 = 3;

/// Largest control packet, bytes.
pub const PACKET_BYTES: usize = 64 << 10;

/// Slots of the machine's PCI bus, one function each.
pub const PCI_SLOTS: usize = 32;

/// Most devices of one machine that have a name, disks, interfaces and file systems
/// together: bridge, pvpanic, console, entropy, balloon, pluggable memory and vsock have
/// a slot each.
pub const DEVICES_MAX: usize = PCI_SLOTS - 7;

/// Most descriptors beside one packet (`SCM_MAX_FD` of linux/net/scm.h is 253).
pub const PACKET_DESCRIPTORS: usize = 64;
