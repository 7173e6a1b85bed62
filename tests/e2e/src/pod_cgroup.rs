//! The cgroup that the kubelet makes for a pod on the node.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// A cgroup as the kubelet makes it, with the controllers that count. It goes
/// with this.
pub struct PodCgroup {
    /// As the CRI names it.
    pub name: String,
    path: PathBuf,
}

impl PodCgroup {
    /// Makes one without limits.
    pub fn make(name: &str) -> Result<Self> {
        let root = PathBuf::from("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+cpu +memory +pids")?;
        let path = root.join(name);
        fs::create_dir(&path)?;
        Ok(Self {
            name: format!("/{name}"),
            path,
        })
    }

    /// Sets one of its limits.
    pub fn limit(&self, file: &str, value: &str) -> Result<()> {
        fs::write(self.path.join(file), value).with_context(|| format!("set {file} to {value}"))
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        // What is still in it is found by the check for leftovers.
        let _ = fs::remove_dir(&self.path);
    }
}
