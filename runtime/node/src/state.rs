//! The file in a pod's directory from which others learn what is on the node for
//! the pod. The shim alone writes it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::process::Process;

/// Its name in the pod's directory.
pub const FILE: &str = "state.json";

/// Most that is read of it, bytes.
const LONGEST: u64 = 1 << 20;

/// What is on the node for a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// The pod's shim.
    pub shim: Option<Process>,
    /// Its VMM.
    pub vmm: Option<Process>,
    /// Its file server.
    pub file_server: Option<Process>,
    /// containerd has been told that the pod's own container is deleted, while
    /// the shim still serves others.
    pub is_deleted: bool,
    /// Its cgroup, below the mount point of cgroup v2.
    pub cgroup: Option<PathBuf>,
    /// The network namespace that its machine took over.
    pub netns: Option<NetnsId>,
    /// Its machine, once it runs.
    pub machine: Option<MachineFacts>,
    /// Its start.
    pub timeline: Timeline,
    /// How its machine ended, once it has.
    pub end: Option<EndFacts>,
}

/// What tells a network namespace from all others as long as it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

/// A machine as it began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MachineFacts {
    /// Processors that the guest began with.
    pub vcpus: u8,
    /// Processors that it may have.
    pub vcpus_max: u8,
    /// Memory that it began with, MiB.
    pub memory_mib: u32,
    /// Memory that may be added, MiB.
    pub pluggable_mib: u32,
    /// Its interfaces.
    pub nics: Vec<NicFacts>,
    /// Its disks.
    pub disks: Vec<DiskFacts>,
    /// It began as a template.
    pub from_template: bool,
    /// Which.
    pub template: Option<String>,
    /// Version of the shim that made it.
    pub shim_version: String,
    /// The agent's version, as the guest tells it.
    pub agent_version: String,
    /// Its kernel's release, as the guest tells it.
    pub kernel_release: String,
}

/// How a machine ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndFacts {
    /// In a word.
    pub kind: EndKind,
    /// In a few words.
    pub reason: String,
    /// The pod was being stopped.
    pub was_asked: bool,
    /// The last lines of the guest's console, where they may tell more.
    pub console: String,
    /// When, wall clock, nanoseconds since the epoch.
    pub at_ns: u64,
}

/// What ends machines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndKind {
    /// The guest powered itself off.
    PoweredOff,
    /// It reset itself.
    Reset,
    /// Its kernel panicked.
    Panicked,
    /// The shim ended it.
    Killed,
    /// The VMM could not go on, and said why.
    VmmFailed,
    /// The VMM ended without a word.
    VmmGone,
    /// The agent had ended.
    LostAgent,
    /// The file server had ended.
    LostFileServer,
    /// What a newer shim knows, or an older one does not tell.
    #[default]
    #[serde(other)]
    Unknown,
}

impl EndKind {
    /// As it is written.
    pub fn word(self) -> &'static str {
        match self {
            Self::PoweredOff => "powered-off",
            Self::Reset => "reset",
            Self::Panicked => "panicked",
            Self::Killed => "killed",
            Self::VmmFailed => "vmm-failed",
            Self::VmmGone => "vmm-gone",
            Self::LostAgent => "lost-agent",
            Self::LostFileServer => "lost-file-server",
            Self::Unknown => "unknown",
        }
    }
}

/// An interface of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NicFacts {
    /// Its name in the pod.
    pub name: String,
    /// Its hardware address.
    pub mac: String,
    /// Its largest packet.
    pub mtu: u16,
}

/// A disk of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskFacts {
    /// Its serial.
    pub serial: String,
    /// The guest may not write to it.
    pub read_only: bool,
}

/// Moments of a pod's start, `CLOCK_MONOTONIC` in nanoseconds; 0: not yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timeline {
    /// containerd's request came.
    pub request_ns: u64,
    /// The VMM's program began.
    pub vmm_exec_ns: u64,
    /// It had read what to do.
    pub vmm_spec_ns: u64,
    /// The guest's first instruction.
    pub guest_entered_ns: u64,
    /// The agent began, by what it says itself; 0 for one that began in a template.
    pub agent_began_ns: u64,
    /// The agent had set the sandbox up.
    pub agent_ready_ns: u64,
    /// The first container was created.
    pub container_created_ns: u64,
    /// Its program was executed.
    pub container_started_ns: u64,
    /// Its first output came.
    pub first_output_ns: u64,
}

impl State {
    /// What was last written in the pod's directory.
    ///
    /// # Errors
    /// There is no such file, or another version of Husk wrote it.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let mut text = Vec::new();
        File::open(dir.join(FILE))?
            .take(LONGEST)
            .read_to_end(&mut text)?;
        serde_json::from_slice(&text).map_err(io::Error::from)
    }
}

impl NetnsId {
    /// That of the namespace at `path`, if there is one.
    pub fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_older_and_newer_shims_write() {
        let dir = tempfile::tempdir().unwrap();
        assert!(State::read(dir.path()).is_err());
        let text = r#"{"shim": {"pid": 7, "start_ticks": 9}, "is_deleted": true, "news": 1}"#;
        fs::write(dir.path().join(FILE), text).unwrap();
        let state = State::read(dir.path()).unwrap();
        assert_eq!(state.shim.map(|shim| shim.pid), Some(7));
        assert!(state.is_deleted && state.machine.is_none());
        for (text, kind) in [
            (r#"{"end": {"reason": "x"}}"#, EndKind::Unknown),
            (r#"{"end": {"kind": "eaten"}}"#, EndKind::Unknown),
            (r#"{"end": {"kind": "lost-agent"}}"#, EndKind::LostAgent),
        ] {
            fs::write(dir.path().join(FILE), text).unwrap();
            let end = State::read(dir.path()).unwrap().end.unwrap();
            assert_eq!(end.kind, kind);
            let word = serde_json::to_value(kind).unwrap();
            assert_eq!(word, kind.word());
        }
    }
}
