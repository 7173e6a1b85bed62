//! What the end-to-end cases, the demo and the benchmarks share: a containerd
//! node driven by `ctr` and by the CRI, and looked at from outside.

pub mod block;
pub mod case;
pub mod clean;
pub mod compatibility;
pub mod cri;
pub mod ctr;
pub mod docker;
pub mod drop_in;
pub mod footprint;
pub mod host;
pub mod image;
pub mod netns;
pub mod node;
pub mod oci;
pub mod pci;
pub mod pod;
pub mod pod_cgroup;
pub mod pod_state;
pub mod process;
pub mod runner;
pub mod spans;
pub mod stream;
pub mod stuck;
pub mod tasks;
pub mod template;
