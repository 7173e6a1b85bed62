//! What the shim of a pod notes about it.

use std::fs;

use anyhow::{Context, Result};
use serde_json::Value;

/// Of a pod, in whatever namespace of containerd's it is.
///
/// # Errors
/// There is no such pod, or its file is none of ours.
pub fn of(pod: &str) -> Result<Value> {
    let namespaces = fs::read_dir("/run/husk")?.flatten();
    let mut files = namespaces.map(|folder| folder.path().join(pod).join("state.json"));
    let file = files
        .find(|path| path.exists())
        .with_context(|| format!("no state of {pod}"))?;
    let text = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

/// Whether its machine began as a copy of another.
///
/// # Errors
/// As [`of`], or nothing is said of that.
pub fn is_copy(pod: &str) -> Result<bool> {
    let state = of(pod)?;
    state["machine"]["from_template"]
        .as_bool()
        .with_context(|| format!("{state}"))
}
