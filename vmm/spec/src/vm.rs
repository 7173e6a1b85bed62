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
    /// What the guest boots.
    pub boot: BootSpec,
    /// Where the guest's log goes; absent: it is dropped.
    pub console: Option<ConsoleSpec>,
    /// The guest's vsock device; absent: none.
    pub vsock: Option<VsockSpec>,
    /// Disks present at boot.
    #[serde(default)]
    pub blocks: Vec<BlockSpec>,
    /// Network interfaces present at boot.
    #[serde(default)]
    pub nets: Vec<NetSpec>,
    /// Shared file systems present at boot.
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
