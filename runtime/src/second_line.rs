//! What stands behind the jails of VMM and file server, and what of it this node
//! does not have. Pods run without; their logs say so.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use crate::process::Process;

/// `LANDLOCK_CREATE_RULESET_VERSION` of linux/landlock.h.
const VERSION: libc::c_uint = 1;

/// Says, once a pod, what the node's kernel lacks.
pub fn warn_of_kernel() {
    if let Some(lack) = lack_of(landlock()) {
        tracing::warn!("{lack}");
    }
}

/// Says that a VMM has no user namespace of its own, where it could not have one.
pub fn warn_of_users(vmm: Process) {
    if let Ok(false) = has_own_users(vmm) {
        tracing::warn!(
            "the node has no user namespace for the VMM, which runs without; \
             see user.max_user_namespaces"
        );
    }
}

/// The kernel's Landlock: none if it is not positive.
fn landlock() -> libc::c_long {
    let nothing = std::ptr::null::<libc::c_void>();
    // SAFETY: the call with these arguments only asks for the version.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0, VERSION) }
}

fn lack_of(landlock: libc::c_long) -> Option<&'static str> {
    match landlock {
        ..=0 => Some(
            "the node's kernel has no Landlock: VMM and file server run without this second line \
             of defence",
        ),
        1 => Some(
            "the node's Landlock lets no file be moved to another directory (Linux 5.19 does): \
             the file server runs without this second line of defence",
        ),
        2.. => None,
    }
}

fn has_own_users(vmm: Process) -> io::Result<bool> {
    let number = |who: &str| fs::metadata(format!("/proc/{who}/ns/user")).map(|file| file.ino());
    Ok(number(&vmm.pid.to_string())? != number("self")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lacks_is_told() {
        // The kernel knows no such call; it was switched off when it started.
        for version in [-1, 0] {
            let lack = lack_of(version).unwrap();
            assert!(lack.contains("VMM and file server run without"), "{lack}");
        }
        let lack = lack_of(1).unwrap();
        assert!(lack.contains("the file server runs without"), "{lack}");
        assert_eq!(lack_of(2), None);
        assert_eq!(lack_of(7), None);
    }

    #[test]
    fn this_process_has_its_own_users() {
        let this = Process::find(std::process::id()).unwrap();
        assert!(!has_own_users(this).unwrap());
    }
}
