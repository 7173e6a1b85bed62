//! What a container or a pod may use.

use serde::Deserialize;

use super::BundleError;

/// Least memory limit of a container, bytes: below it no process starts.
pub(super) const MEMORY_LIMIT_MIN: i64 = 4 << 20;

/// Most, bytes: more than any virtual machine has.
pub(super) const MEMORY_LIMIT_MAX: i64 = (husk_vmm_spec::MEMORY_MAX_MIB as i64) << 20;

/// Limits from which the machine's size follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes; none: unlimited.
    pub memory_bytes: Option<u64>,
    /// Processors in thousandths; none: unlimited.
    pub cpu_millis: Option<u64>,
    /// Huge pages, which do not count as memory.
    pub huge_page_bytes: u64,
}

/// What nothing limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unlimited {
    /// Memory.
    pub memory: bool,
    /// Processors.
    pub cpu: bool,
}

/// What of a spec's `linux.resources` limits the machine.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ResourceLimits {
    memory: Option<MemoryLimit>,
    cpu: Option<CpuLimit>,
    #[serde(rename = "hugepageLimits")]
    huge_pages: Option<Vec<HugePageLimit>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HugePageLimit {
    /// Bytes; Go writes the largest number for none.
    limit: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MemoryLimit {
    limit: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CpuLimit {
    quota: Option<i64>,
    period: Option<u64>,
}

impl ResourceLimits {
    /// # Errors
    /// A memory limit no container can run under.
    pub(super) fn limits(&self) -> Result<Limits, BundleError> {
        let memory = self.memory.as_ref().and_then(|memory| memory.limit);
        let cpu = self.cpu.as_ref();
        let limits = Limits::new(
            memory,
            cpu.and_then(|cpu| cpu.quota),
            cpu.and_then(|cpu| cpu.period),
        )?;
        let huge_pages = self.huge_pages.iter().flatten().map(|size| size.limit);
        let huge_page_bytes = huge_pages
            .filter(|limit| *limit != u64::MAX)
            .fold(0_u64, u64::saturating_add);
        Ok(Limits {
            huge_page_bytes,
            ..limits
        })
    }
}

impl Limits {
    /// Limits as OCI and CRI write them.
    ///
    /// # Errors
    /// A memory limit no container can run under.
    pub fn new(
        memory_bytes: Option<i64>,
        cpu_quota: Option<i64>,
        cpu_period: Option<u64>,
    ) -> Result<Self, BundleError> {
        Ok(Self {
            memory_bytes: memory_limit(memory_bytes)?,
            cpu_millis: cpu_quota
                .zip(cpu_period)
                .and_then(|(q, p)| cpu_millis(q, p)),
            huge_page_bytes: 0,
        })
    }
}

/// 0 and -1 mean none.
fn memory_limit(bytes: Option<i64>) -> Result<Option<u64>, BundleError> {
    match bytes {
        None | Some(0 | -1) => Ok(None),
        Some(bytes) if (MEMORY_LIMIT_MIN..=MEMORY_LIMIT_MAX).contains(&bytes) => {
            Ok(Some(bytes.unsigned_abs()))
        }
        Some(bytes) => Err(BundleError::MemoryLimit(bytes)),
    }
}

fn cpu_millis(quota: i64, period: u64) -> Option<u64> {
    let quota = u64::try_from(quota).ok().filter(|quota| *quota > 0)?;
    quota.checked_mul(1000)?.checked_div(period)
}
