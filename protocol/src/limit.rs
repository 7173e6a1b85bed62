//! Bounds that both sides enforce on what the other sends.

/// Largest ttrpc message, bytes (ttrpc's own limit).
pub const MESSAGE_BYTES: usize = 4 << 20;

/// Longest container or exec id, bytes (containerd allows 76).
pub const ID_BYTES: usize = 128;

/// Containers in one pod.
pub const CONTAINERS: usize = 256;

/// Devices that one container may name, and that its disks stand on.
pub const DEVICES: usize = 256;

/// Debug shells at a time.
pub const SHELLS: usize = 16;

/// Processes made by Exec that are alive or not yet deleted, per container.
pub const EXECS: usize = 1024;
