//! What the device numbers in a container's spec stand for: they are the
//! host's, and the guest has devices of its own.

use std::collections::HashMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use husk_protocol::agent::{DeviceNumber, device_number};
use husk_protocol::limit;

use crate::error::Error;
use crate::oci::{Device, DeviceKind, DeviceRule, Linux, Mount, Resources, Throttle};
use crate::pci::{self, Node};
use crate::storage;

/// The devices of a container, as its spec numbers them.
#[derive(Debug, Default)]
pub struct DeviceNumbers {
    known: Vec<Known>,
    below: Vec<Below>,
    /// Those of PCI devices of the host, which its spec does not number.
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Known {
    kind: DeviceKind,
    host: (u32, u32),
    guest: Guest,
}

/// A device of the host, and the container's disk that stands on it.
#[derive(Debug)]
struct Below {
    host: (i64, i64),
    disk: (u32, u32),
}

#[derive(Debug)]
enum Guest {
    Number(u32, u32),
    /// The guest has none of this name.
    Missing(String),
}

impl DeviceNumbers {
    /// Finds the devices, and those that came out of the PCI functions in these
    /// slots; waits for what was just plugged.
    pub async fn find(wanted: &[DeviceNumber], slots: &[u32]) -> Result<Self, Error> {
        let invalid = |reason: String| Error::Invalid {
            field: "devices",
            reason,
        };
        if wanted.len() + slots.len() > limit::DEVICES {
            let most = limit::DEVICES;
            let count = wanted.len() + slots.len();
            return Err(invalid(format!("{count} of them, at most {most}")));
        }
        // Many devices of the host stand below one disk.
        let mut disks = HashMap::new();
        let (mut known, mut below) = (Vec::new(), Vec::new());
        for number in wanted {
            let (kind, guest) = match &number.device {
                Some(device_number::Device::BlockSerial(serial)) => {
                    let guest = match disks.get(serial) {
                        Some(guest) => *guest,
                        None => storage::find_disk(serial).await?.number(),
                    };
                    disks.insert(serial, guest);
                    (DeviceKind::Block, parts(guest))
                }
                Some(device_number::Device::CharacterName(name)) => {
                    (DeviceKind::Character, character(name))
                }
                _ => return Err(invalid("one of no kind".to_owned())),
            };
            match guest {
                Guest::Number(major, minor) if number.io_only => below.push(Below {
                    host: (number.major.into(), number.minor.into()),
                    disk: (major, minor),
                }),
                _ if number.io_only => {
                    return Err(invalid("I/O to one that is no disk".to_owned()));
                }
                guest => known.push(Known {
                    kind,
                    host: (number.major, number.minor),
                    guest,
                }),
            }
        }
        let mut nodes = Vec::new();
        for slot in slots {
            nodes.extend(pci::claim(*slot).await?);
        }
        Ok(Self {
            known,
            below,
            nodes,
        })
    }

    /// The guest's numbers of the container's block devices.
    pub fn blocks(&self) -> Vec<u64> {
        let known = self.known.iter();
        let known = known
            .filter(|known| known.kind == DeviceKind::Block)
            .filter_map(|known| match known.guest {
                Guest::Number(major, minor) => Some((major, minor)),
                Guest::Missing(_) => None,
            });
        let nodes = self.nodes.iter();
        let nodes = nodes.filter(|node| node.kind == DeviceKind::Block);
        known
            .chain(nodes.map(|node| node.number))
            .map(|(major, minor)| rustix::fs::makedev(major, minor))
            .collect()
    }

    /// The guest's numbers of all disks that hold something of the container's.
    pub fn disks(&self) -> Vec<u64> {
        let below = self.below.iter();
        let below = below.map(|below| rustix::fs::makedev(below.disk.0, below.disk.1));
        let mut disks = self.blocks();
        disks.extend(below);
        disks.sort_unstable();
        disks.dedup();
        disks
    }

    /// Gives a container's spec the guest's numbers.
    pub fn translate(&self, linux: &mut Linux) -> Result<(), Error> {
        self.drop_foreign(&mut linux.devices);
        for device in &mut linux.devices {
            self.translate_device(device)?;
        }
        for node in &self.nodes {
            let path = Path::new("/dev").join(&node.name);
            // What its spec has there is meant to be there.
            if !linux.devices.iter().any(|device| device.path == path) {
                linux.devices.push(device_of(node, path));
            }
        }
        if linux.resources.is_some() || !self.nodes.is_empty() {
            self.translate_resources(linux.resources.get_or_insert_default());
        }
        Ok(())
    }

    /// The same for resources that come later.
    pub fn translate_resources(&self, resources: &mut Resources) {
        resources
            .devices
            .retain_mut(|rule| self.translate_rule(rule));
        resources.devices.extend(self.nodes.iter().map(rule_of));
        let block_io = &mut resources.block_io;
        for throttles in [
            &mut block_io.throttle_read_bps_device,
            &mut block_io.throttle_write_bps_device,
            &mut block_io.throttle_read_iops_device,
            &mut block_io.throttle_write_iops_device,
        ] {
            let of_guest = throttles
                .iter()
                .flat_map(|throttle| self.throttles(throttle));
            *throttles = of_guest.collect();
        }
    }

    /// Block devices that aren't the container's own: where its spec was
    /// written, their numbers are those of other disks.
    fn drop_foreign(&self, devices: &mut Vec<Device>) {
        devices.retain(|device| {
            let stays = device.kind != DeviceKind::Block
                || self
                    .number(DeviceKind::Block, device.major, device.minor)
                    .is_some();
            if !stays {
                let path = device.path.display();
                log::warn!("{path}: a block device of the host, left out");
            }
            stays
        });
    }

    fn translate_device(&self, device: &mut Device) -> Result<(), Error> {
        let missing = |what: String| Error::Invalid {
            field: "linux.devices",
            reason: format!("{}: the guest has no {what}", device.path.display()),
        };
        if matches!(device.kind, DeviceKind::Pipe | DeviceKind::All) {
            return Ok(());
        }
        match self.guest(device.kind, device.major, device.minor) {
            Some(Guest::Number(major, minor)) => {
                (device.major, device.minor) = ((*major).into(), (*minor).into());
                Ok(())
            }
            Some(Guest::Missing(name)) => Err(missing(format!("character device {name:?}"))),
            None if is_there(device.major, device.minor) => Ok(()),
            None => Err(missing(format!(
                "character device {}:{}",
                device.major, device.minor
            ))),
        }
    }

    /// False for a rule that says nothing here.
    fn translate_rule(&self, rule: &mut DeviceRule) -> bool {
        let (Some(kind), Some(major), Some(minor)) = (rule.kind, rule.major, rule.minor) else {
            return true;
        };
        match self.number(kind, major, minor) {
            Some((major, minor)) => {
                (rule.major, rule.minor) = (Some(major.into()), Some(minor.into()));
                true
            }
            // A negative number is one that is not given.
            None => kind != DeviceKind::Block || major < 0 || minor < 0,
        }
    }

    /// For the disk that the host's device is, and those that stand on it.
    fn throttles(&self, throttle: &Throttle) -> Vec<Throttle> {
        let host = (throttle.major, throttle.minor);
        let own = self.number(DeviceKind::Block, throttle.major, throttle.minor);
        let below = self.below.iter().filter(|below| below.host == host);
        let mut disks: Vec<_> = own.into_iter().chain(below.map(|one| one.disk)).collect();
        disks.sort_unstable();
        disks.dedup();
        let of_disk = |(major, minor): (u32, u32)| Throttle {
            major: major.into(),
            minor: minor.into(),
            rate: throttle.rate,
        };
        disks.into_iter().map(of_disk).collect()
    }

    fn number(&self, kind: DeviceKind, major: i64, minor: i64) -> Option<(u32, u32)> {
        match self.guest(kind, major, minor) {
            Some(Guest::Number(major, minor)) => Some((*major, *minor)),
            Some(Guest::Missing(_)) | None => None,
        }
    }

    fn guest(&self, kind: DeviceKind, major: i64, minor: i64) -> Option<&Guest> {
        let is_it = |known: &&Known| {
            let (host_major, host_minor) = known.host;
            known.kind == kind && (i64::from(host_major), i64::from(host_minor)) == (major, minor)
        };
        self.known.iter().find(is_it).map(|known| &known.guest)
    }
}

/// What a container mounts of the guest's `/dev` has to be there.
pub fn check_mounts(mounts: &[Mount]) -> Result<(), Error> {
    let of_dev = |mount: &&Mount| {
        let source = mount.source.as_deref();
        mount.is_bind() && source.is_some_and(|source| source.starts_with("/dev"))
    };
    for mount in mounts.iter().filter(of_dev) {
        let source = mount.source.as_deref().unwrap_or(Path::new(""));
        if source.symlink_metadata().is_err() {
            return Err(Error::Invalid {
                field: "mounts",
                reason: format!(
                    "{}: the guest has no device {}",
                    mount.destination.display(),
                    source.display()
                ),
            });
        }
    }
    Ok(())
}

fn device_of(node: &Node, path: PathBuf) -> Device {
    Device {
        path,
        kind: node.kind,
        major: node.number.0.into(),
        minor: node.number.1.into(),
        file_mode: None,
        uid: None,
        gid: None,
    }
}

fn rule_of(node: &Node) -> DeviceRule {
    DeviceRule {
        allow: true,
        kind: Some(node.kind),
        major: Some(node.number.0.into()),
        minor: Some(node.number.1.into()),
        access: Some("rwm".to_owned()),
    }
}

fn parts(number: u64) -> Guest {
    Guest::Number(rustix::fs::major(number), rustix::fs::minor(number))
}

fn character(name: &str) -> Guest {
    let path = Path::new(name);
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    let metadata = std::fs::symlink_metadata(Path::new("/dev").join(path)).ok();
    match metadata.filter(|found| plain && found.file_type().is_char_device()) {
        Some(found) => parts(found.rdev()),
        None => Guest::Missing(name.to_owned()),
    }
}

/// Whether the guest has a character device of this number. Those of terminals
/// come and go.
fn is_there(major: i64, minor: i64) -> bool {
    major == 136 || Path::new(&format!("/sys/dev/char/{major}:{minor}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(kind: DeviceKind, host: (u32, u32), guest: Guest) -> Known {
        Known { kind, host, guest }
    }

    fn numbers() -> DeviceNumbers {
        let known = vec![
            known(DeviceKind::Block, (8, 16), Guest::Number(254, 32)),
            known(DeviceKind::Character, (10, 126), Guest::Number(10, 125)),
            known(
                DeviceKind::Character,
                (195, 0),
                Guest::Missing("nvidia0".to_owned()),
            ),
        ];
        let below = |host, disk| Below { host, disk };
        DeviceNumbers {
            known,
            // The container's own disk is on a partition, and its root on the same
            // disk as that.
            below: vec![
                below((8, 16), (254, 32)),
                below((8, 32), (254, 32)),
                below((8, 32), (254, 48)),
            ],
            nodes: Vec::new(),
        }
    }

    #[test]
    fn what_is_said_of_a_disk_holds_for_what_stands_on_it() {
        let mut linux = linux(
            r#"{"devices": [{"path": "/dev/sdc", "type": "b", "major": 8, "minor": 32}],
                "resources": {
                  "devices": [{"allow": true, "type": "b", "major": 8, "minor": 32}],
                  "blockIO": {
                    "throttleReadBpsDevice": [{"major": 8, "minor": 32, "rate": 5}],
                    "throttleWriteIOPSDevice": [
                      {"major": 8, "minor": 16, "rate": 7}, {"major": 8, "minor": 0, "rate": 9}]}}}"#,
        );
        numbers().translate(&mut linux).unwrap();
        let resources = linux.resources.unwrap();
        // It is not the container's for that.
        assert!(linux.devices.is_empty() && resources.devices.is_empty());
        let numbers_of = |throttles: &[Throttle]| -> Vec<_> {
            let numbers = throttles.iter();
            numbers
                .map(|one| (one.major, one.minor, one.rate))
                .collect()
        };
        let block_io = resources.block_io;
        let read = numbers_of(&block_io.throttle_read_bps_device);
        assert_eq!(read, [(254, 32, 5), (254, 48, 5)]);
        let write = numbers_of(&block_io.throttle_write_iops_device);
        assert_eq!(write, [(254, 32, 7)]);
        let disks = [(254, 32), (254, 48)].map(|(major, minor)| rustix::fs::makedev(major, minor));
        assert_eq!(numbers().disks(), disks);
        assert_eq!(numbers().blocks(), disks[..1]);
    }

    fn linux(json: &str) -> Linux {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_spec_gets_the_guests_numbers() {
        let mut linux = linux(
            r#"{"devices": [
                  {"path": "/dev/xvda", "type": "b", "major": 8, "minor": 16},
                  {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
                  {"path": "/dev/x", "type": "c", "major": 10, "minor": 126},
                  {"path": "/dev/p", "type": "p"}],
                "resources": {
                  "devices": [
                    {"allow": false},
                    {"allow": true, "type": "b", "major": 8, "minor": 16, "access": "r"},
                    {"allow": true, "type": "b", "major": 8, "minor": 0},
                    {"allow": true, "type": "b", "major": 8, "minor": -1},
                    {"allow": true, "type": "c", "major": 1, "minor": 3}],
                  "blockIO": {"throttleReadBpsDevice": [
                    {"major": 8, "minor": 0, "rate": 1}, {"major": 8, "minor": 16, "rate": 2}]}}}"#,
        );
        numbers().translate(&mut linux).unwrap();
        let devices: Vec<_> = linux
            .devices
            .iter()
            .map(|device| (device.path.to_str().unwrap(), device.major, device.minor))
            .collect();
        assert_eq!(
            devices,
            [
                ("/dev/xvda", 254, 32),
                ("/dev/x", 10, 125),
                ("/dev/p", 0, 0)
            ]
        );
        let resources = linux.resources.unwrap();
        let rules: Vec<_> = resources
            .devices
            .iter()
            .map(|rule| (rule.major, rule.minor))
            .collect();
        assert_eq!(
            rules,
            [
                (None, None),
                (Some(254), Some(32)),
                (Some(8), Some(-1)),
                (Some(1), Some(3))
            ]
        );
        let throttles = resources.block_io.throttle_read_bps_device;
        assert_eq!(throttles.len(), 1);
        assert_eq!((throttles[0].major, throttles[0].minor), (254, 32));
    }

    #[test]
    fn what_comes_out_of_a_pci_device_is_the_containers() {
        let node = |name: &str, kind, number| Node {
            name: name.to_owned(),
            kind,
            number,
        };
        let numbers = DeviceNumbers {
            nodes: vec![
                node("nvme0", DeviceKind::Character, (241, 0)),
                node("nvme0n1", DeviceKind::Block, (259, 0)),
            ],
            ..numbers()
        };
        let spec = r#"{"devices": [
            {"path": "/dev/nvme0", "type": "c", "major": 10, "minor": 126}]}"#;
        let mut linux = linux(spec);
        numbers.translate(&mut linux).unwrap();
        let devices = linux.devices.iter();
        let devices: Vec<_> = devices
            .map(|d| (d.path.to_str().unwrap(), d.major))
            .collect();
        assert_eq!(devices, [("/dev/nvme0", 10), ("/dev/nvme0n1", 259)]);
        let rules = |resources: &Resources| -> Vec<_> {
            let rules = resources.devices.iter();
            rules
                .map(|rule| (rule.allow, rule.major, rule.minor))
                .collect()
        };
        let own = [(true, Some(241), Some(0)), (true, Some(259), Some(0))];
        assert_eq!(rules(&linux.resources.unwrap()), own);
        assert_eq!(numbers.blocks().last(), Some(&rustix::fs::makedev(259, 0)));
        // Rules that come later take nothing of it away.
        let mut later: Resources =
            serde_json::from_str(r#"{"devices": [{"allow": false, "access": "rwm"}]}"#).unwrap();
        numbers.translate_resources(&mut later);
        assert_eq!(rules(&later)[1..], own);
    }

    #[test]
    fn a_character_device_that_is_not_there_is_named() {
        for (device, said) in [
            (
                r#"{"path": "/dev/gpu", "type": "c", "major": 195, "minor": 0}"#,
                r#"/dev/gpu: the guest has no character device "nvidia0""#,
            ),
            (
                r#"{"path": "/dev/odd", "type": "c", "major": 4000, "minor": 7}"#,
                "/dev/odd: the guest has no character device 4000:7",
            ),
        ] {
            let mut linux = linux(&format!(r#"{{"devices": [{device}]}}"#));
            let error = numbers().translate(&mut linux).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
        }
    }

    #[test]
    fn a_mounted_device_that_is_not_there_is_named() {
        let mounts = |source: &str| -> Vec<Mount> {
            let json =
                format!(r#"[{{"destination": "/v", "type": "bind", "source": "{source}"}}]"#);
            serde_json::from_str(&json).unwrap()
        };
        check_mounts(&mounts("/dev/null")).unwrap();
        check_mounts(&mounts("/no/such")).unwrap();
        let error = check_mounts(&mounts("/dev/nvidia0")).unwrap_err();
        let said = "/v: the guest has no device /dev/nvidia0";
        assert!(error.to_string().contains(said), "{error}");
    }

    #[test]
    fn names_stay_below_dev() {
        assert!(matches!(character("null"), Guest::Number(1, 3)));
        for name in ["../dev/null", "/dev/null", "no-such", ""] {
            assert!(matches!(character(name), Guest::Missing(_)), "{name}");
        }
    }
}
