//! The system calls of a serving process; any other kills it.

use std::collections::BTreeMap;

use libc::{
    F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, PROT_EXEC, SYS_brk, SYS_capset, SYS_clock_gettime,
    SYS_close, SYS_copy_file_range, SYS_exit, SYS_exit_group, SYS_fallocate, SYS_fchmodat,
    SYS_fchownat, SYS_fcntl, SYS_fdatasync, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futex,
    SYS_getdents64, SYS_getpid, SYS_getrandom, SYS_gettid, SYS_getxattr, SYS_linkat, SYS_listxattr,
    SYS_lseek, SYS_madvise, SYS_mkdirat, SYS_mknodat, SYS_mmap, SYS_mprotect, SYS_mremap,
    SYS_munmap, SYS_openat, SYS_openat2, SYS_poll, SYS_ppoll, SYS_preadv, SYS_pwritev2, SYS_read,
    SYS_readlinkat, SYS_recvmsg, SYS_removexattr, SYS_renameat2, SYS_restart_syscall,
    SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sendmsg, SYS_setfsgid,
    SYS_setfsuid, SYS_setxattr, SYS_sigaltstack, SYS_statx, SYS_symlinkat, SYS_syncfs, SYS_tgkill,
    SYS_umask, SYS_unlinkat, SYS_utimensat, SYS_write, SYS_writev,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// The filter that could not be made or installed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum SeccompError {
    #[error("cannot build the system call filter")]
    Build(#[from] BackendError),
    #[error("cannot install the system call filter")]
    Install(#[from] seccompiler::Error),
}

/// Calls allowed whatever their arguments.
const ALLOWED: [i64; 56] = [
    // Files by name in a directory.
    SYS_openat,
    SYS_openat2,
    SYS_statx,
    SYS_readlinkat,
    SYS_mkdirat,
    SYS_mknodat,
    SYS_symlinkat,
    SYS_linkat,
    SYS_unlinkat,
    SYS_renameat2,
    SYS_fchmodat,
    SYS_fchownat,
    SYS_utimensat,
    // Extended attributes, by a name in /proc/self/fd.
    SYS_setxattr,
    SYS_getxattr,
    SYS_listxattr,
    SYS_removexattr,
    // Open files.
    SYS_preadv,
    SYS_pwritev2,
    SYS_ftruncate,
    SYS_fallocate,
    SYS_lseek,
    SYS_copy_file_range,
    SYS_fsync,
    SYS_fdatasync,
    SYS_syncfs,
    SYS_fstatfs,
    SYS_getdents64,
    SYS_close,
    // The caller's identity.
    SYS_setfsuid,
    SYS_setfsgid,
    SYS_capset,
    SYS_umask,
    // The front end, kicks and calls, and the log.
    SYS_poll,
    SYS_ppoll,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_read,
    SYS_write,
    SYS_writev,
    // Memory.
    SYS_brk,
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    // The language's runtime, and an end with a message.
    SYS_clock_gettime,
    SYS_getrandom,
    SYS_futex,
    SYS_restart_syscall,
    SYS_sigaltstack,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_getpid,
    SYS_gettid,
    SYS_exit,
    SYS_exit_group,
];

/// Installs the filter for the calling thread and those it starts.
pub fn install() -> Result<(), SeccompError> {
    seccompiler::apply_filter(&program(std::process::id())?)?;
    Ok(())
}

/// The filter of the process `own`, as its namespace numbers it.
fn program(own: u32) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    for call in [SYS_mmap, SYS_mprotect] {
        // No new code.
        let exec = SeccompCmpOp::MaskedEq(PROT_EXEC as u64);
        rules.insert(call, vec![argument(2, exec, 0)?]);
    }
    let commands = [F_DUPFD_CLOEXEC, F_GETFD, F_GETFL]
        .map(|command| argument(1, SeccompCmpOp::Eq, command as u64));
    rules.insert(
        SYS_fcntl,
        commands.into_iter().collect::<Result<Vec<_>, _>>()?,
    );
    // abort() ends itself. Any other process of root could be ended as well,
    // for which a user id takes no capability.
    let itself = argument(0, SeccompCmpOp::Eq, own.into())?;
    rules.insert(SYS_tgkill, vec![itself]);
    SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

fn argument(index: u8, operation: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operation, value)?;
    SeccompRule::new(vec![condition])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::os::unix::process::{CommandExt, ExitStatusExt};

    #[test]
    fn each_call_is_listed_once() {
        assert_eq!(ALLOWED.iter().collect::<BTreeSet<_>>().len(), ALLOWED.len());
        assert!(!program(1).unwrap().is_empty());
    }

    #[test]
    fn it_signals_itself_alone() {
        // How a process ends that sends no signal (0) to this one.
        let signal_this = |allowed: u32| {
            let filter = program(allowed).unwrap();
            let this = std::process::id();
            let mut command = std::process::Command::new("/bin/true");
            // SAFETY: only system calls are made between fork and exit.
            unsafe {
                command.pre_exec(move || {
                    seccompiler::apply_filter(&filter).map_err(std::io::Error::other)?;
                    libc::syscall(SYS_tgkill, this, this, 0);
                    libc::_exit(0)
                });
            }
            command.status().unwrap()
        };
        let this = std::process::id();
        assert!(signal_this(this).success());
        assert_eq!(signal_this(this + 1).signal(), Some(libc::SIGSYS));
    }
}
