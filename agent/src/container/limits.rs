//! OCI resources, which speak of cgroup v1, as files of cgroup v2.

use crate::oci::{BlockIo, Cpu, HugepageLimit, Memory, Resources, Throttle};

/// The default period of CPU quotas, microseconds.
const CPU_PERIOD: u64 = 100_000;

/// A limit that can't be said.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    #[error("memory.swap {swap} counts memory too, so it can't be below memory.limit {limit}")]
    SwapBelowMemory { swap: i64, limit: i64 },
    #[error("memory.swap needs memory.limit")]
    SwapWithoutMemory,
    #[error(
        "memory.limit {limit} is more than the {machine} bytes that the pod's machine can have; that \
         follows from the pod's limits, or the annotation io.husk.vm.memory_mib, at its start"
    )]
    BeyondMachine { limit: i64, machine: u64 },
    #[error("unified: {key:?} is no file of a cgroup")]
    Unified { key: String },
}

/// One file to write.
#[derive(Debug, PartialEq, Eq)]
pub struct Limit {
    /// Name in the cgroup.
    pub file: String,
    /// What to write.
    pub value: String,
    /// The machine may lack the file.
    pub optional: bool,
}

/// A limit that nothing could ever reach is a promise that can't be kept:
/// `machine` is what the machine can grow to, bytes.
pub fn check_memory(memory: &Memory, machine: u64) -> Result<(), LimitError> {
    match memory.limit {
        Some(limit @ 1..) if limit.unsigned_abs() > machine => {
            Err(LimitError::BeyondMachine { limit, machine })
        }
        _ => Ok(()),
    }
}

/// The files to write, in order. Of what speaks of the node there is nothing:
/// its processors and memory banks are not the guest's, and its block devices
/// other disks than those with the same numbers here, but for the container's
/// own `devices`.
pub fn writes(resources: &Resources, devices: &[u64]) -> Result<Vec<Limit>, LimitError> {
    let mut writes = Writes(Vec::new());
    writes.memory(&resources.memory)?;
    writes.cpu(&resources.cpu);
    match resources.pids.limit {
        None | Some(0) => {}
        Some(limit) => writes.set("pids.max", number_or_max(limit)),
    }
    writes.block_io(&resources.block_io, devices);
    for limit in &resources.hugepage_limits {
        writes.huge_pages(limit);
    }
    for (key, value) in &resources.unified {
        let plain = !key.contains('/') && key.contains('.') && !key.starts_with("cgroup.");
        if !plain {
            return Err(LimitError::Unified { key: key.clone() });
        }
        for line in value.lines() {
            writes.set(key, line.to_owned());
        }
    }
    Ok(writes.0)
}

struct Writes(Vec<Limit>);

impl Writes {
    fn set(&mut self, file: &str, value: String) {
        self.push(file, value, false);
    }

    fn push(&mut self, file: &str, value: String, optional: bool) {
        self.0.push(Limit {
            file: file.to_owned(),
            value,
            optional,
        });
    }

    fn memory(&mut self, memory: &Memory) -> Result<(), LimitError> {
        // Zero is how Go writes a number that isn't set.
        let given = |value: Option<i64>| value.filter(|value| *value != 0);
        let limit = given(memory.limit);
        match (given(memory.swap), limit) {
            (None, _) => {}
            (Some(-1), _) => self.push("memory.swap.max", "max".to_owned(), true),
            (Some(swap), Some(limit)) if limit > 0 => {
                if swap < limit {
                    return Err(LimitError::SwapBelowMemory { swap, limit });
                }
                self.push("memory.swap.max", (swap - limit).to_string(), true);
            }
            (Some(_), _) => return Err(LimitError::SwapWithoutMemory),
        }
        if let Some(limit) = limit {
            self.set("memory.max", number_or_max(limit));
        }
        if let Some(reservation) = given(memory.reservation) {
            self.set("memory.low", number_or_max(reservation));
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: &Cpu) {
        if let Some(idle) = cpu.idle {
            self.set("cpu.idle", idle.to_string());
        }
        if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
            self.set("cpu.weight", weight_of_shares(shares).to_string());
        }
        let quota = cpu.quota.filter(|quota| *quota != 0);
        let period = cpu.period.filter(|period| *period != 0);
        // A burst may not exceed the quota: drop the old one first.
        if cpu.burst.is_some() {
            self.push("cpu.max.burst", "0".to_owned(), true);
        }
        if quota.is_some() || period.is_some() {
            let quota = quota.map_or("max".to_owned(), number_or_max);
            let period = period.unwrap_or(CPU_PERIOD);
            self.set("cpu.max", format!("{quota} {period}"));
        }
        if let Some(burst) = cpu.burst.filter(|burst| *burst != 0) {
            self.set("cpu.max.burst", burst.to_string());
        }
    }

    fn block_io(&mut self, block_io: &BlockIo, own: &[u64]) {
        if let Some(weight) = block_io.weight.filter(|weight| *weight != 0) {
            // 10..=1000 becomes 1..=10000.
            let weight = 1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990;
            self.push("io.weight", format!("default {weight}"), true);
        }
        let throttles = [
            ("rbps", &block_io.throttle_read_bps_device),
            ("wbps", &block_io.throttle_write_bps_device),
            ("riops", &block_io.throttle_read_iops_device),
            ("wiops", &block_io.throttle_write_iops_device),
        ];
        for (key, devices) in throttles {
            for device in devices
                .iter()
                .filter(|device| own.contains(&device.number()))
            {
                self.throttle(key, device);
            }
        }
    }

    fn throttle(&mut self, key: &str, device: &Throttle) {
        let rate = match device.rate {
            0 => "max".to_owned(),
            rate => rate.to_string(),
        };
        let value = format!("{}:{} {key}={rate}", device.major, device.minor);
        self.set("io.max", value);
    }

    fn huge_pages(&mut self, limit: &HugepageLimit) {
        // The kubelet names every size of its node; the guest may lack some.
        let size = &limit.page_size;
        let value = match limit.limit {
            u64::MAX => "max".to_owned(),
            limit => limit.to_string(),
        };
        self.push(&format!("hugetlb.{size}.max"), value.clone(), true);
        self.push(&format!("hugetlb.{size}.rsvd.max"), value, true);
    }
}

fn number_or_max(value: i64) -> String {
    match value {
        ..0 => "max".to_owned(),
        value => value.to_string(),
    }
}

/// 2..=262144 becomes 1..=10000, as other runtimes map it.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(json: &str) -> Vec<(String, String)> {
        let resources = serde_json::from_str(json).unwrap();
        let writes = writes(&resources, &[rustix::fs::makedev(254, 16)]).unwrap();
        let writes = writes.into_iter();
        writes.map(|limit| (limit.file, limit.value)).collect()
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        let owned = |(file, value): &(&str, &str)| ((*file).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn cpu_shares_and_quota_become_weight_and_max() {
        let cpu = r#"{"cpu":{"shares":1024,"quota":50000,"period":100000}}"#;
        let expected = [("cpu.weight", "39"), ("cpu.max", "50000 100000")];
        assert_eq!(written(cpu), pairs(&expected));
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(262_144), 10_000);
        assert_eq!(
            written(r#"{"cpu":{"quota":-1}}"#),
            pairs(&[("cpu.max", "max 100000")])
        );
        assert_eq!(written(r#"{"cpu":{"shares":0,"quota":0}}"#), []);
    }

    #[test]
    fn what_speaks_of_the_node_is_not_written() {
        assert_eq!(written(r#"{"cpu":{"cpus":"12-15","mems":"1"}}"#), []);
        let throttles = r#"{"blockIO":{"throttleReadBpsDevice":
            [{"major":8,"minor":0,"rate":5},{"major":254,"minor":16,"rate":7}]}}"#;
        assert_eq!(written(throttles), pairs(&[("io.max", "254:16 rbps=7")]));
    }

    #[test]
    fn swap_is_what_exceeds_memory() {
        let memory = r#"{"memory":{"limit":1000,"swap":1500,"reservation":500}}"#;
        let expected = [
            ("memory.swap.max", "500"),
            ("memory.max", "1000"),
            ("memory.low", "500"),
        ];
        assert_eq!(written(memory), pairs(&expected));
        let memory = serde_json::from_str(r#"{"memory":{"limit":1000,"swap":10}}"#).unwrap();
        assert!(matches!(
            writes(&memory, &[]),
            Err(LimitError::SwapBelowMemory { .. })
        ));
        assert_eq!(written(r#"{"memory":{"limit":0,"swap":0}}"#), []);
        assert_eq!(
            written(r#"{"memory":{"limit":-1}}"#),
            pairs(&[("memory.max", "max")])
        );
    }

    #[test]
    fn memory_beyond_the_machine_is_refused() {
        let memory = |limit| Memory {
            limit,
            ..Memory::default()
        };
        for limit in [None, Some(0), Some(-1), Some(1000)] {
            check_memory(&memory(limit), 1000).unwrap();
        }
        let error = check_memory(&memory(Some(1001)), 1000).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("1001") && text.contains("machine"), "{text}");
    }

    #[test]
    fn unified_keys_stay_in_the_cgroup() {
        assert_eq!(
            written(r#"{"unified":{"memory.oom.group":"1"}}"#),
            pairs(&[("memory.oom.group", "1")])
        );
        for key in ["../x.y", "cgroup.procs", "nodot"] {
            let text = format!(r#"{{"unified":{{"{key}":"1"}}}}"#);
            let resources = serde_json::from_str(&text).unwrap();
            assert!(
                matches!(writes(&resources, &[]), Err(LimitError::Unified { .. })),
                "{key}"
            );
        }
    }
}
