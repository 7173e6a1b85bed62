//! Spare PCI devices of the node (`tests/lab/lab --vfio`), lent to pods and taken back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::case::Skip;
use crate::process;

const DEVICES: &str = "/sys/bus/pci/devices";
const DRIVER: &str = "vfio-pci";

/// The serial of the spare disk.
const DISK: &str = "husk-spare";

/// A device that is vfio-pci's until this is dropped.
pub struct Lent {
    address: String,
    /// Its `/dev/vfio` node.
    pub group: String,
}

/// The spare disk's node, as the node's own driver has it.
///
/// # Errors
/// There is none; without an IOMMU the case is skipped.
pub fn spare_disk() -> Result<PathBuf> {
    need_iommu()?;
    for entry in fs::read_dir("/sys/block")?.flatten() {
        let serial = fs::read_to_string(entry.path().join("serial"));
        if serial.is_ok_and(|serial| serial.trim() == DISK) {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("no disk has the serial {DISK}")
}

/// The PCI address of a disk.
///
/// # Errors
/// It is on none.
pub fn address_of(disk: &Path) -> Result<String> {
    let name = disk.file_name().context("a disk")?;
    let device = fs::canonicalize(Path::new("/sys/block").join(name).join("device"))?;
    let function = device.parent().and_then(Path::file_name);
    Ok(function.context("a PCI function")?.to_string_lossy().into())
}

/// PCI addresses of all devices of a class behind the IOMMU, of which virtio's old ones
/// are none.
///
/// # Errors
/// There is no IOMMU, and the case is skipped.
pub fn of_class(class: &str) -> Result<Vec<String>> {
    need_iommu()?;
    let mut found = Vec::new();
    for entry in fs::read_dir(DEVICES)?.flatten() {
        let text = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        if text("class").starts_with(class) && text("revision").trim() != "0x00" {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    found.sort();
    Ok(found)
}

fn need_iommu() -> Result<()> {
    let groups = fs::read_dir("/sys/kernel/iommu_groups")
        .into_iter()
        .flatten();
    match groups.count() {
        0 => Err(Skip("the node has no IOMMU (tests/lab/lab --vfio)".to_owned()).into()),
        _ => Ok(()),
    }
}

impl Lent {
    /// Takes a device from its driver.
    ///
    /// # Errors
    /// The node does not let us.
    pub fn new(address: &str) -> Result<Self> {
        let mut modules = Command::new("modprobe");
        modules.args(["-a", "vfio_iommu_type1", "vfio_pci"]);
        process::run(&mut modules, Duration::from_secs(120))?.ok()?;
        let function = Path::new(DEVICES).join(address);
        let group = fs::read_link(function.join("iommu_group"))?;
        let group = group.file_name().context("a group")?.to_string_lossy();
        let lent = Self {
            address: address.to_owned(),
            group: format!("/dev/vfio/{group}"),
        };
        lent.give(DRIVER)?;
        Ok(lent)
    }

    fn give(&self, driver: &str) -> Result<()> {
        let function = Path::new(DEVICES).join(&self.address);
        // A line break takes it back.
        fs::write(function.join("driver_override"), format!("{driver}\n"))?;
        if function.join("driver").exists() {
            fs::write(function.join("driver/unbind"), &self.address)?;
        }
        fs::write("/sys/bus/pci/drivers_probe", &self.address)?;
        Ok(())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // What stays is found by the check for leftovers.
        if let Err(error) = self.give("") {
            println!("{} stays with {DRIVER}: {error:#}", self.address);
        }
    }
}
