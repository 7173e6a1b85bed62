//! Copies of the node's mounts, on their way into a shared tree.
//!
//! A copy gets its attributes while it is mounted nowhere. The file server's
//! namespace receives what appears in the tree at that moment, flags included,
//! and never hears of flags that change later.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Stat, StatFs, StatVfsMountFlags, fstat, fstatfs, fstatvfs};
use rustix::mount::{MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags};

use crate::id_map::{IdMaps, UserNamespace};

/// What no mount in the tree permits. The guest's kernel judges devices, set-id
/// bits and programs by flags of its own; here they could only serve somebody
/// who has taken the file server over.
pub const FORBIDDEN: MountFlags = MountFlags::NODEV
    .union(MountFlags::NOSUID)
    .union(MountFlags::NOEXEC);

const FORBIDDEN_ATTRIBUTES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV
    .union(MountAttrFlags::MOUNT_ATTR_NOSUID)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// Which of a copy's mounts may not be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReadOnly {
    /// None.
    No,
    /// The topmost.
    Top,
    /// Those below it as well.
    All,
}

/// What a copy is made with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct CopyOptions {
    /// With what is mounted below the source.
    pub recursive: bool,
    /// What the node mounts below the source later appears in the copy, with
    /// the flags that it has on the node.
    pub follows: bool,
}

/// What tells a source from others, as long as a copy of it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    /// The same file may be mounted twice.
    read_only: bool,
}

/// A copy that is mounted nowhere yet.
#[derive(Debug)]
pub struct MountCopy {
    tree: OwnedFd,
    options: CopyOptions,
    id_maps: Option<IdMaps>,
}

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
#[derive(Debug, Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

impl MountCopy {
    /// Copies what is at `source`.
    ///
    /// # Errors
    /// It is not there, or the kernel refuses.
    pub fn new(source: &Path, options: CopyOptions) -> io::Result<Self> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        flags.set(OpenTreeFlags::AT_RECURSIVE, options.recursive);
        let tree = rustix::mount::open_tree(CWD, source, flags)?;
        let copy = Self {
            tree,
            options,
            id_maps: None,
        };
        let mut change = MountAttr {
            attr_set: FORBIDDEN_ATTRIBUTES.bits().into(),
            ..MountAttr::default()
        };
        if !options.follows {
            change.propagation = libc::MS_PRIVATE;
        }
        copy.change(&change, libc::AT_RECURSIVE)?;
        Ok(copy)
    }

    /// What it was made with.
    pub fn options(&self) -> CopyOptions {
        self.options
    }

    /// Makes mounts of it read-only.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn forbid_writing(&self, read_only: ReadOnly) -> io::Result<()> {
        let change = MountAttr {
            attr_set: MountAttrFlags::MOUNT_ATTR_RDONLY.bits().into(),
            ..MountAttr::default()
        };
        match read_only {
            ReadOnly::No => Ok(()),
            ReadOnly::Top => self.change(&change, 0),
            ReadOnly::All => self.change(&change, libc::AT_RECURSIVE),
        }
    }

    /// Sets attributes of the topmost mount. One of access times replaces what
    /// the source has.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set(&self, attributes: MountAttrFlags) -> io::Result<()> {
        let times = MountAttrFlags::MOUNT_ATTR__ATIME;
        let change = MountAttr {
            attr_set: attributes.bits().into(),
            attr_clr: match attributes.intersects(times) {
                true => times.bits().into(),
                false => 0,
            },
            ..MountAttr::default()
        };
        self.change(&change, 0)
    }

    /// Shows its files with the owners that the namespace's maps make of those
    /// that are stored; also what is mounted below, if `recursive`.
    ///
    /// # Errors
    /// Its file system cannot, or it is mapped already.
    pub fn map_ids(&mut self, namespace: &UserNamespace, recursive: bool) -> io::Result<()> {
        let change = MountAttr {
            attr_set: MountAttrFlags::MOUNT_ATTR_IDMAP.bits().into(),
            userns_fd: namespace.as_fd().as_raw_fd().unsigned_abs().into(),
            ..MountAttr::default()
        };
        let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
        self.change(&change, flags).map_err(|error| {
            let text = format!("its file system cannot show other owners: {error}");
            io::Error::new(error.kind(), text)
        })?;
        self.id_maps = Some(namespace.maps().clone());
        Ok(())
    }

    /// How its owners are mapped.
    pub fn id_maps(&self) -> Option<&IdMaps> {
        self.id_maps.as_ref()
    }

    /// What is at its top.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn file_type(&self) -> io::Result<FileType> {
        Ok(FileType::from_raw_mode(fstat(&self.tree)?.st_mode))
    }

    /// Number of the device whose node is at its top.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn device_number(&self) -> io::Result<u64> {
        Ok(fstat(&self.tree)?.st_rdev)
    }

    /// The file system and the directory or file at its top.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn stat(&self) -> io::Result<(StatFs, Stat)> {
        Ok((fstatfs(&self.tree)?, fstat(&self.tree)?))
    }

    /// Which file is at its top.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn identity(&self) -> io::Result<FileIdentity> {
        let stat = fstat(&self.tree)?;
        let flags = fstatvfs(&self.tree)?.f_flag;
        Ok(FileIdentity {
            device: stat.st_dev,
            inode: stat.st_ino,
            read_only: flags.contains(StatVfsMountFlags::RDONLY),
        })
    }

    /// Mounts it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn attach(self, target: &Path) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
            // For a descriptor's name in /proc.
            | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
        Ok(rustix::mount::move_mount(
            &self.tree, c"", CWD, target, flags,
        )?)
    }

    fn change(&self, change: &MountAttr, flags: i32) -> io::Result<()> {
        // SAFETY: the path is an empty C string, the struct is the kernel's and
        // its size is told.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH | flags,
                std::ptr::from_ref(change),
                size_of::<MountAttr>(),
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_mount::{HostMount, own_namespace};
    use std::fs;
    use std::sync::Barrier;

    const ALL: CopyOptions = CopyOptions {
        recursive: true,
        follows: false,
    };

    /// Flags of the mount at `path`, as the calling thread sees it.
    fn flags(path: &Path) -> Option<String> {
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let path = path.display().to_string();
        table
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .filter(|fields| fields[4] == path)
            .map(|fields| fields[5].to_owned())
            .next_back()
    }

    fn has(path: &Path, flag: &str) -> bool {
        flags(path).unwrap().split(',').any(|found| found == flag)
    }

    /// The file server's namespace is made first, and receives the mount.
    #[test]
    fn a_namespace_made_before_gets_the_flags_too() {
        if !own_namespace() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let [source, tree] = ["source", "tree"].map(|name| dir.path().join(name));
        for path in [&source, &source.join("below"), &tree] {
            fs::create_dir(path).unwrap();
        }
        let _source = HostMount::shared_tmpfs(&source).unwrap();
        fs::create_dir(source.join("below")).unwrap();
        let _below = HostMount::new("tmpfs", "t".as_ref(), &source.join("below"), &[]).unwrap();
        let _tree = HostMount::shared_tmpfs(&tree).unwrap();
        let targets = ["top", "all", "follows"].map(|name| tree.join(name));
        for target in &targets {
            fs::create_dir(target).unwrap();
        }
        let [top, all, follow] = &targets;

        let (ready, go) = (Barrier::new(2), Barrier::new(2));
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                assert!(own_namespace());
                ready.wait();
                go.wait();
                for target in &targets {
                    for flag in ["ro", "nodev", "nosuid", "noexec"] {
                        assert!(has(target, flag), "{flag} {target:?}");
                    }
                    let error = fs::write(target.join("file"), "").unwrap_err();
                    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
                    for flag in ["nodev", "nosuid", "noexec"] {
                        assert!(has(&target.join("below"), flag), "{flag} {target:?}");
                    }
                }
                assert!(has(&top.join("below"), "rw"));
                assert!(has(&all.join("below"), "ro"));
                // What the node mounted afterwards.
                assert_eq!(flags(&top.join("later")), None);
                assert!(flags(&follow.join("later")).is_some());
            });
            ready.wait();
            let follows = CopyOptions {
                follows: true,
                ..ALL
            };
            for (target, options, read_only) in [
                (top, ALL, ReadOnly::Top),
                (all, ALL, ReadOnly::All),
                (follow, follows, ReadOnly::Top),
            ] {
                let copy = MountCopy::new(&source, options).unwrap();
                copy.forbid_writing(read_only).unwrap();
                copy.attach(target).unwrap();
            }
            fs::create_dir(source.join("later")).unwrap();
            let _later = HostMount::new("tmpfs", "t".as_ref(), &source.join("later"), &[]).unwrap();
            go.wait();
            server.join().unwrap();
        });
    }

    #[test]
    fn leaves_the_source_as_it_is() {
        if !own_namespace() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "text").unwrap();
        let copy = MountCopy::new(&file, ALL).unwrap();
        copy.forbid_writing(ReadOnly::Top).unwrap();
        copy.set(MountAttrFlags::MOUNT_ATTR_NOATIME).unwrap();
        let target = dir.path().join("copy");
        fs::write(&target, "").unwrap();
        copy.attach(&target).unwrap();
        assert!(has(&target, "noatime") && has(&target, "ro"));
        assert_eq!(fs::read(&target).unwrap(), b"text");
        assert!(fs::write(&target, "").is_err());
        fs::write(&file, "more").unwrap();
        rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}
