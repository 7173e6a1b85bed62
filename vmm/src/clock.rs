//! The clock of the timeline.

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // Neither is negative.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
