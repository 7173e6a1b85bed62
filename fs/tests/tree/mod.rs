//! A shared tree with something in it, and how a guest walks through it.

#![allow(dead_code, clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use husk_fs::abi::{self, EntryOut, Opcode, OpenIn, OpenOut};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;
use vm_memory::ByteValued;

use crate::driver::{Guest, object};

/// A shared tree as the shim makes it, in a mount namespace of this test.
pub struct Tree {
    dir: tempfile::TempDir,
}

impl Tree {
    /// `web/rootfs` is a mount with a few files, `web/mounts` waits for some.
    pub fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: not root");
            return None;
        }
        // SAFETY: no other thread shares this one's working directory.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let tree = Self { dir };
        tmpfs(&tree.path(""));
        rustix::mount::mount_change(tree.path(""), MountPropagationFlags::SHARED).unwrap();
        fs::create_dir_all(tree.path("web/rootfs")).unwrap();
        fs::create_dir_all(tree.path("web/mounts/0")).unwrap();
        tmpfs(&tree.path("web/rootfs"));
        fs::write(tree.path("web/rootfs/hello"), "hello, guest").unwrap();
        symlink("/etc/passwd", tree.path("web/rootfs/link")).unwrap();
        Some(tree)
    }

    /// A path in it.
    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // With all that is mounted in it, so that the directory can go.
        let _ = rustix::mount::unmount(self.dir.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

/// Mounts an empty file system.
pub fn tmpfs(at: &Path) {
    rustix::mount::mount("tmpfs", at, "tmpfs", MountFlags::empty(), c"mode=755").unwrap();
}

/// Looks a name up in a directory.
pub fn lookup(guest: &mut Guest, parent: u64, name: &[u8]) -> Result<EntryOut, i32> {
    let answer = guest.ask(Opcode::Lookup, parent, &[name, b"\0"])?;
    Ok(object(&answer))
}

/// The node at a path below the top.
pub fn walk(guest: &mut Guest, path: &str) -> EntryOut {
    let mut entry = EntryOut {
        nodeid: abi::ROOT_ID,
        ..EntryOut::default()
    };
    for name in path.split('/') {
        entry = lookup(guest, entry.nodeid, name.as_bytes()).unwrap();
    }
    entry
}

/// Opens a node.
pub fn open(guest: &mut Guest, node: u64, flags: i32) -> Result<OpenOut, i32> {
    let open = OpenIn {
        flags: flags as u32,
        open_flags: 0,
    };
    Ok(object(&guest.ask(
        Opcode::Open,
        node,
        &[open.as_slice()],
    )?))
}
