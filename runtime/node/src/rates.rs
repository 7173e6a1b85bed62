//! How much the disks and interfaces of a machine may move.

use crate::config::Config;

/// What is limited; without a value nothing is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Of each disk, reading and writing together.
    pub disk: DeviceRates,
    /// Of each interface, in each direction.
    pub network: DeviceRates,
}

/// The limits of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceRates {
    /// KiB in a second.
    pub kib_per_second: Option<u32>,
    /// KiB at once; without it as many as in a second.
    pub burst_kib: Option<u32>,
    /// Requests or frames in a second.
    pub operations_per_second: Option<u32>,
    /// Requests or frames at once; without it as many as in a second.
    pub burst_operations: Option<u32>,
}

impl Rates {
    /// What the node's configuration says.
    pub fn of_node(config: &Config) -> Self {
        Self {
            disk: DeviceRates {
                kib_per_second: config.disk_kib_per_second,
                burst_kib: config.disk_burst_kib,
                operations_per_second: config.disk_requests_per_second,
                burst_operations: config.disk_burst_requests,
            },
            network: DeviceRates {
                kib_per_second: config.network_kib_per_second,
                burst_kib: config.network_burst_kib,
                operations_per_second: config.network_frames_per_second,
                burst_operations: config.network_burst_frames,
            },
        }
    }

    /// The value that a key of the configuration names, if it is one of these.
    pub fn named(&mut self, key: &str) -> Option<&mut Option<u32>> {
        let Self { disk, network } = self;
        Some(match key {
            "disk_kib_per_second" => &mut disk.kib_per_second,
            "disk_burst_kib" => &mut disk.burst_kib,
            "disk_requests_per_second" => &mut disk.operations_per_second,
            "disk_burst_requests" => &mut disk.burst_operations,
            "network_kib_per_second" => &mut network.kib_per_second,
            "network_burst_kib" => &mut network.burst_kib,
            "network_frames_per_second" => &mut network.operations_per_second,
            "network_burst_frames" => &mut network.burst_operations,
            _ => return None,
        })
    }

    /// These, and where they say nothing, the others.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        Self {
            disk: self.disk.or(others.disk),
            network: self.network.or(others.network),
        }
    }
}

impl DeviceRates {
    fn or(self, others: Self) -> Self {
        Self {
            kib_per_second: self.kib_per_second.or(others.kib_per_second),
            burst_kib: self.burst_kib.or(others.burst_kib),
            operations_per_second: self.operations_per_second.or(others.operations_per_second),
            burst_operations: self.burst_operations.or(others.burst_operations),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::key::KEYS;

    #[test]
    fn every_key_has_its_place() {
        let mut config = toml::Table::new();
        let mut rates = Rates::default();
        for (number, key) in (1..).zip(KEYS) {
            if let Some(value) = rates.named(key.name) {
                *value = Some(number);
                config.insert(key.name.to_owned(), i64::from(number).into());
            }
        }
        assert_eq!(config.len(), 8);
        let config: Config = config.try_into().unwrap();
        assert_eq!(Rates::of_node(&config), rates);
    }

    #[test]
    fn what_is_said_of_a_pod_wins_value_by_value() {
        let mut node = Rates::default();
        *node.named("disk_burst_kib").unwrap() = Some(1);
        *node.named("network_frames_per_second").unwrap() = Some(2);
        let mut pod = Rates::default();
        *pod.named("disk_burst_kib").unwrap() = Some(3);
        *pod.named("disk_kib_per_second").unwrap() = Some(4);
        let both = pod.or(node);
        assert_eq!(both.disk.burst_kib, Some(3));
        assert_eq!(both.disk.kib_per_second, Some(4));
        assert_eq!(both.network.operations_per_second, Some(2));
        assert_eq!(both.network.burst_kib, None);
    }
}
