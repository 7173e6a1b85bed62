//! A group of PCI devices of the node, opened (linux/vfio.h).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use husk_vmm_spec::VFIO_FUNCTIONS_MAX;
use libc::{c_int, c_ulong};
use ttrpc::Code;

/// Where the kernel tells of groups.
const GROUPS: &str = "/sys/kernel/iommu_groups";

/// The driver that gives devices away.
const DRIVER: &str = "vfio-pci";

/// Class of bridges, which stay the node's.
const BRIDGE: &str = "0x06";

// `_IO(';', 100 + n)`.
const GET_API_VERSION: c_ulong = 0x3b64;
const CHECK_EXTENSION: c_ulong = 0x3b65;
const SET_IOMMU: c_ulong = 0x3b66;
const GROUP_GET_STATUS: c_ulong = 0x3b67;
const GROUP_SET_CONTAINER: c_ulong = 0x3b68;
const GROUP_GET_DEVICE_FD: c_ulong = 0x3b6a;

const API_VERSION: c_int = 0;
/// `VFIO_TYPE1v2_IOMMU`.
const TYPE1V2: c_ulong = 3;
const GROUP_IS_VIABLE: u32 = 1 << 0;

/// A group that the node cannot give.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// The kernel has none of that number.
    #[error("the node has no IOMMU group of that number")]
    Unknown,
    /// A device of it is the node's.
    #[error("PCI device {address} of its IOMMU group is bound to {driver}, not to {DRIVER}")]
    Bound {
        /// Which.
        address: String,
        /// By what, or that it is by nothing.
        driver: String,
    },
    /// Bridges alone, or more devices than fit one device of a machine.
    #[error("its IOMMU group has {0} PCI devices; it must be 1 to {VFIO_FUNCTIONS_MAX}")]
    Devices(usize),
    /// The node's kernel has other ways to do it.
    #[error("the node's VFIO has no type 1 IOMMU")]
    Iommu,
    /// A step that the kernel refuses.
    #[error("{step}")]
    Refused {
        /// Which.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl GroupError {
    /// What containerd is told.
    pub fn code(&self) -> Code {
        match self {
            Self::Unknown => Code::NOT_FOUND,
            Self::Bound { .. } | Self::Devices(_) | Self::Iommu => Code::FAILED_PRECONDITION,
            Self::Refused { .. } => Code::UNKNOWN,
        }
    }
}

/// The group of a device's name below /dev, as the kernel says it.
pub fn number(name: &str) -> Option<u32> {
    let number = name.strip_prefix("vfio/")?;
    let is_plain = number.bytes().all(|byte| byte.is_ascii_digit());
    number.parse().ok().filter(|_| is_plain)
}

/// Descriptors of a group and its devices; nobody else has it meanwhile.
#[derive(Debug)]
pub struct OpenGroup {
    devices: Vec<OwnedFd>,
    group: OwnedFd,
    container: OwnedFd,
}

impl OpenGroup {
    /// Opens a group, all of whose devices are for whoever opens it.
    ///
    /// # Errors
    /// One of them is not, or somebody has the group.
    pub fn open(number: u32) -> Result<Self, GroupError> {
        let addresses = devices(&Path::new(GROUPS).join(number.to_string()))?;
        let open = |step, path: &str| {
            let file = OpenOptions::new().read(true).write(true).open(path);
            file.map_err(|source| GroupError::Refused { step, source })
        };
        let container = open("open /dev/vfio/vfio", "/dev/vfio/vfio")?;
        let version = call(&container, "VFIO_GET_API_VERSION", GET_API_VERSION, 0)?;
        let has = call(&container, "VFIO_CHECK_EXTENSION", CHECK_EXTENSION, TYPE1V2)?;
        if version != API_VERSION || has == 0 {
            return Err(GroupError::Iommu);
        }
        // EBUSY: somebody else has it.
        let group = open("open it", &format!("/dev/vfio/{number}"))?;
        // `struct vfio_group_status`: its size, and flags.
        let mut status = [8_u32, 0];
        let at = status.as_mut_ptr() as c_ulong;
        call(&group, "VFIO_GROUP_GET_STATUS", GROUP_GET_STATUS, at)?;
        if status[1] & GROUP_IS_VIABLE == 0 {
            let source = io::ErrorKind::ResourceBusy.into();
            let step = "a device of its IOMMU group is in use on the node";
            return Err(GroupError::Refused { step, source });
        }
        let number = container.as_raw_fd();
        let at = &raw const number as c_ulong;
        call(&group, "VFIO_GROUP_SET_CONTAINER", GROUP_SET_CONTAINER, at)?;
        call(&container, "VFIO_SET_IOMMU", SET_IOMMU, TYPE1V2)?;
        let devices = addresses.iter().map(|address| {
            let mut name = address.clone().into_bytes();
            name.push(0);
            let at = name.as_ptr() as c_ulong;
            let fd = call(&group, "VFIO_GROUP_GET_DEVICE_FD", GROUP_GET_DEVICE_FD, at)?;
            // SAFETY: the kernel has just made it for us.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        });
        Ok(Self {
            devices: devices.collect::<Result<_, GroupError>>()?,
            group: group.into(),
            container: container.into(),
        })
    }

    /// One of so many devices that are none.
    #[cfg(test)]
    pub fn pretended(functions: usize) -> Self {
        let open = || OwnedFd::from(File::open("/dev/null").unwrap());
        Self {
            devices: (0..functions).map(|_| open()).collect(),
            group: open(),
            container: open(),
        }
    }

    /// How many there are.
    pub fn functions(&self) -> usize {
        self.devices.len()
    }

    /// Container, group and devices.
    pub fn into_parts(self) -> (OwnedFd, OwnedFd, Vec<OwnedFd>) {
        (self.container, self.group, self.devices)
    }
}

/// The addresses of a group's devices, in their order; bridges are none of them.
fn devices(group: &Path) -> Result<Vec<String>, GroupError> {
    let Ok(entries) = fs::read_dir(group.join("devices")) else {
        return Err(GroupError::Unknown);
    };
    let mut addresses = Vec::new();
    for entry in entries.flatten() {
        let class = fs::read_to_string(entry.path().join("class")).unwrap_or_default();
        if class.starts_with(BRIDGE) {
            continue;
        }
        let address = entry.file_name().to_string_lossy().into_owned();
        let driver = fs::read_link(entry.path().join("driver"));
        let driver = driver.ok().and_then(|path| {
            let name = path.file_name()?.to_string_lossy().into_owned();
            Some(name)
        });
        if driver.as_deref() != Some(DRIVER) {
            let driver = driver.unwrap_or_else(|| "no driver".to_owned());
            return Err(GroupError::Bound { address, driver });
        }
        addresses.push(address);
    }
    addresses.sort_unstable();
    match addresses.len() {
        1..=VFIO_FUNCTIONS_MAX => Ok(addresses),
        count => Err(GroupError::Devices(count)),
    }
}

fn call(
    file: &File,
    step: &'static str,
    request: c_ulong,
    argument: c_ulong,
) -> Result<c_int, GroupError> {
    // SAFETY: the argument is a number, or the address of what the call wants, which
    // the caller keeps meanwhile.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, argument) } {
        answer @ 0.. => Ok(answer),
        _ => Err(GroupError::Refused {
            step,
            source: io::Error::last_os_error(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_group_is_a_number_below_vfio() {
        assert_eq!(number("vfio/7"), Some(7));
        for name in [
            "vfio/vfio",
            "vfio/noiommu-0",
            "vfio/devices/vfio0",
            "vfio/",
            "vfio/+7",
            "vfio/99999999999",
            "7",
        ] {
            assert_eq!(number(name), None, "{name}");
        }
    }

    #[test]
    fn all_devices_of_a_group_have_to_be_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let add = |address: &str, class: &str, driver: Option<&str>| {
            let device = dir.path().join("devices").join(address);
            fs::create_dir_all(&device).unwrap();
            fs::write(device.join("class"), class).unwrap();
            let link = device.join("driver");
            let _ = fs::remove_file(&link);
            if let Some(driver) = driver {
                symlink(format!("../../drivers/{driver}"), link).unwrap();
            }
        };
        let said = || devices(dir.path()).map_err(|error| error.to_string());
        assert_eq!(
            said().unwrap_err(),
            "the node has no IOMMU group of that number"
        );
        add("0000:00:1c.0", "0x060400\n", Some("pcieport"));
        assert!(said().unwrap_err().contains("has 0 PCI devices"));
        add("0000:01:00.1", "0x040300\n", Some("vfio-pci"));
        add("0000:01:00.0", "0x030000\n", Some("vfio-pci"));
        assert_eq!(said().unwrap(), ["0000:01:00.0", "0000:01:00.1"]);
        add("0000:01:00.1", "0x040300\n", Some("snd_hda_intel"));
        let bound = "PCI device 0000:01:00.1 of its IOMMU group is bound to snd_hda_intel, \
                     not to vfio-pci";
        assert_eq!(said().unwrap_err(), bound);
        add("0000:01:00.1", "0x040300\n", None);
        assert!(said().unwrap_err().contains("bound to no driver"));
        add("0000:01:00.1", "0x040300\n", Some("vfio-pci"));
        for function in 2..9 {
            add(
                &format!("0000:01:00.{function}"),
                "0x0c03",
                Some("vfio-pci"),
            );
        }
        assert!(said().unwrap_err().contains("has 9 PCI devices"));
    }
}
