//! The node's own templates, which come and go beside the pods.

use std::time::Duration;

use anyhow::Result;

use crate::clean::{arguments, pids};
use crate::process::eventually;

/// Where the shim keeps them (`template_dir`).
pub const FOLDER: &str = "/run/husk-templates";

/// Whether some shim has left a process that makes one.
pub fn is_being_made() -> bool {
    pids().any(is_maker)
}

/// Whether a process makes one.
pub fn is_maker(pid: i32) -> bool {
    let [program, word, ..] = &arguments(pid)[..] else {
        return false;
    };
    program.ends_with("containerd-shim-husk-v2") && word == "template"
}

/// Waits until none is made.
///
/// # Errors
/// One is still made.
pub fn await_maker(limit: Duration) -> Result<()> {
    eventually("the end of a template's maker", limit, || {
        Ok((!is_being_made()).then_some(()))
    })
}
