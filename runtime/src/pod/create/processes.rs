//! Whose processes a container joins, if it asks for somebody else's.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Pod;
use crate::bundle::{Bundle, BundleError};
use crate::container::{Container, Kind};
use crate::error::Error;

impl Pod {
    /// Finds whose processes the container joins: another's of the pod, or those
    /// that all containers of a sandbox share, which are named by the VMM.
    pub(super) fn join_processes(&self, bundle: &mut Bundle) -> Result<(), Error> {
        let Some(path) = bundle.joined_pids().map(Path::to_owned) else {
            return Ok(());
        };
        let pid = bundle.joined_pid();
        let first = self.containers.get(self.settings.id.as_str());
        let is_single = |first: &Container| matches!(first.kind, Kind::Guest(_));
        if let Some(target) = pid.and_then(|pid| self.with_pid(pid)) {
            bundle.join_processes_of(target);
        } else if pid == Some(self.pid()) && first.is_some_and(is_single) {
            bundle.join_processes_of(self.settings.id.as_str());
        } else {
            let of_pod = PathBuf::from(format!("/proc/{}/ns/pid", self.pid()));
            if !self.shares_pids || !is_same_file(&path, &of_pod) {
                return Err(BundleError::OtherProcesses(path).into());
            }
        }
        Ok(())
    }
}

/// Namespaces that are the same are one file.
fn is_same_file(one: &Path, other: &Path) -> bool {
    let number = |path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
    matches!((number(one), number(other)), (Ok(one), Ok(other)) if one == other)
}
