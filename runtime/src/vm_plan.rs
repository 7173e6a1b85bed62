//! From a pod's spec and the node's facts to the virtual machine asked for.
//! Nothing here touches the system.

use std::os::fd::OwnedFd;

use husk_node::rates::{DeviceRates, Rates};
use husk_protocol::{path, port};
use husk_vmm_spec::{
    BlockSpec, BootSpec, BucketSpec, ConsoleSpec, DEVICES_MAX, Descriptor, DeviceId, FsSpec,
    HostPort, MEMORY_MAX_MIB, MacAddress, MemorySpec, NetSpec, PLUGGABLE_UNIT_MIB, RateSpec,
    SavedSpec, SpecError, StartSpec, VCPU_MAX, ValidVmSpec, VcpuSpec, VmSpec, VsockSpec,
};
use ttrpc::Code;

use crate::bundle::{Limits, PodSpec, Unlimited};
use crate::network::Nic;
use crate::template::Template;

/// Guest memory where nothing limits the pod, MiB. Only what is touched costs.
pub const DEFAULT_MEMORY_MIB: u32 = 512;

/// What kernel and agent need beside the pod's limit, MiB.
const OVERHEAD_MIB: u32 = 96;

/// One page of so many goes to what the guest's kernel keeps about each:
/// `struct page` has 64 bytes.
const PAGES_FOR_ONE: u64 = 64;

/// vCPUs where nothing limits the pod.
const DEFAULT_VCPUS: u8 = 1;

/// vCPUs to which every machine may grow, where the node has them.
const USUAL_VCPUS: u8 = 4;

/// Memory to which a pod may grow, as a multiple of what it begins with.
const PLUGGABLE_FACTOR: u32 = 4;

/// Context id of every guest: each has a vsock of its own, so none clash.
const CID: u32 = 3;

/// What the node has.
#[derive(Clone, Copy, Debug)]
pub struct HostFacts {
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u8,
}

/// How large a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmSize {
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Processors.
    pub vcpus: u8,
}

/// What a machine may grow to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Processors.
    pub vcpus: u8,
    /// Memory beyond that of its start, MiB.
    pub pluggable_mib: u32,
}

/// The descriptors that a machine is made of.
#[derive(Debug)]
pub struct VmParts {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// How it begins.
    pub start: Start,
    /// Where the console's output goes.
    pub console: OwnedFd,
    /// The far end of the agent's connection.
    pub agent: OwnedFd,
    /// Its interfaces.
    pub nics: Vec<Nic>,
    /// The file server, where there is one.
    pub file_server: Option<OwnedFd>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// What disks and interfaces may move.
    pub rates: Rates,
    /// It may get PCI devices of the node.
    pub vfio: bool,
}

/// How a machine begins.
#[derive(Debug)]
pub enum Start {
    /// A kernel boots.
    Boot {
        /// The kernel.
        kernel: OwnedFd,
        /// The initramfs.
        initramfs: OwnedFd,
        /// What the kernel is told.
        command_line: String,
    },
    /// A template goes on.
    Restore {
        /// Its files.
        template: Template,
        /// What it must have been made from.
        origin: String,
    },
}

/// A disk of the machine.
#[derive(Debug)]
pub struct Disk {
    /// Its id and serial.
    pub serial: String,
    /// Its content.
    pub file: OwnedFd,
    /// The guest may not write to it.
    pub read_only: bool,
}

/// A machine that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// More than the node has.
    #[error("the pod asks for {asked} MiB of memory; this node has {node} MiB")]
    Memory {
        /// As the pod asks.
        asked: u64,
        /// What the node has.
        node: u32,
    },
    /// More than the machine's bus has slots for.
    #[error(
        "the pod has {interfaces} interfaces and {disks} disks as its machine begins; both \
         together can be {most}"
    )]
    Devices {
        /// In its network namespace.
        interfaces: usize,
        /// Of its first container.
        disks: usize,
        /// How many there can be.
        most: usize,
    },
    /// A value of the spec.
    #[error("machine's specification")]
    Spec(#[from] SpecError),
}

impl PlanError {
    /// What containerd is told.
    pub fn code(&self) -> Code {
        Code::INVALID_ARGUMENT
    }
}

/// How large the machine of `pod` is on a node with `host`.
///
/// # Errors
/// The pod asks for more memory than the node has.
pub fn size(pod: &PodSpec, host: HostFacts) -> Result<VmSize, PlanError> {
    let memory_mib = match pod.overrides.memory_mib {
        Some(mib) => checked(mib.into(), host, OVERHEAD_MIB.into())?,
        None => memory_for(pod.limits, pod.unlimited, host)?,
    };
    let vcpus = pod.overrides.vcpus;
    let vcpus = vcpus.unwrap_or_else(|| vcpus_for(pod.limits, pod.unlimited, host));
    Ok(VmSize {
        memory_mib,
        vcpus: vcpus.clamp(1, VCPU_MAX),
    })
}

/// How large a machine is in which what these limits allow fits.
///
/// # Errors
/// That is more memory than the node has.
pub fn needed(limits: Limits, unlimited: Unlimited, host: HostFacts) -> Result<VmSize, PlanError> {
    Ok(VmSize {
        memory_mib: memory_for(limits, unlimited, host)?,
        vcpus: vcpus_for(limits, unlimited, host).clamp(1, VCPU_MAX),
    })
}

/// Processors that the limits can keep busy.
fn vcpus_for(limits: Limits, unlimited: Unlimited, host: HostFacts) -> u8 {
    let Some(millis) = limits.cpu_millis else {
        return DEFAULT_VCPUS;
    };
    let whole = u8::try_from(millis.div_ceil(1000)).unwrap_or(u8::MAX);
    let others = if unlimited.cpu { DEFAULT_VCPUS } else { 0 };
    whole.saturating_add(others).clamp(1, host.cpus.max(1))
}

/// How much room to grow the machine of `pod` gets, which begins with `boot`. A
/// processor that is off costs the guest some hundred KiB, so they are few.
/// Memory that may be plugged costs nothing, but the guest could use it unasked:
/// only pods get it, in whose cgroup the node counts it.
pub fn room(pod: &PodSpec, boot: VmSize, host: HostFacts) -> Room {
    let most = boot.vcpus.saturating_mul(2).min(host.cpus).min(VCPU_MAX);
    let most = most.max(usual_vcpus(host));
    let memory = boot.memory_mib.saturating_mul(PLUGGABLE_FACTOR);
    let memory = memory
        .min(host.memory_mib)
        .min(MEMORY_MAX_MIB - boot.memory_mib);
    let whole = memory - memory % PLUGGABLE_UNIT_MIB;
    Room {
        vcpus: most.max(boot.vcpus),
        pluggable_mib: if pod.limits_are_a_sum { whole } else { 0 },
    }
}

/// vCPUs to which every machine may grow here.
pub fn usual_vcpus(host: HostFacts) -> u8 {
    USUAL_VCPUS.min(host.cpus).max(1)
}

/// Memory in which what the limits allow fits, MiB.
fn memory_for(limits: Limits, unlimited: Unlimited, host: HostFacts) -> Result<u32, PlanError> {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let default = u64::from(DEFAULT_MEMORY_MIB.min(host.memory_mib));
    let huge = mib(limits.huge_page_bytes);
    let Some(limit) = limits.memory_bytes.map(mib) else {
        return checked(default + huge, host, 0);
    };
    let limit = u64::from(checked(limit + huge, host, 0)?);
    // Only what is touched costs, and the containers with limits have cgroups.
    let others = if unlimited.memory { default } else { 0 };
    let usable = (limit + others).min(limit.max(host.memory_mib.into()));
    let overhead = usable.div_ceil(PAGES_FOR_ONE) + u64::from(OVERHEAD_MIB);
    checked(usable + overhead, host, overhead)
}

/// What the node has and a machine can have.
fn checked(asked: u64, host: HostFacts, beside_mib: u64) -> Result<u32, PlanError> {
    u32::try_from(asked)
        .ok()
        .filter(|mib| u64::from(*mib) <= u64::from(host.memory_mib) + beside_mib)
        .filter(|mib| *mib <= MEMORY_MAX_MIB)
        .ok_or(PlanError::Memory {
            asked,
            node: host.memory_mib,
        })
}

/// The kernel's command line: `extra` comes last, and with `debug` the guest
/// tells more.
pub fn command_line(size: VmSize, room: Room, extra: &str, debug: bool) -> String {
    // The agent's own output is on the console as well.
    let mut line = "console=hvc0 panic=-1 reboot=t".to_owned();
    line.push_str(if debug {
        " loglevel=7 husk.log=debug"
    } else {
        " quiet loglevel=4 husk.log=info"
    });
    if room.vcpus > size.vcpus {
        // The agent brings the others online.
        line.push_str(&format!(" maxcpus={}", size.vcpus));
    }
    if room.pluggable_mib > 0 {
        // As much of it as possible stays such that it can be unplugged.
        line.push_str(" memory_hotplug.online_policy=auto-movable");
    }
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    line
}

/// The machine's specification and the descriptors that go beside it.
///
/// # Errors
/// More devices than there is room for, or a value that the VMM would refuse.
pub fn plan(
    size: VmSize,
    room: Room,
    parts: VmParts,
) -> Result<(ValidVmSpec, Vec<OwnedFd>), PlanError> {
    let (interfaces, disks) = (parts.nics.len(), parts.disks.len());
    let most = DEVICES_MAX - usize::from(parts.file_server.is_some());
    if interfaces + disks > most {
        return Err(PlanError::Devices {
            interfaces,
            disks,
            most,
        });
    }
    let mut descriptors = Descriptors(Vec::new());
    let spec = VmSpec {
        kvm: descriptors.push(parts.kvm),
        vcpus: VcpuSpec {
            boot: size.vcpus,
            max: room.vcpus,
        },
        memory: MemorySpec {
            boot_mib: size.memory_mib,
            pluggable_mib: room.pluggable_mib,
        },
        start: descriptors.start(parts.start),
        console: Some(ConsoleSpec {
            output: descriptors.push(parts.console),
        }),
        vfio: parts.vfio,
        vsock: Some(VsockSpec {
            cid: CID,
            host_ports: vec![HostPort {
                port: port::AGENT,
                stream: descriptors.push(parts.agent),
            }],
        }),
        blocks: parts
            .disks
            .into_iter()
            .map(|disk| descriptors.disk(disk, parts.rates))
            .collect(),
        nets: parts
            .nics
            .into_iter()
            .map(|nic| descriptors.nic(nic, parts.rates))
            .collect(),
        filesystems: parts
            .file_server
            .map(|socket| descriptors.file_system(socket))
            .into_iter()
            .collect(),
    };
    let valid = ValidVmSpec::new(spec, descriptors.0.len())?;
    Ok((valid, descriptors.0))
}

/// Descriptors of one packet, in order.
#[derive(Debug, Default)]
pub struct Descriptors(pub Vec<OwnedFd>);

impl Descriptors {
    /// Adds one and tells its index.
    pub fn push(&mut self, descriptor: OwnedFd) -> Descriptor {
        // A packet has at most 64, which the check of the whole spec holds.
        let index = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0.push(descriptor);
        Descriptor(index)
    }

    /// A disk as the VMM wants it.
    pub fn disk(&mut self, disk: Disk, rates: Rates) -> BlockSpec {
        BlockSpec {
            id: disk.serial.clone(),
            file: self.push(disk.file),
            read_only: disk.read_only,
            serial: disk.serial,
            rate: rate(rates.disk),
        }
    }

    /// An interface as the VMM wants it.
    pub fn nic(&mut self, nic: Nic, rates: Rates) -> NetSpec {
        NetSpec {
            id: nic_id(nic.mac),
            tap: self.push(nic.tap),
            mac: nic.mac,
            mtu: nic.mtu,
            rate: rate(rates.network),
        }
    }

    fn start(&mut self, start: Start) -> StartSpec {
        match start {
            Start::Boot {
                kernel,
                initramfs,
                command_line,
            } => StartSpec::Boot(BootSpec {
                kernel: self.push(kernel),
                initramfs: Some(self.push(initramfs)),
                command_line,
            }),
            Start::Restore { template, origin } => StartSpec::Restore(SavedSpec {
                state: self.push(template.state),
                memory: self.push(template.memory),
                origin,
            }),
        }
    }

    fn file_system(&mut self, socket: OwnedFd) -> FsSpec {
        FsSpec {
            id: path::SHARED_TAG.to_owned(),
            socket: self.push(socket),
            tag: path::SHARED_TAG.to_owned(),
        }
    }
}

/// As the VMM counts. Any numbers fit: they have 32 bits.
fn rate(rates: DeviceRates) -> RateSpec {
    let bucket = |per_second: Option<u32>, burst: Option<u32>, unit: u64| {
        per_second.map(|per_second| BucketSpec {
            per_second: u64::from(per_second) * unit,
            burst: u64::from(burst.unwrap_or(per_second)) * unit,
        })
    };
    RateSpec {
        bytes: bucket(rates.kib_per_second, rates.burst_kib, 1 << 10),
        operations: bucket(rates.operations_per_second, rates.burst_operations, 1),
    }
}

/// The machine's name of an interface: names of interfaces may have characters that
/// device ids may not.
pub fn nic_id(mac: MacAddress) -> DeviceId {
    let [_, _, c, d, e, f] = mac.0;
    format!("net-{c:02x}{d:02x}{e:02x}{f:02x}")
}

#[cfg(test)]
mod tests;
