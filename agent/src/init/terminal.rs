//! A terminal of the container's own devpts.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, fstatfs, openat};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};

use super::mount_options::Recursion;
use super::{InitError, in_root, mounts};
use crate::error::Doing;

/// `DEVPTS_SUPER_MAGIC` of linux/magic.h.
const DEVPTS: i64 = 0x1cd1;

/// Both ends of a terminal.
#[derive(Debug)]
pub struct Terminal {
    /// The agent's.
    pub master: OwnedFd,
    /// The process's.
    pub slave: OwnedFd,
}

impl Terminal {
    /// In a root that is being built.
    pub fn open(root: &OwnedFd) -> Result<Self, InitError> {
        let ptmx = in_root::open(
            root,
            Path::new("/dev/pts/ptmx"),
            OFlags::RDWR | OFlags::NOCTTY,
        );
        Self::from_ptmx(ptmx.doing("open", "/dev/pts/ptmx")?)
    }

    /// In the container this process has joined.
    pub fn open_in_own_root() -> Result<Self, InitError> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let ptmx = openat(CWD, "/dev/pts/ptmx", flags, Mode::empty());
        Self::from_ptmx(ptmx.doing("open", "/dev/pts/ptmx")?)
    }

    fn from_ptmx(master: OwnedFd) -> Result<Self, InitError> {
        let filesystem = fstatfs(&master).doing("stat", "/dev/pts/ptmx")?;
        if filesystem.f_type != DEVPTS {
            return Err(InitError::Invalid {
                field: "terminal",
                reason: "/dev/pts is no devpts".to_owned(),
            });
        }
        unlockpt(&master).doing("unlock", "the terminal")?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, flags).doing("open", "the terminal")?;
        Ok(Self { master, slave })
    }

    /// Shows the terminal as `/dev/console` of a root that is being built.
    pub fn bind_console(&self, root: &OwnedFd) -> Result<(), InitError> {
        let at = in_root::ensure_file(root, Path::new("/dev/console"))?;
        mounts::clone_at(&self.slave, Recursion::Alone)
            .and_then(|tree| mounts::attach(&tree, &at))
            .doing("mount", "/dev/console")?;
        Ok(())
    }
}
