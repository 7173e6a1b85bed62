//! What a case gives its containers of the node's storage: disks and mounts,
//! gone when dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::process;

/// Of one call of a tool.
const PATIENCE: Duration = Duration::from_secs(60);

/// A block device that stands on a file.
pub struct LoopDevice {
    /// Its node.
    pub path: String,
    /// The file.
    pub file: PathBuf,
}

impl LoopDevice {
    /// A device of so many MiB, on a new file of zeroes.
    pub fn new(file: &Path, mib: u64) -> Result<Self> {
        File::create_new(file)?.set_len(mib << 20)?;
        let mut command = Command::new("losetup");
        command.args(["--find", "--show"]).arg(file);
        let path = process::run(&mut command, PATIENCE)?.ok()?.out();
        Ok(Self {
            path: path.trim().to_owned(),
            file: file.to_owned(),
        })
    }

    /// Makes an ext4 file system on it.
    pub fn format(&self) -> Result<()> {
        let mut command = Command::new("mke2fs");
        command.args(["-q", "-t", "ext4", &self.path]);
        process::run(&mut command, PATIENCE)?.ok()?;
        Ok(())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // What stays is found by the check for leftovers.
        let _ = process::run(Command::new("losetup").args(["-d", &self.path]), PATIENCE);
    }
}

/// A mount of the node.
pub struct NodeMount(PathBuf);

impl NodeMount {
    /// Mounts `source`, of a type, at a directory, made when missing.
    pub fn new(kind: &str, source: &str, options: &str, at: &Path) -> Result<Self> {
        fs::create_dir_all(at)?;
        let mut command = Command::new("mount");
        command.args(["-t", kind, "-o", options, source]).arg(at);
        process::run(&mut command, PATIENCE)?.ok()?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for NodeMount {
    fn drop(&mut self) {
        // The same.
        let _ = process::run(Command::new("umount").arg(&self.0), PATIENCE);
    }
}

/// A file system of the node that takes no writes: who writes waits, and no signal ends
/// that.
pub struct Frozen(PathBuf);

impl Frozen {
    /// Freezes the one that is mounted there.
    pub fn new(at: &Path) -> Result<Self> {
        let mut command = Command::new("fsfreeze");
        process::run(command.arg("--freeze").arg(at), PATIENCE)?.ok()?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let mut command = Command::new("fsfreeze");
        let _ = process::run(command.arg("--unfreeze").arg(&self.0), PATIENCE);
    }
}
