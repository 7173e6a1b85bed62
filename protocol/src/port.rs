//! vsock ports on the host side (CID 2). The guest dials, the host never does.

/// The agent dials this once at start and serves ttrpc on it.
pub const AGENT: u32 = 1024;

/// First of the ports that the shim hands out for streams, one each, never
/// used twice in a pod's life.
pub const FIRST_STREAM: u32 = 0x1_0000;
