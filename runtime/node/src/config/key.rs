//! The keys of the configuration, each with its kind, range and meaning: the one
//! place from which values are checked and `docs/configuration.md` is made.

use std::fmt;

use super::USERS;

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
    /// Printable ASCII in one line.
    Text {
        /// The longest, bytes.
        longest: usize,
    },
}

/// The largest process id there can be (`PID_MAX_LIMIT` of linux/threads.h);
/// each may have users. The last user id but one means nobody.
const LARGEST_PID: u32 = 1 << 22;

/// All of them, in the order in which they are shown.
pub const KEYS: [Key; 8] = [
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
        meaning: "The guest's kernel, an uncompressed ELF file. A pod keeps the one it began with.",
    },
    Key {
        name: "initramfs",
        kind: Kind::Path,
        meaning: "The guest's initramfs, which holds the agent. It belongs to this version of the shim.",
    },
    Key {
        name: "state_dir",
        kind: Kind::Path,
        meaning: "Where the state of running pods is, one directory a pod. It must be gone after a \
                  reboot. Change it only while no pod runs.",
    },
    Key {
        name: "first_uid",
        kind: Kind::Number {
            least: 65_536,
            most: u32::MAX - 2 - LARGEST_PID * USERS,
            unit: "user id",
        },
        meaning: "Each VMM runs under a user and a group of its own: this number plus twice the process \
                  id of its shim; the pod's file server under the next. Nothing else on the node \
                  should use the 8388608 ids from here on.",
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
            Self::Number { least, most, .. } => write!(f, "a whole number from {least} to {most}"),
            Self::Text { longest } => write!(f, "printable ASCII, at most {longest} characters"),
        }
    }
}
