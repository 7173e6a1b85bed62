//! On whose behalf the thread acts on the host.
//!
//! Files are created under the caller's user and group id (`setfsuid`) and
//! umask instead of being chowned afterwards: the kernel then applies quota,
//! set-group-id directories and default ACLs itself, and there is no moment at
//! which a file belongs to root. Capabilities stay as they are when the ids
//! change (`SECBIT_NO_SETUID_FIXUP`), since the guest has checked permissions.
//! `CAP_FSETID` alone comes and goes: without it the kernel takes set-id bits
//! off a file that is written, truncated or given away.
//!
//! Every switch is a system call, so the state is kept and changed only where
//! the next request differs. All of it belongs to the thread.

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

/// A user or group id that stands for none (`FUSE_INVALID_UIDGID`).
const NO_ID: u32 = u32::MAX;

/// The capabilities of a file server; the rest is dropped before it serves.
pub const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// What the thread's credentials are at the moment.
#[derive(Debug)]
pub struct Credentials {
    uid: u32,
    gid: u32,
    keep_set_id: bool,
    umask: u32,
}

impl Credentials {
    /// Prepares the calling thread, which must have [`CAPABILITIES`] and
    /// `CAP_SETPCAP`, share its umask with no other thread, and make every later
    /// call on the value.
    pub fn prepare() -> Result<Self, Errno> {
        let bits = rustix::thread::capabilities_secure_bits()?;
        rustix::thread::set_capabilities_secure_bits(
            bits | CapabilitiesSecureBits::NO_SETUID_FIXUP,
        )?;
        rustix::thread::set_thread_groups(&[])?;
        rustix::process::umask(Mode::empty());
        let mut credentials = Self {
            // Acts for nobody yet: the process's own user is none of the guest's.
            uid: NO_ID,
            gid: NO_ID,
            keep_set_id: false,
            umask: 0,
        };
        credentials.keep_set_id(true)?;
        Ok(credentials)
    }

    /// Acts as this user and group.
    pub fn assume(&mut self, uid: u32, gid: u32) {
        if gid != self.gid && gid != NO_ID {
            set_fs_id(libc::SYS_setfsgid, gid);
            self.gid = gid;
        }
        if uid != self.uid && uid != NO_ID {
            set_fs_id(libc::SYS_setfsuid, uid);
            self.uid = uid;
        }
    }

    /// Whether set-id bits of a changed file stay on.
    pub fn keep_set_id(&mut self, keep: bool) -> Result<(), Errno> {
        if keep == self.keep_set_id {
            return Ok(());
        }
        let effective = if keep {
            CAPABILITIES
        } else {
            CAPABILITIES.difference(CapabilitySet::FSETID)
        };
        let sets = CapabilitySets {
            effective,
            permitted: CAPABILITIES,
            inheritable: CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, sets)?;
        self.keep_set_id = keep;
        Ok(())
    }

    /// Creates files with this umask.
    pub fn umask(&mut self, umask: u32) {
        let umask = umask & 0o777;
        if umask != self.umask {
            rustix::process::umask(Mode::from_raw_mode(umask));
            self.umask = umask;
        }
    }
}

/// `setfsuid` or `setfsgid` of the calling thread. Neither reports failure;
/// with CAP_SETUID and CAP_SETGID there is none for a valid id.
fn set_fs_id(call: libc::c_long, id: u32) {
    // SAFETY: the calls take one integer and touch no memory.
    unsafe { libc::syscall(call, id) };
}
