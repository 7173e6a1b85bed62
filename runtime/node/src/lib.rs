//! What Husk's shim keeps on a node, and what it is told there: the
//! configuration, what guests boot from, and the state of each pod. The shim writes
//! it; the operator's command reads it.

pub mod config;
pub mod pod_log;
pub mod process;
pub mod rates;
pub mod shell;
pub mod smaps;
pub mod state;
pub mod sums;
pub mod trace;
pub mod verified;
