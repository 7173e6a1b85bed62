//! How long the guest may remember what it saw, by place in the tree.
//!
//! The rule: everything below `<directory>/rootfs`, two levels below the top,
//! belongs to the guest alone; nobody else changes it while the pod lives, and
//! the guest caches it without limit. The same holds for the directories in
//! `<directory>/layers`, in which the guest's overlay writes; but beside them lie
//! a snapshotter's own files, so in that directory itself the guest sees names
//! alone, and can open and change nothing else. Everything else may change under the guest's
//! feet (volumes) and is looked at again after a second.

use std::time::Duration;

use crate::name::Name;

/// The name that makes a tree the guest's own.
const OWN_TREE: &[u8] = b"rootfs";

/// The name that makes a directory one of layers.
const LAYERS: &[u8] = b"layers";

/// A part of the tree with its own rule for caching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// The top directory.
    Top,
    /// A directory in the top directory.
    Group,
    /// Changed by the guest alone.
    Own,
    /// A directory of directories that are the guest's own; it is itself not.
    Layers,
    /// Changed by others too.
    Shared,
}

impl Area {
    /// The area of an entry of a directory in this area.
    pub fn of_child(self, name: Name<'_>) -> Self {
        match self {
            Self::Top => Self::Group,
            Self::Group if name.as_c_str().to_bytes() == OWN_TREE => Self::Own,
            Self::Group if name.as_c_str().to_bytes() == LAYERS => Self::Layers,
            Self::Group | Self::Shared => Self::Shared,
            Self::Own | Self::Layers => Self::Own,
        }
    }

    /// How long names and attributes stay good.
    pub fn lifetime(self) -> Duration {
        match self {
            Self::Own | Self::Layers => Duration::from_hours(24),
            Self::Top | Self::Group | Self::Shared => Duration::from_secs(1),
        }
    }

    /// Whether the absence of a name may be remembered, and file content and
    /// directory listings kept from one open to the next.
    pub fn is_own(self) -> bool {
        self == Self::Own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(path: &[&std::ffi::CStr]) -> Area {
        path.iter().fold(Area::Top, |area, name| {
            area.of_child(Name::new(name).unwrap())
        })
    }

    #[test]
    fn layers_are_own_and_their_directory_is_not() {
        assert_eq!(area(&[c"layers"]), Area::Group);
        assert_eq!(area(&[c"web", c"layers"]), Area::Layers);
        assert_eq!(area(&[c"web", c"layers", c"fs"]), Area::Own);
        assert_eq!(area(&[c"web", c"mounts", c"layers"]), Area::Shared);
        assert!(!Area::Layers.is_own());
    }

    #[test]
    fn only_a_rootfs_two_levels_down_is_own() {
        assert_eq!(area(&[c"rootfs"]), Area::Group);
        assert_eq!(area(&[c"web", c"rootfs"]), Area::Own);
        assert_eq!(area(&[c"web", c"rootfs", c"etc", c"passwd"]), Area::Own);
        assert_eq!(area(&[c"web", c"mounts", c"rootfs"]), Area::Shared);
        assert_eq!(area(&[c"web", c"mounts", c"0", c"a"]), Area::Shared);
    }
}
