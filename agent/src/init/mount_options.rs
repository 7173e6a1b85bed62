//! The options of an OCI mount, sorted by the system call they go to.

use libc::{MS_PRIVATE, MS_SHARED, MS_SLAVE, MS_UNBINDABLE};
use rustix::mount::MountAttrFlags as Attr;

/// Attributes to set and to clear with mount_setattr(2).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// `MOUNT_ATTR_*` to set.
    pub set: u32,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u32,
}

impl Attributes {
    /// Whether there is anything to do.
    pub fn is_empty(self) -> bool {
        self.set == 0 && self.clear == 0
    }

    fn apply(&mut self, set: bool, attribute: Attr) {
        let bits = attribute.bits();
        if is_atime(attribute) {
            // One field with several values: always replaced whole.
            self.clear |= Attr::MOUNT_ATTR__ATIME.bits();
            self.set &= !Attr::MOUNT_ATTR__ATIME.bits();
            self.set |= if set { bits } else { 0 };
        } else if set {
            self.set |= bits;
            self.clear &= !bits;
        } else {
            self.clear |= bits;
            self.set &= !bits;
        }
    }
}

fn is_atime(attribute: Attr) -> bool {
    [
        Attr::MOUNT_ATTR_RELATIME,
        Attr::MOUNT_ATTR_NOATIME,
        Attr::MOUNT_ATTR_STRICTATIME,
    ]
    .contains(&attribute)
}

/// A mount's options.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// A bind mount: of the directory alone, or of all that is mounted below.
    pub bind: Option<Recursion>,
    /// Of this mount.
    pub attributes: Attributes,
    /// Of this mount and all below it.
    pub recursive: Attributes,
    /// `MS_*` propagation types, in order.
    pub propagation: Vec<(u64, Recursion)>,
    /// A tmpfs starts with what was below it.
    pub copy_up: bool,
    /// Changes a mount that is there already.
    pub remount: bool,
    /// For the file system: `key=value` or a flag.
    pub data: Vec<String>,
}

/// One mount or the tree of mounts below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recursion {
    /// One mount.
    Alone,
    /// And all below it.
    Tree,
}

impl MountOptions {
    /// Sorts the options. What nobody else knows is for the file system.
    pub fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Self {
        let mut parsed = Self::default();
        for option in options {
            if let Some((set, attribute)) = attribute(option) {
                parsed.attributes.apply(set, attribute);
            } else if let Some((set, attribute)) = option.strip_prefix('r').and_then(attribute) {
                parsed.recursive.apply(set, attribute);
            } else if let Some(propagation) = propagation(option) {
                parsed.propagation.push((propagation, Recursion::Alone));
            } else if let Some(propagation) = option.strip_prefix('r').and_then(propagation) {
                parsed.propagation.push((propagation, Recursion::Tree));
            } else {
                match option {
                    "bind" => parsed.bind = Some(Recursion::Alone),
                    "rbind" => parsed.bind = Some(Recursion::Tree),
                    "tmpcopyup" => parsed.copy_up = true,
                    "remount" => parsed.remount = true,
                    // The kernel's default, systemd's word, or always so.
                    "" | "defaults" | "async" | "nomand" | "mand" | "loud" | "silent"
                    | "newinstance" => {}
                    // For user-space tools.
                    _ if option.starts_with("x-") => {}
                    _ => parsed.data.push(option.to_owned()),
                }
            }
        }
        parsed
    }
}

fn attribute(option: &str) -> Option<(bool, Attr)> {
    Some(match option {
        "ro" => (true, Attr::MOUNT_ATTR_RDONLY),
        "rw" => (false, Attr::MOUNT_ATTR_RDONLY),
        "nosuid" => (true, Attr::MOUNT_ATTR_NOSUID),
        "suid" => (false, Attr::MOUNT_ATTR_NOSUID),
        "nodev" => (true, Attr::MOUNT_ATTR_NODEV),
        "dev" => (false, Attr::MOUNT_ATTR_NODEV),
        "noexec" => (true, Attr::MOUNT_ATTR_NOEXEC),
        "exec" => (false, Attr::MOUNT_ATTR_NOEXEC),
        "nosymfollow" => (true, Attr::MOUNT_ATTR_NOSYMFOLLOW),
        "symfollow" => (false, Attr::MOUNT_ATTR_NOSYMFOLLOW),
        "nodiratime" => (true, Attr::MOUNT_ATTR_NODIRATIME),
        "diratime" => (false, Attr::MOUNT_ATTR_NODIRATIME),
        "relatime" => (true, Attr::MOUNT_ATTR_RELATIME),
        "norelatime" => (false, Attr::MOUNT_ATTR_RELATIME),
        "noatime" => (true, Attr::MOUNT_ATTR_NOATIME),
        "atime" => (false, Attr::MOUNT_ATTR_NOATIME),
        "strictatime" => (true, Attr::MOUNT_ATTR_STRICTATIME),
        "nostrictatime" => (false, Attr::MOUNT_ATTR_STRICTATIME),
        _ => return None,
    })
}

fn propagation(option: &str) -> Option<u64> {
    Some(match option {
        "private" => MS_PRIVATE,
        "shared" => MS_SHARED,
        "slave" => MS_SLAVE,
        "unbindable" => MS_UNBINDABLE,
        _ => return None,
    })
}

/// The propagation type that `rootfsPropagation` names.
pub fn root_propagation(name: &str) -> Option<(u64, Recursion)> {
    match (propagation(name), name.strip_prefix('r')) {
        (Some(flag), _) => Some((flag, Recursion::Alone)),
        (None, Some(rest)) => Some((propagation(rest)?, Recursion::Tree)),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_reach_the_call_that_knows_them() {
        let options = [
            "rbind",
            "rprivate",
            "ro",
            "nosuid",
            "size=64k",
            "x-mount.mkdir",
        ];
        let parsed = MountOptions::parse(options);
        assert_eq!(parsed.bind, Some(Recursion::Tree));
        assert_eq!(parsed.propagation, [(MS_PRIVATE, Recursion::Tree)]);
        let expected = Attr::MOUNT_ATTR_RDONLY | Attr::MOUNT_ATTR_NOSUID;
        assert_eq!(parsed.attributes.set, expected.bits());
        assert_eq!(parsed.data, ["size=64k"]);
        assert!(parsed.recursive.is_empty());
    }

    #[test]
    fn recursive_attributes_are_kept_apart() {
        let parsed = MountOptions::parse(["rro", "rnosuid"]);
        assert!(parsed.attributes.is_empty());
        let expected = Attr::MOUNT_ATTR_RDONLY | Attr::MOUNT_ATTR_NOSUID;
        assert_eq!(parsed.recursive.set, expected.bits());
        // "relatime" is no recursive "elatime".
        let parsed = MountOptions::parse(["relatime"]);
        assert_eq!(parsed.attributes.clear, Attr::MOUNT_ATTR__ATIME.bits());
        assert!(parsed.data.is_empty());
    }

    #[test]
    fn the_last_word_counts() {
        let parsed = MountOptions::parse(["ro", "rw", "noatime", "relatime"]);
        assert_eq!(parsed.attributes.set, Attr::MOUNT_ATTR_RELATIME.bits());
        assert_ne!(parsed.attributes.clear & Attr::MOUNT_ATTR_RDONLY.bits(), 0);
    }
}
