//! The devices of a spec and its rules about them.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// The device that every list of a node's devices has.
const NULL: (i64, i64) = (1, 3);

/// One entry of `linux.devices`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Device {
    /// In the container.
    pub path: PathBuf,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: DeviceKind,
    /// On the host.
    #[serde(default)]
    pub major: i64,
    /// On the host.
    #[serde(default)]
    pub minor: i64,
}

/// What a device, or a rule's, is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum DeviceKind {
    /// Of rules: any.
    #[serde(rename = "a")]
    All,
    /// A block device.
    #[serde(rename = "b")]
    Block,
    /// A character device.
    #[serde(rename = "c", alias = "u")]
    Character,
    /// A fifo.
    #[serde(rename = "p")]
    Pipe,
}

/// One entry of `linux.resources.devices`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct DeviceRule {
    allow: bool,
    #[serde(rename = "type")]
    kind: Option<DeviceKind>,
    major: Option<i64>,
    minor: Option<i64>,
    access: Option<String>,
}

/// What a container may do with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Open it to read.
    pub read: bool,
    /// Open it to write.
    pub write: bool,
}

impl Device {
    /// As the kernel writes both numbers in one, where they are numbers.
    pub fn number(&self) -> Option<(u32, u32)> {
        Some((self.major.try_into().ok()?, self.minor.try_into().ok()?))
    }
}

impl DeviceRule {
    fn covers(&self, kind: DeviceKind, (major, minor): (i64, i64), letter: char) -> bool {
        // Missing, and a number below zero, is any.
        let fits = |number: Option<i64>, wanted| number.is_none_or(|n| n < 0 || n == wanted);
        let access = self.access.as_deref().unwrap_or_default();
        self.kind.is_none_or(|k| k == DeviceKind::All || k == kind)
            && fits(self.major, major)
            && fits(self.minor, minor)
            && (access.is_empty() || access.contains(letter))
    }
}

/// What the rules allow a block device: the last one that speaks of it decides.
pub fn block_access(rules: &[DeviceRule], (major, minor): (u32, u32)) -> Access {
    let number = (major.into(), minor.into());
    Access {
        read: allows(rules, DeviceKind::Block, number, 'r'),
        write: allows(rules, DeviceKind::Block, number, 'w'),
    }
}

fn allows(rules: &[DeviceRule], kind: DeviceKind, number: (i64, i64), letter: char) -> bool {
    let covers = |rule: &&DeviceRule| rule.covers(kind, number, letter);
    rules
        .iter()
        .rev()
        .find(covers)
        .is_some_and(|rule| rule.allow)
}

/// The spec has every device of its node: it is that of a privileged container.
pub fn has_all(devices: &[Device], rules: &[DeviceRule]) -> bool {
    // No device has this number; no rule is for it alone.
    let any = (i64::MAX, i64::MAX);
    let is_null = |device: &Device| {
        device.kind == DeviceKind::Character && (device.major, device.minor) == NULL
    };
    allows(rules, DeviceKind::Block, any, 'w') && devices.iter().any(is_null)
}

/// Which of the devices a container asks for. Of one that has all of its node,
/// those block devices that are not there because of that alone: they are listed
/// twice, or at a path that is not the node's, as `is_nodes` says; and groups of PCI
/// devices that are listed twice.
pub fn asked_for(
    devices: &[Device],
    rules: &[DeviceRule],
    is_nodes: impl Fn(&Device) -> bool,
) -> Vec<usize> {
    if !has_all(devices, rules) {
        return (0..devices.len()).collect();
    }
    let is_asked = |(index, device): &(usize, &Device)| {
        let again = devices.iter().skip(index + 1).any(|next| next == *device);
        let before = devices.iter().take(*index).any(|next| next == *device);
        let is_asked = match device.kind {
            DeviceKind::Block => again || !is_nodes(device),
            DeviceKind::Character => again && device.path.parent() == Some(Path::new("/dev/vfio")),
            DeviceKind::All | DeviceKind::Pipe => false,
        };
        is_asked && !before
    };
    let asked = devices.iter().enumerate().filter(is_asked);
    asked.map(|(index, _)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(json: &str) -> Vec<DeviceRule> {
        serde_json::from_str(json).unwrap()
    }

    fn devices(json: &str) -> Vec<Device> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_last_rule_that_speaks_of_a_device_decides() {
        let rules = rules(
            r#"[{"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 8, "minor": 0, "access": "rm"},
                {"allow": true, "type": "b", "major": 7, "minor": -1, "access": "rwm"},
                {"allow": true, "type": "c", "major": 8, "minor": 0},
                {"allow": false, "major": 7, "minor": 3, "access": "w"}]"#,
        );
        let access = |number| {
            let Access { read, write } = block_access(&rules, number);
            (read, write)
        };
        assert_eq!(access((8, 0)), (true, false));
        assert_eq!(access((8, 1)), (false, false));
        assert_eq!(access((7, 1)), (true, true));
        assert_eq!(access((7, 3)), (true, false));
        assert_eq!(
            block_access(&[], (7, 1)),
            Access {
                read: false,
                write: false
            }
        );
    }

    #[test]
    fn tells_a_nodes_devices_from_those_asked_for() {
        let all = devices(
            r#"[{"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                {"path": "/dev/xvda", "type": "b", "major": 8, "minor": 0},
                {"path": "/dev/sdb", "type": "b", "major": 8, "minor": 16},
                {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
                {"path": "/dev/sdb", "type": "b", "major": 8, "minor": 16},
                {"path": "/dev/vfio/7", "type": "c", "major": 243, "minor": 0},
                {"path": "/dev/vfio/8", "type": "c", "major": 243, "minor": 1},
                {"path": "/dev/vfio/7", "type": "c", "major": 243, "minor": 0},
                {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232},
                {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]"#,
        );
        let is_nodes = |device: &Device| {
            device.path.starts_with("/dev/sda") || device.path.starts_with("/dev/sdb")
        };
        let open = rules(r#"[{"allow": false}, {"allow": true, "access": "rwm"}]"#);
        assert_eq!(asked_for(&all, &open, is_nodes), [1, 2, 5]);
        let closed = rules(r#"[{"allow": false}]"#);
        assert_eq!(asked_for(&all, &closed, is_nodes).len(), all.len());
        // All are allowed, but none is listed that was not asked for.
        assert_eq!(asked_for(&all[3..6], &open, is_nodes), [0, 1, 2]);
    }
}
