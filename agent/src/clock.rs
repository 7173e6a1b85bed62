//! The guest's wall clock.

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::error::{Doing, OsError};

/// A request may have waited for the guest to boot, so a clock ahead of it by
/// less is right.
const TOLERANCE: Duration = Duration::from_secs(60);

/// Nanoseconds since the guest's boot.
pub fn since_boot_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::Boottime))
}

/// Steps the clock when it can't be right, given the host's time of a moment
/// that has passed.
pub fn correct(host_ns: u64) -> Result<(), OsError> {
    let now = nanoseconds(clock_gettime(ClockId::Realtime));
    let tolerance = u64::try_from(TOLERANCE.as_nanos()).unwrap_or(u64::MAX);
    if host_ns == 0 || (host_ns..host_ns.saturating_add(tolerance)).contains(&now) {
        return Ok(());
    }
    log::info!("clock stepped from {now} to {host_ns} ns");
    let time = Timespec {
        tv_sec: (host_ns / 1_000_000_000).cast_signed(),
        tv_nsec: (host_ns % 1_000_000_000).cast_signed(),
    };
    clock_settime(ClockId::Realtime, time).doing("set", "the clock")
}

fn nanoseconds(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}
