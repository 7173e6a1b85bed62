//! How long the shim waits for the agent, which keeps its own deadlines below:
//! who asks shall hear what became of it.

use std::time::Duration;

/// For a process to be made, or what it needs to be mounted.
pub const MAKING: Duration = Duration::from_secs(60);

/// For the guest to end by itself, with everything written to its disks, on a
/// node that is not slow.
pub const POWER_OFF: Duration = Duration::from_secs(10);
