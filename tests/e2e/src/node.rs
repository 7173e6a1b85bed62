//! The node under test: where its containerd listens and keeps its files.

use std::path::PathBuf;

/// Namespace of the cases that use `ctr`.
pub const NAMESPACE: &str = "husk-e2e";
/// Namespace of containerd's CRI plugin.
pub const CRI_NAMESPACE: &str = "k8s.io";

/// One containerd and its folders.
#[derive(Clone, Debug)]
pub struct Node {
    /// containerd's socket; the CRI is served on the same one.
    pub socket: PathBuf,
    /// containerd's root: metadata, content and snapshots.
    pub root: PathBuf,
    /// containerd's state: bundles and sockets.
    pub state: PathBuf,
    /// A folder for what the cases make.
    pub work: PathBuf,
    /// Shell command that starts containerd again after a case has killed it;
    /// without one, those cases are skipped.
    pub restart: Option<String>,
    /// How much slower than hardware the node is; scales waiting, never the
    /// promises that are measured.
    pub slowness: u32,
    /// Size of the bulk transfers.
    pub bulk_mib: u64,
}

/// What runs the containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// The runtime under test.
    Husk,
    /// The reference: a case that fails here is a wrong case.
    Runc,
}

impl Runtime {
    /// Name of the CRI handler, and of the runtime in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Husk => "husk",
            Self::Runc => "runc",
        }
    }

    /// What `ctr --runtime` calls it.
    pub fn ctr_name(self) -> &'static str {
        match self {
            Self::Husk => "io.containerd.husk.v2",
            Self::Runc => "io.containerd.runc.v2",
        }
    }

    /// The runtime that a name stands for.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Husk, Self::Runc]
            .into_iter()
            .find(|runtime| runtime.name() == name)
    }
}

impl Node {
    /// The machine's own containerd, on hardware.
    pub fn local() -> Self {
        Self {
            socket: "/run/containerd/containerd.sock".into(),
            root: "/var/lib/containerd".into(),
            state: "/run/containerd".into(),
            work: "/var/tmp/husk-e2e".into(),
            restart: None,
            slowness: 1,
            bulk_mib: 100,
        }
    }

    /// The options that describe this node to another `husk-e2e`.
    pub fn arguments(&self) -> Vec<String> {
        let mut all = vec![
            "--socket".into(),
            self.socket.display().to_string(),
            "--root".into(),
            self.root.display().to_string(),
            "--state".into(),
            self.state.display().to_string(),
            "--work".into(),
            self.work.display().to_string(),
            "--slowness".into(),
            self.slowness.to_string(),
            "--bulk-mib".into(),
            self.bulk_mib.to_string(),
        ];
        if let Some(restart) = &self.restart {
            all.extend(["--restart".into(), restart.clone()]);
        }
        all
    }
}
