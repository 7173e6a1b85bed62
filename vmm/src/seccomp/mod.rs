//! What each thread may ask of the host's kernel. Anything else ends the whole
//! process.

mod devices;
mod main_thread;
mod program;
mod vcpu;

use std::io;

use seccompiler::BpfProgram;

use crate::{descriptors, jail};

/// Whether threads are confined. Tests of the library in a process of their own
/// share its threads with the test harness, so they are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// Each thread gets its filter.
    Filters,
    /// Threads stay as they are.
    None,
}

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Control socket.
    Main,
    /// Runs a processor.
    Vcpu,
    /// Runs the working halves of devices.
    Devices,
}

/// A system call that a role may make.
struct Allowed {
    call: i64,
    /// Only with one of these as an argument: its position and values.
    only: Option<(u8, &'static [u64])>,
}

/// Any arguments.
const fn any(call: i64) -> Allowed {
    Allowed { call, only: None }
}

/// Only with one of `values` as argument `position`.
const fn only(call: i64, position: u8, values: &'static [u64]) -> Allowed {
    Allowed {
        call,
        only: Some((position, values)),
    }
}

/// Protection bits of pages that are not executable.
const DATA_PAGES: &[u64] = &[
    libc::PROT_NONE as u64,
    libc::PROT_READ as u64,
    (libc::PROT_READ | libc::PROT_WRITE) as u64,
];

impl Confinement {
    /// Refuses to go on with a descriptor that a jailed process may not hold.
    ///
    /// # Errors
    /// There is one.
    pub fn check_descriptors(self) -> io::Result<()> {
        match self {
            // The tests' process has others.
            Self::None => Ok(()),
            Self::Filters => descriptors::check(jail::DESCRIPTORS),
        }
    }

    /// Lets the process have no more threads than `vcpus` processors need.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn limit_threads(self, vcpus: u8) -> io::Result<()> {
        match self {
            // The tests' process has others.
            Self::None => Ok(()),
            Self::Filters => jail::limit_threads(vcpus).map_err(io::Error::other),
        }
    }

    /// Confines the calling thread to `role` for the rest of its life.
    ///
    /// # Errors
    /// The kernel has no seccomp filters.
    pub fn enter(self, role: Role) -> io::Result<()> {
        match self {
            Self::None => Ok(()),
            Self::Filters => {
                let program = program(role)?;
                seccompiler::apply_filter(&program).map_err(io::Error::other)
            }
        }
    }
}

fn program(role: Role) -> io::Result<BpfProgram> {
    let list = match role {
        Role::Main => main_thread::ALLOWED,
        Role::Vcpu => vcpu::ALLOWED,
        Role::Devices => devices::ALLOWED,
    };
    program::compile(&[list, COMMON])
}

/// What the language's run time and the allocator do on any thread.
const COMMON: &[Allowed] = &[
    // Locks and channels, which give way before they wait.
    any(libc::SYS_futex),
    any(libc::SYS_sched_yield),
    // Keys of hash tables.
    any(libc::SYS_getrandom),
    // The allocator; never executable memory.
    only(libc::SYS_mmap, 2, DATA_PAGES),
    only(libc::SYS_mprotect, 2, DATA_PAGES),
    any(libc::SYS_munmap),
    any(libc::SYS_mremap),
    any(libc::SYS_madvise),
    any(libc::SYS_brk),
    // Descriptors that are dropped; debug builds look at them first.
    any(libc::SYS_close),
    only(libc::SYS_fcntl, 1, &[libc::F_GETFD as u64]),
    // Event descriptors, pipes.
    any(libc::SYS_read),
    any(libc::SYS_write),
    // Back from the handler of the kicking signal.
    any(libc::SYS_rt_sigreturn),
    // A thread's end takes its signal stack and mask away.
    any(libc::SYS_sigaltstack),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_exit),
    // The end of the process.
    any(libc::SYS_exit_group),
    // Where the kernel has no vDSO clock.
    any(libc::SYS_clock_gettime),
    // Interrupted sleeps go on.
    any(libc::SYS_restart_syscall),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// How a process ends that confines itself to `role` and makes a call.
    fn end(role: Role, call: fn()) -> i32 {
        // SAFETY: the child only makes system calls and allocates, which glibc
        // allows after its fork, and leaves without running destructors.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            let confined = Confinement::Filters.enter(role);
            call();
            // SAFETY: ends the process.
            unsafe { libc::_exit(i32::from(confined.is_err())) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        status
    }

    fn nothing() {
        let _ = rustix::io::write(rustix::stdio::stdout(), b"");
    }

    fn open() {
        let _ = rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty());
    }

    fn socket() {
        // SAFETY: makes a descriptor that nobody uses.
        unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) };
    }

    fn executable_memory() {
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: maps fresh memory that nobody uses.
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
    }

    fn create_vm() {
        const KVM_CREATE_VM: libc::Ioctl = 0xae01;
        // SAFETY: no such descriptor is open.
        unsafe { libc::ioctl(-1, KVM_CREATE_VM, 0) };
    }

    fn set_up_a_ring() {
        // SAFETY: no ring comes of it, as it has neither size nor parameters.
        unsafe { libc::syscall(libc::SYS_io_uring_setup, 0, 0) };
    }

    fn change_a_ring() {
        // SAFETY: no such descriptor is open.
        unsafe { libc::syscall(libc::SYS_io_uring_register, -1, 0, 0, 0) };
    }

    fn connect() {
        // SAFETY: no such descriptor is open.
        unsafe { libc::connect(-1, std::ptr::null(), 0) };
    }

    fn start_a_process() {
        // SAFETY: flags that contradict each other make none.
        unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_THREAD, 0, 0, 0, 0) };
    }

    fn execute() {
        // SAFETY: there is no such program.
        unsafe { libc::execve(c"".as_ptr(), std::ptr::null(), std::ptr::null()) };
    }

    fn trace() {
        // SAFETY: no process has this number.
        unsafe { libc::ptrace(libc::PTRACE_ATTACH, -1, 0, 0) };
    }

    fn read_another_process() {
        // SAFETY: reads nothing of nobody.
        unsafe { libc::process_vm_readv(-1, std::ptr::null(), 0, std::ptr::null(), 0, 0) };
    }

    fn signal_another_process() {
        // SAFETY: signal 0 only asks whether the process is there.
        unsafe { libc::kill(1, 0) };
    }

    #[test]
    fn what_no_list_names_ends_the_process() {
        for role in [Role::Main, Role::Vcpu, Role::Devices] {
            assert_eq!(end(role, nothing), 0, "{role:?}");
            for call in [
                open,
                socket,
                executable_memory,
                create_vm,
                set_up_a_ring,
                change_a_ring,
                connect,
                start_a_process,
                execute,
                trace,
                read_another_process,
                signal_another_process,
            ] {
                let status = end(role, call);
                assert!(libc::WIFSIGNALED(status), "{role:?}");
                assert_eq!(libc::WTERMSIG(status), libc::SIGSYS, "{role:?}");
            }
        }
    }
}
