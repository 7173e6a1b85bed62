//! The virtual machine asked for.

use serde::{Deserialize, Serialize};

use crate::{BlockSpec, FsSpec, NetSpec, VsockSpec};

/// Index into the descriptors that came in the same packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Descriptor(pub u32);

/// Everything the VMM is told at its start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// `/dev/kvm`, opened read-write.
    pub kvm: Descriptor,
    /// Virtual processors.
    pub vcpus: VcpuSpec,
    /// Guest memory.
    pub memory: MemorySpec,
    /// How the machine begins.
    pub start: StartSpec,
    /// Where the guest's log goes; absent: it is dropped.
    pub console: Option<ConsoleSpec>,
    /// The guest's vsock device; absent: none.
    pub vsock: Option<VsockSpec>,
    /// PCI devices of the node may be plugged later, for which the VMM's threads may
    /// then make more system calls.
    #[serde(default)]
    pub vfio: bool,
    /// Disks present at boot; a restored guest finds them when it looks again.
    #[serde(default)]
    pub blocks: Vec<BlockSpec>,
    /// Network interfaces, likewise.
    #[serde(default)]
    pub nets: Vec<NetSpec>,
    /// Shared file systems, likewise.
    #[serde(default)]
    pub filesystems: Vec<FsSpec>,
}

/// How the VMM confines itself before it reads the spec; passed on its command
/// line since it comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailSpec {
    /// User id to run under; not 0.
    pub uid: u32,
    /// Group id to run under; not 0.
    pub gid: u32,
}

/// Virtual processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuSpec {
    /// Online when the guest boots.
    pub boot: u8,
    /// Present; those above `boot` are brought online by the agent.
    pub max: u8,
}

/// Guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySpec {
    /// Size at boot, MiB.
    pub boot_mib: u32,
    /// How much may be plugged later, MiB.
    #[serde(default)]
    pub pluggable_mib: u32,
}

/// How a machine begins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum StartSpec {
    /// A kernel boots.
    Boot(BootSpec),
    /// A guest that was saved goes on.
    Restore(SavedSpec),
}

impl StartSpec {
    /// What boots, if anything does.
    pub fn boot(&self) -> Option<&BootSpec> {
        match self {
            Self::Boot(boot) => Some(boot),
            Self::Restore(_) => None,
        }
    }
}

/// A saved guest: where it is written to, and read from. Both files are the
/// shim's, best on tmpfs. To save, it gives them empty: `state` with no bytes,
/// `memory` with the size of `boot_mib`. To restore, it gives descriptors that
/// cannot write to them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSpec {
    /// Processors and devices.
    pub state: Descriptor,
    /// Guest memory. Restored guests share the pages that they don't write.
    pub memory: Descriptor,
    /// What the guest was made from: the builds of VMM, kernel and initramfs, the
    /// command line, and whatever else the shim tells apart. A guest is restored
    /// for exactly the text it was saved with. At most [`crate::ORIGIN_BYTES`].
    pub origin: String,
}

/// What the guest boots.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSpec {
    /// Uncompressed ELF kernel.
    pub kernel: Descriptor,
    /// Initramfs (newc cpio).
    pub initramfs: Option<Descriptor>,
    /// Kernel command line; the VMM adds nothing to it.
    pub command_line: String,
}

/// Where the guest's console output goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleSpec {
    /// A pipe's write end, non-blocking; what does not fit is dropped.
    pub output: Descriptor,
}
