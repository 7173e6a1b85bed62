//! The keys of the configuration, each with its kind, range and meaning: the one
//! place from which values are checked and `docs/configuration.md` is made.

use std::fmt;

use super::UIDS;

/// One key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// What its value is.
    pub kind: Kind,
    /// What it does, and when to change it.
    pub meaning: &'static str,
}

/// What a value may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An absolute path.
    Path,
    /// A whole number.
    Number {
        /// The least.
        least: u32,
        /// The most.
        most: u32,
        /// What it counts.
        unit: &'static str,
    },
    /// True or false.
    Switch,
    /// Printable ASCII in one line.
    Text {
        /// The longest, bytes.
        longest: usize,
    },
}

/// All of them, in the order in which they are shown.
pub const KEYS: [Key; 20] = [
    Key {
        name: "vmm",
        kind: Kind::Path,
        meaning: "The VMM's program.",
    },
    Key {
        name: "file_server",
        kind: Kind::Path,
        meaning: "The file server's program.",
    },
    Key {
        name: "kernel",
        kind: Kind::Path,
        meaning: "The guest's kernel, an uncompressed ELF file. It boots only if it is what `SHA256SUMS` beside \
                  it says; for one of your own, which has a folder of its own, `sha256sum vmlinux > SHA256SUMS` there \
                  after each build. A pod keeps the one it began with.",
    },
    Key {
        name: "initramfs",
        kind: Kind::Path,
        meaning: "The guest's initramfs, which holds the agent. It belongs to this version of the shim, and \
                  boots only if it is what `SHA256SUMS` beside it says, as the kernel does.",
    },
    Key {
        name: "state_dir",
        kind: Kind::Path,
        meaning: "Where the state of running pods is, one directory a pod. It must be gone after a \
                  reboot. Change it only while no pod runs.",
    },
    Key {
        name: "template_dir",
        kind: Kind::Path,
        meaning: "Where the booted machine is kept from which pods begin, some 40 MiB, and what the files \
                  that were booted are: on tmpfs. It must be gone after a reboot.",
    },
    Key {
        name: "template_max_age_seconds",
        kind: Kind::Number {
            least: 0,
            most: 31_536_000,
            unit: "seconds",
        },
        meaning: "The oldest template from which a pod begins; then another is made. 0: there are no \
                  templates, and every pod boots.",
    },
    Key {
        name: "first_uid",
        kind: Kind::Number {
            least: 65_536,
            // The last user id but one means nobody.
            most: u32::MAX - 2 - UIDS,
            unit: "user id",
        },
        meaning: "Each VMM and each file server runs under a user and a group of its own: this number \
                  plus that of its PID namespace, counted from the kernel's first. Nothing else on \
                  the node should use the 8388608 ids from here on. Nodes that are containers of \
                  one machine have this same number, or each ids of its own.",
    },
    Key {
        name: "boot_timeout_seconds",
        kind: Kind::Number {
            least: 1,
            most: 3600,
            unit: "seconds",
        },
        meaning: "The longest time from a machine's start to the agent's first answer. Above 60, what \
                  else the shim waits for may take as many times longer.",
    },
    Key {
        name: "kernel_parameters",
        kind: Kind::Text { longest: 1024 },
        meaning: "Added to the guest kernel's command line.",
    },
    Key {
        name: "debug_shell",
        kind: Kind::Switch,
        meaning: "Whether root of this node may run programs in the guests themselves, with `husk exec` \
                  and `husk console`. Only machines that begin while it is true have what that needs: \
                  `debug.cpio` beside the initramfs, whose shell is in each of them. No annotation of a \
                  pod changes it.",
    },
    Key {
        name: "vfio",
        kind: Kind::Switch,
        meaning: "Whether containers may have PCI devices of this node, those whose `/dev/vfio/` group their \
                  spec lists. Only machines that begin while it is true take them: their VMMs may make more \
                  system calls. All memory of a machine that has one is in use on the node. No annotation of \
                  a pod changes it.",
    },
    Key {
        name: "disk_kib_per_second",
        kind: Kind::Number {
            least: 1,
            most: u32::MAX,
            unit: "KiB a second",
        },
        meaning: "What the guest may read from and write to each disk of its machine, both together; without a value \
                  as much as it can. What it asks for beyond that waits. Disks are block devices and images; \
                  what the file server serves is not limited. A pod's annotation `io.husk.vm.` with this \
                  name behind it wins, as for all keys below, where the operator lets annotations through.",
    },
    Key {
        name: "disk_burst_kib",
        kind: Kind::Number {
            least: 1,
            most: u32::MAX,
            unit: "KiB",
        },
        meaning: "What may be read and written at once before that rate holds; without a value as much as in a \
                  second. Without the rate it has no effect, like the bursts below.",
    },
    Key {
        name: "disk_requests_per_second",
        kind: Kind::Number {
            least: 1,
            most: u32::MAX,
            unit: "requests a second",
        },
        meaning: "The requests that each disk takes, of whatever size.",
    },
    Key {
        name: "disk_burst_requests",
        kind: Kind::Number {
            least: 1,
            most: u32::MAX,
            unit: "requests",
        },
        meaning: "How many of them at once; without a value as many as in a second.",
    },
    Key {
        name: "network_kib_per_second",
        kind: Kind::Number {
            least: 1,
            most: u32::MAX,
            unit: "KiB a second",
        },
        meaning: "What each interface may receive, and what it may send. What comes beyond that waits on the node, \
                  where the queue of the interface's tap drops it when full; what the guest sends waits in \
                  the guest. Annotations of Kubernetes about bandwidth are the CNI plugin's and not looked at.",
    },
    Key {
        name: "network_burst_kib",
        kind: Kind::Number {
            least: 1,
            most: u32::MAX,
            unit: "KiB",
        },
        meaning: "How much of it at once; without a value as much as in a second.",
    },
    Key {
        name: "network_frames_per_second",
        kind: Kind::Number {
            least: 1,
            most: u32::MAX,
            unit: "frames a second",
        },
        meaning: "The frames that each interface may receive, and those that it may send. A large frame that the \
                  node takes apart counts once.",
    },
    Key {
        name: "network_burst_frames",
        kind: Kind::Number {
            least: 1,
            most: u32::MAX,
            unit: "frames",
        },
        meaning: "How many of them at once; without a value as many as in a second.",
    },
];

/// The key of that name.
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The key that was most likely meant.
pub fn nearest(name: &str) -> Option<&'static str> {
    // Below that, names have little in common but their length.
    const ALIKE: f64 = 0.7;
    let likeness = |key: &Key| strsim::jaro_winkler(key.name, name);
    let best = KEYS
        .iter()
        .max_by(|one, other| likeness(one).total_cmp(&likeness(other)))?;
    (likeness(best) > ALIKE).then_some(best.name)
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path => f.write_str("an absolute path"),
            Self::Switch => f.write_str("true or false"),
            Self::Number { least, most, .. } => write!(f, "a whole number from {least} to {most}"),
            Self::Text { longest } => write!(f, "printable ASCII, at most {longest} characters"),
        }
    }
}
