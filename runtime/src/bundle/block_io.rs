//! What a container may do to the node's disks.

use serde::Deserialize;

/// OCI's `linux.resources.blockIO`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct BlockIo {
    weight: Option<u16>,
    throttle_read_bps_device: Option<Vec<Throttle>>,
    throttle_write_bps_device: Option<Vec<Throttle>>,
    #[serde(rename = "throttleReadIOPSDevice")]
    throttle_read_iops_device: Option<Vec<Throttle>>,
    #[serde(rename = "throttleWriteIOPSDevice")]
    throttle_write_iops_device: Option<Vec<Throttle>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Throttle {
    major: u32,
    minor: u32,
    rate: u64,
}

impl BlockIo {
    /// Its share beside other cgroups, as cgroup v2 counts: from 1 to 10000.
    pub fn weight(&self) -> Option<u64> {
        let weight = self.weight.filter(|weight| *weight != 0)?;
        Some(1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990)
    }

    /// Lines for a cgroup's `io.max`.
    pub fn throttles(&self) -> Vec<String> {
        let keys = [
            ("rbps", &self.throttle_read_bps_device),
            ("wbps", &self.throttle_write_bps_device),
            ("riops", &self.throttle_read_iops_device),
            ("wiops", &self.throttle_write_iops_device),
        ];
        let lines = keys.into_iter().flat_map(|(key, devices)| {
            devices.iter().flatten().map(move |device| {
                let Throttle { major, minor, rate } = device;
                match rate {
                    0 => format!("{major}:{minor} {key}=max"),
                    rate => format!("{major}:{minor} {key}={rate}"),
                }
            })
        });
        lines.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_oci_writes() {
        let block_io: BlockIo = serde_json::from_str(
            r#"{"weight":500,"throttleReadBpsDevice":[{"major":8,"minor":16,"rate":1024}],
                "throttleWriteBpsDevice":null,
                "throttleWriteIOPSDevice":[{"major":254,"minor":0,"rate":0}]}"#,
        )
        .unwrap();
        assert_eq!(block_io.weight(), Some(4950));
        assert_eq!(block_io.throttles(), ["8:16 rbps=1024", "254:0 wiops=max"]);
        let none = BlockIo::default();
        assert_eq!((none.weight(), none.throttles().len()), (None, 0));
    }
}
