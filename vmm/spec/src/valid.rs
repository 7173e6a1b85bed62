//! A specification whose every value has been checked.

use std::collections::HashSet;

use crate::{
    BootSpec, BucketSpec, Descriptor, DeviceSpec, PACKET_DESCRIPTORS, PCI_SLOTS, RateSpec,
    SERIAL_BYTES, SavedSpec, StartSpec, TAG_BYTES, TOKENS_MAX, VFIO_FUNCTIONS_MAX, VfioSpec,
    VmSpec,
};

/// Least guest memory, MiB: below it the kernel does not reach its init.
pub const MEMORY_MIN_MIB: u32 = 32;

/// Most guest memory, MiB (4 TiB).
pub const MEMORY_MAX_MIB: u32 = 4 << 20;

/// What pluggable memory is a multiple of, MiB: Linux takes memory in blocks of so
/// much (`MIN_MEMORY_BLOCK_SIZE` of asm/sparsemem.h).
pub const PLUGGABLE_UNIT_MIB: u32 = 128;

/// Most vCPUs. xAPIC ids end at 254 and the kernel is built for 240.
pub const VCPU_MAX: u8 = 240;

/// Longest kernel command line, bytes, its final NUL included
/// (`COMMAND_LINE_SIZE` of arch/x86/include/asm/setup.h).
pub const COMMAND_LINE_BYTES: usize = 2048;

/// Longest text that says what a saved guest was made from, bytes.
pub const ORIGIN_BYTES: usize = 1024;

/// Longest device id, bytes.
pub const DEVICE_ID_BYTES: usize = 64;

/// Least context id a guest may have (0 to 2 are reserved, virtio 1.2, 5.10.4).
pub const CID_MIN: u32 = 3;

/// A specification that names something impossible.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Memory outside the bounds.
    #[error("memory.boot_mib is {0}; it must be from {MEMORY_MIN_MIB} to {MEMORY_MAX_MIB}")]
    Memory(u32),
    /// Pluggable memory that is not made of whole parts, or too much.
    #[error(
        "memory.pluggable_mib is {pluggable} beside {boot} at boot; it must be a multiple of {PLUGGABLE_UNIT_MIB}, and both at most {MEMORY_MAX_MIB}"
    )]
    Pluggable {
        /// As asked.
        boot: u32,
        /// As asked.
        pluggable: u32,
    },
    /// vCPU counts outside the bounds.
    #[error("vcpus are boot {boot}, max {max}; it must be 1 <= boot <= max <= {VCPU_MAX}")]
    Vcpus {
        /// As asked.
        boot: u8,
        /// As asked.
        max: u8,
    },
    /// Command line too long or with a NUL in it.
    #[error(
        "boot.command_line has {0} bytes; it must be shorter than {COMMAND_LINE_BYTES} and without NUL"
    )]
    CommandLine(usize),
    /// Origin of a saved guest empty or too long.
    #[error("origin has {0} bytes; it must have 1 to {ORIGIN_BYTES}")]
    Origin(usize),
    /// Reserved context id.
    #[error("vsock.cid is {0}; it must be from {CID_MIN} to 4294967294")]
    Cid(u32),
    /// A descriptor that did not come.
    #[error("{field} is descriptor {index}, but {given} came with the packet")]
    DescriptorMissing {
        /// The field that names it.
        field: &'static str,
        /// As asked.
        index: u32,
        /// How many came.
        given: usize,
    },
    /// A descriptor that two fields name.
    #[error("{field} is descriptor {index}, which another field names already")]
    DescriptorTwice {
        /// The field that names it.
        field: &'static str,
        /// As asked.
        index: u32,
    },
    /// Device id empty, too long, or not of letters, digits, `-`, `_`, `.`.
    #[error("device id {0:?} must be 1 to {DEVICE_ID_BYTES} letters, digits, '-', '_' or '.'")]
    DeviceId(String),
    /// Two devices of one name.
    #[error("device id {0:?} is used twice")]
    DeviceIdTwice(String),
    /// Serial too long or not ASCII.
    #[error(
        "serial {serial:?} of device {id:?} must be 1 to {SERIAL_BYTES} printable ASCII characters"
    )]
    Serial {
        /// The device.
        id: String,
        /// As asked.
        serial: String,
    },
    /// Tag too long or not ASCII.
    #[error("tag {tag:?} of device {id:?} must be 1 to {TAG_BYTES} printable ASCII characters")]
    Tag {
        /// The device.
        id: String,
        /// As asked.
        tag: String,
    },
    /// Multicast or zero hardware address.
    #[error("mac {mac} of device {id:?} must be a unicast address other than zero")]
    Mac {
        /// The device.
        id: String,
        /// As asked.
        mac: String,
    },
    /// MTU outside the bounds of virtio 1.2, 5.1.4.1.
    #[error("mtu {mtu} of device {id:?} must be from 68 to 65535")]
    Mtu {
        /// The device.
        id: String,
        /// As asked.
        mtu: u16,
    },
    /// A bucket that never fills, or counts more than can be.
    #[error(
        "rate.{bucket} of device {id:?} is {per_second} a second with a burst of {burst}; both must be from 1 to {TOKENS_MAX}"
    )]
    Rate {
        /// The device.
        id: String,
        /// Which of its buckets.
        bucket: &'static str,
        /// As asked.
        per_second: u64,
        /// As asked.
        burst: u64,
    },
    /// Functions of a group that cannot be those of one, or not on this bus.
    #[error(
        "functions of device {0:?} must be 1 to {VFIO_FUNCTIONS_MAX}, each in a slot of its own below {PCI_SLOTS}"
    )]
    Functions(String),
    /// One vsock port given twice.
    #[error("vsock host port {0} is given twice")]
    HostPortTwice(u32),
    /// More descriptors than a packet may have.
    #[error("{0} descriptors came with the packet; at most {PACKET_DESCRIPTORS} may")]
    TooManyDescriptors(usize),
}

/// A [`VmSpec`] that has been checked against the descriptors beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidVmSpec(VmSpec);

impl ValidVmSpec {
    /// Checks every value of `spec`, which came with `descriptors` descriptors.
    ///
    /// # Errors
    /// The first value that cannot be, with what would be right.
    pub fn new(spec: VmSpec, descriptors: usize) -> Result<Self, SpecError> {
        if descriptors > PACKET_DESCRIPTORS {
            return Err(SpecError::TooManyDescriptors(descriptors));
        }
        let memory = spec.memory.boot_mib;
        if !(MEMORY_MIN_MIB..=MEMORY_MAX_MIB).contains(&memory) {
            return Err(SpecError::Memory(memory));
        }
        let pluggable = spec.memory.pluggable_mib;
        let whole = pluggable.is_multiple_of(PLUGGABLE_UNIT_MIB);
        if !whole || pluggable > MEMORY_MAX_MIB - memory {
            return Err(SpecError::Pluggable {
                boot: memory,
                pluggable,
            });
        }
        let (boot, max) = (spec.vcpus.boot, spec.vcpus.max);
        if boot == 0 || boot > max || max > VCPU_MAX {
            return Err(SpecError::Vcpus { boot, max });
        }
        let mut used = UsedDescriptors::new(descriptors);
        used.take("kvm", spec.kvm)?;
        match &spec.start {
            StartSpec::Boot(boot) => boot.check(&mut used)?,
            StartSpec::Restore(saved) => saved.check_into(&mut used)?,
        }
        if let Some(console) = spec.console {
            used.take("console.output", console.output)?;
        }
        if let Some(vsock) = &spec.vsock {
            if vsock.cid < CID_MIN || vsock.cid == u32::MAX {
                return Err(SpecError::Cid(vsock.cid));
            }
            let mut ports = HashSet::new();
            for host_port in &vsock.host_ports {
                used.take("vsock.host_ports.stream", host_port.stream)?;
                if !ports.insert(host_port.port) {
                    return Err(SpecError::HostPortTwice(host_port.port));
                }
            }
        }
        let devices = spec
            .blocks
            .iter()
            .cloned()
            .map(DeviceSpec::Block)
            .chain(spec.nets.iter().cloned().map(DeviceSpec::Net))
            .chain(spec.filesystems.iter().cloned().map(DeviceSpec::Fs));
        let mut ids = HashSet::new();
        for device in devices {
            device.check_values()?;
            let (field, descriptor) = device.descriptor();
            used.take(field, descriptor)?;
            if !ids.insert(device.id().to_owned()) {
                return Err(SpecError::DeviceIdTwice(device.id().to_owned()));
            }
        }
        Ok(Self(spec))
    }

    /// The checked specification.
    pub fn spec(&self) -> &VmSpec {
        &self.0
    }
}

impl BootSpec {
    fn check(&self, used: &mut UsedDescriptors) -> Result<(), SpecError> {
        let line = &self.command_line;
        if line.len() >= COMMAND_LINE_BYTES || line.bytes().any(|b| b == 0) {
            return Err(SpecError::CommandLine(line.len()));
        }
        used.take("boot.kernel", self.kernel)?;
        match self.initramfs {
            Some(initramfs) => used.take("boot.initramfs", initramfs),
            None => Ok(()),
        }
    }
}

impl SavedSpec {
    /// Checks files that came with `descriptors` descriptors beside them.
    ///
    /// # Errors
    /// The first value that cannot be, with what would be right.
    pub fn check(&self, descriptors: usize) -> Result<(), SpecError> {
        self.check_into(&mut UsedDescriptors::new(descriptors))
    }

    fn check_into(&self, used: &mut UsedDescriptors) -> Result<(), SpecError> {
        if !(1..=ORIGIN_BYTES).contains(&self.origin.len()) {
            return Err(SpecError::Origin(self.origin.len()));
        }
        used.take("saved.state", self.state)?;
        used.take("saved.memory", self.memory)
    }
}

impl DeviceSpec {
    /// The device's name.
    pub fn id(&self) -> &str {
        match self {
            Self::Block(block) => &block.id,
            Self::Net(net) => &net.id,
            Self::Fs(fs) => &fs.id,
        }
    }

    /// Checks a device that came with `descriptors` descriptors beside it.
    ///
    /// # Errors
    /// The first value that cannot be, with what would be right.
    pub fn check(&self, descriptors: usize) -> Result<(), SpecError> {
        self.check_values()?;
        let (field, descriptor) = self.descriptor();
        UsedDescriptors::new(descriptors).take(field, descriptor)
    }

    fn descriptor(&self) -> (&'static str, Descriptor) {
        match self {
            Self::Block(block) => ("block.file", block.file),
            Self::Net(net) => ("net.tap", net.tap),
            Self::Fs(fs) => ("fs.socket", fs.socket),
        }
    }

    fn check_values(&self) -> Result<(), SpecError> {
        let id = checked_id(self.id())?;
        let rate = match self {
            Self::Block(block) => block.rate,
            Self::Net(net) => net.rate,
            Self::Fs(_) => RateSpec::default(),
        };
        for (bucket, asked) in [("bytes", rate.bytes), ("operations", rate.operations)] {
            let fits = |tokens| (1..=TOKENS_MAX).contains(&tokens);
            if let Some(BucketSpec { per_second, burst }) = asked
                && !(fits(per_second) && fits(burst))
            {
                return Err(SpecError::Rate {
                    id,
                    bucket,
                    per_second,
                    burst,
                });
            }
        }
        match self {
            Self::Block(block) if !is_label(&block.serial, SERIAL_BYTES) => {
                Err(SpecError::Serial {
                    id,
                    serial: block.serial.clone(),
                })
            }
            Self::Fs(fs) if !is_label(&fs.tag, TAG_BYTES) => Err(SpecError::Tag {
                id,
                tag: fs.tag.clone(),
            }),
            Self::Net(net) if net.mac.0 == [0; 6] || net.mac.0[0] & 1 == 1 => Err(SpecError::Mac {
                id,
                mac: net.mac.to_string(),
            }),
            Self::Net(net) if net.mtu < 68 => Err(SpecError::Mtu { id, mtu: net.mtu }),
            _ => Ok(()),
        }
    }
}

impl VfioSpec {
    /// Checks functions that came with `descriptors` descriptors beside them.
    ///
    /// # Errors
    /// The first value that cannot be, with what would be right.
    pub fn check(&self, descriptors: usize) -> Result<(), SpecError> {
        let id = checked_id(&self.id)?;
        let slots: HashSet<_> = self.functions.iter().map(|one| one.slot).collect();
        let exist = |slots: &HashSet<u8>| slots.iter().all(|slot| usize::from(*slot) < PCI_SLOTS);
        let count = self.functions.len();
        if !(1..=VFIO_FUNCTIONS_MAX).contains(&count) || slots.len() != count || !exist(&slots) {
            return Err(SpecError::Functions(id));
        }
        let mut used = UsedDescriptors::new(descriptors);
        used.take("vfio.container", self.container)?;
        used.take("vfio.group", self.group)?;
        let mut devices = self.functions.iter();
        devices.try_for_each(|one| used.take("vfio.functions.device", one.device))
    }
}

fn checked_id(id: &str) -> Result<String, SpecError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match id.is_empty() || id.len() > DEVICE_ID_BYTES || !id.chars().all(allowed) {
        true => Err(SpecError::DeviceId(id.to_owned())),
        false => Ok(id.to_owned()),
    }
}

fn is_label(text: &str, most: usize) -> bool {
    (1..=most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

/// Sees to it that each descriptor exists and has one owner.
struct UsedDescriptors {
    given: usize,
    used: HashSet<u32>,
}

impl UsedDescriptors {
    fn new(given: usize) -> Self {
        Self {
            given,
            used: HashSet::new(),
        }
    }

    fn take(&mut self, field: &'static str, descriptor: Descriptor) -> Result<(), SpecError> {
        let index = descriptor.0;
        if index as usize >= self.given {
            return Err(SpecError::DescriptorMissing {
                field,
                index,
                given: self.given,
            });
        }
        if !self.used.insert(index) {
            return Err(SpecError::DescriptorTwice { field, index });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        BlockSpec, BootSpec, FsSpec, HostPort, MacAddress, MemorySpec, NetSpec, VcpuSpec, VsockSpec,
    };

    fn boot() -> BootSpec {
        BootSpec {
            kernel: Descriptor(1),
            initramfs: None,
            command_line: "quiet".into(),
        }
    }

    fn saved() -> SavedSpec {
        SavedSpec {
            state: Descriptor(1),
            memory: Descriptor(6),
            origin: "a build".into(),
        }
    }

    fn spec() -> VmSpec {
        VmSpec {
            kvm: Descriptor(0),
            vcpus: VcpuSpec { boot: 1, max: 2 },
            memory: MemorySpec {
                boot_mib: 128,
                pluggable_mib: 0,
            },
            start: StartSpec::Boot(boot()),
            console: None,
            vsock: Some(VsockSpec {
                cid: 3,
                host_ports: vec![HostPort {
                    port: 1024,
                    stream: Descriptor(2),
                }],
            }),
            vfio: false,
            blocks: vec![BlockSpec {
                id: "root".into(),
                file: Descriptor(3),
                read_only: true,
                serial: "root".into(),
                rate: RateSpec {
                    bytes: None,
                    operations: Some(BucketSpec {
                        per_second: 100,
                        burst: 1,
                    }),
                },
            }],
            nets: vec![NetSpec {
                id: "eth0".into(),
                tap: Descriptor(4),
                mac: MacAddress([2, 0, 0, 0, 0, 1]),
                mtu: 1500,
                rate: RateSpec::default(),
            }],
            filesystems: vec![FsSpec {
                id: "shared".into(),
                socket: Descriptor(5),
                tag: "husk".into(),
            }],
        }
    }

    #[test]
    fn accepts_a_sound_spec() {
        assert!(ValidVmSpec::new(spec(), 6).is_ok());
    }

    #[test]
    fn survives_json() {
        let text = serde_json::to_string(&spec()).unwrap();
        assert_eq!(serde_json::from_str::<VmSpec>(&text).unwrap(), spec());
    }

    #[test]
    fn what_says_nothing_of_rates_has_none() {
        let mut value = serde_json::to_value(spec()).unwrap();
        value["blocks"][0].as_object_mut().unwrap().remove("rate");
        let spec = serde_json::from_value::<VmSpec>(value).unwrap();
        assert_eq!(spec.blocks[0].rate, RateSpec::default());
    }

    #[test]
    fn refuses_unknown_fields() {
        let mut value = serde_json::to_value(spec()).unwrap();
        value["surprise"] = 1.into();
        assert!(serde_json::from_value::<VmSpec>(value).is_err());
    }

    #[test]
    fn a_saved_guest_needs_its_files_and_its_origin() {
        let restore = |saved| {
            ValidVmSpec::new(
                VmSpec {
                    start: StartSpec::Restore(saved),
                    ..spec()
                },
                7,
            )
        };
        assert!(restore(saved()).is_ok());
        assert!(saved().check(7).is_ok());
        let error = saved().check(6).unwrap_err().to_string();
        assert!(error.contains("saved.memory is descriptor 6"), "{error}");
        for length in [0, ORIGIN_BYTES + 1] {
            let mut saved = saved();
            saved.origin = "x".repeat(length);
            assert_eq!(restore(saved).unwrap_err(), SpecError::Origin(length));
        }
        let mut twice = saved();
        twice.memory = twice.state;
        let error = restore(twice).unwrap_err().to_string();
        assert!(
            error.contains("saved.memory is descriptor 1, which another"),
            "{error}"
        );
    }

    fn change_boot(spec: &mut VmSpec, change: impl FnOnce(&mut BootSpec)) {
        let StartSpec::Boot(boot) = &mut spec.start else {
            panic!("{spec:?}");
        };
        change(boot);
    }

    type Change = fn(&mut VmSpec);

    #[test]
    fn names_what_is_wrong() {
        let cases: [(Change, &str); 16] = [
            (|s| s.memory.boot_mib = 1, "memory.boot_mib is 1"),
            (|s| s.memory.boot_mib = u32::MAX, "memory.boot_mib"),
            (
                |s| s.memory.pluggable_mib = 100,
                "memory.pluggable_mib is 100",
            ),
            (
                |s| s.memory.pluggable_mib = MEMORY_MAX_MIB,
                "memory.pluggable_mib",
            ),
            (|s| s.vcpus.boot = 0, "boot 0"),
            (|s| s.vcpus.boot = 3, "boot 3, max 2"),
            (
                |s| change_boot(s, |boot| boot.command_line = "a\0b".into()),
                "without NUL",
            ),
            (
                |s| change_boot(s, |boot| boot.command_line = "a".repeat(2048)),
                "2048 bytes",
            ),
            (
                |s| change_boot(s, |boot| boot.kernel = Descriptor(9)),
                "boot.kernel is descriptor 9, but 6",
            ),
            (
                |s| s.blocks[0].file = Descriptor(0),
                "block.file is descriptor 0, which another",
            ),
            (|s| s.blocks[0].id = "eth0".into(), "\"eth0\" is used twice"),
            (|s| s.blocks[0].serial = "x".repeat(21), "serial"),
            (
                |s| s.nets[0].mac = MacAddress([1, 0, 0, 0, 0, 0]),
                "unicast",
            ),
            (|s| s.vsock.as_mut().unwrap().cid = 2, "vsock.cid is 2"),
            (
                |s| s.blocks[0].rate.operations.as_mut().unwrap().per_second = 0,
                "rate.operations of device \"root\" is 0 a second",
            ),
            (
                |s| {
                    s.nets[0].rate.bytes = Some(BucketSpec {
                        per_second: 1,
                        burst: u64::MAX,
                    });
                },
                "rate.bytes of device \"eth0\"",
            ),
        ];
        for (change, expected) in cases {
            let mut spec = spec();
            change(&mut spec);
            let error = ValidVmSpec::new(spec, 6).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }

    #[test]
    fn reads_hardware_addresses() {
        assert_eq!(
            "02:00:00:00:00:0a".parse(),
            Ok(MacAddress([2, 0, 0, 0, 0, 10]))
        );
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:0a:0b",
            "2:0:0:0:0:a",
            "02:00:00:00:00:zz",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }
}
