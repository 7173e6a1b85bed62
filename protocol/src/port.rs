//! vsock ports on the host side (CID 2). The guest dials, the host never does.

/// The agent dials this once at start and serves ttrpc on it.
pub const AGENT: u32 = 1024;

/// First of the ports that the shim hands out for streams, one each, at random:
/// any process of the guest may dial, so the number must not be guessed.
pub const FIRST_STREAM: u32 = 0x1_0000;
