//! The contract between Husk's shim (host) and agent (guest): messages, ports,
//! paths, limits and deadlines. No logic.

pub mod deadline;
pub mod limit;
pub mod path;
pub mod port;

/// Messages of `proto/agent.proto` and the service generated from it.
pub mod agent {
    pub use crate::generated::agent::*;
    pub use crate::generated::agent_ttrpc::*;
}

/// containerd's cgroup v2 statistics (`proto/cgroup2_metrics.proto`).
pub mod metrics {
    pub use crate::generated::cgroup2_metrics::*;
}

#[allow(
    missing_docs,
    unused_mut,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}
