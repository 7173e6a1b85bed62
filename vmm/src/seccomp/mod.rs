//! What each thread may ask of the host's kernel. Anything else ends the whole
//! process.

mod devices;
mod main_thread;
mod program;
mod vcpu;
pub(crate) mod vfio;

use std::io;

use seccompiler::BpfProgram;

use crate::{descriptors, jail};

/// Whether threads are confined. Tests of the library in a process of their own
/// share its threads with the test harness, so they are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// Each thread gets its filter.
    Filters,
    /// Each gets one with which the machine may have PCI devices of the node.
    FiltersWithVfio,
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
    /// The same, for a machine that may have PCI devices of the node.
    #[must_use]
    pub fn with_vfio(self) -> Self {
        match self {
            Self::Filters | Self::FiltersWithVfio => Self::FiltersWithVfio,
            Self::None => Self::None,
        }
    }

    /// Refuses to go on with a descriptor that a jailed process may not hold.
    ///
    /// # Errors
    /// There is one.
    pub fn check_descriptors(self) -> io::Result<()> {
        match self {
            // The tests' process has others.
            Self::None => Ok(()),
            Self::Filters | Self::FiltersWithVfio => descriptors::check(jail::DESCRIPTORS),
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
            Self::Filters | Self::FiltersWithVfio => {
                jail::limit_threads(vcpus).map_err(io::Error::other)
            }
        }
    }

    /// Confines the calling thread to `role` for the rest of its life.
    ///
    /// # Errors
    /// The kernel has no seccomp filters.
    pub fn enter(self, role: Role) -> io::Result<()> {
        match self {
            Self::None => Ok(()),
            Self::Filters | Self::FiltersWithVfio => {
                let program = program(role, self == Self::FiltersWithVfio)?;
                seccompiler::apply_filter(&program).map_err(io::Error::other)
            }
        }
    }
}

fn program(role: Role, with_vfio: bool) -> io::Result<BpfProgram> {
    let list = match role {
        Role::Main => main_thread::ALLOWED,
        Role::Vcpu => vcpu::ALLOWED,
        Role::Devices => devices::ALLOWED,
    };
    let vfio = match role {
        _ if !with_vfio => &[],
        Role::Main => vfio::MAIN,
        Role::Vcpu => vfio::VCPU,
        Role::Devices => vfio::DEVICES,
    };
    program::compile(&[list, vfio, COMMON])
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
    fn end(confinement: Confinement, role: Role, call: fn()) -> i32 {
        // SAFETY: the child only makes system calls and allocates, which glibc
        // allows after its fork, and leaves without running destructors.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            let confined = confinement.enter(role);
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

    fn control_a_device() {
        // SAFETY: no such descriptor is open.
        unsafe { libc::ioctl(-1, vfio::DEVICE_SET_IRQS as libc::Ioctl, 0) };
    }

    fn reach_memory() {
        // SAFETY: no such descriptor is open.
        unsafe { libc::ioctl(-1, vfio::IOMMU_MAP_DMA as libc::Ioctl, 0) };
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
        let roles = [Role::Main, Role::Vcpu, Role::Devices];
        let confinements = [Confinement::Filters, Confinement::FiltersWithVfio];
        let pairs = roles
            .into_iter()
            .flat_map(|role| confinements.map(|one| (one, role)));
        for (confinement, role) in pairs {
            assert_eq!(end(confinement, role, nothing), 0, "{role:?}");
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
                let status = end(confinement, role, call);
                assert!(libc::WIFSIGNALED(status), "{role:?}");
                assert_eq!(libc::WTERMSIG(status), libc::SIGSYS, "{role:?}");
            }
        }
    }

    #[test]
    fn a_machine_without_devices_of_the_node_has_none_of_their_calls() {
        for (role, call) in [
            (Role::Main, control_a_device as fn()),
            (Role::Main, reach_memory),
            (Role::Vcpu, control_a_device),
            (Role::Devices, reach_memory),
        ] {
            let status = end(Confinement::Filters, role, call);
            assert!(libc::WIFSIGNALED(status), "{role:?}");
            assert_eq!(end(Confinement::FiltersWithVfio, role, call), 0, "{role:?}");
        }
        // Not each thread has all of them.
        for (role, call) in [
            (Role::Vcpu, reach_memory as fn()),
            (Role::Devices, control_a_device),
        ] {
            let status = end(Confinement::FiltersWithVfio, role, call);
            assert!(libc::WIFSIGNALED(status), "{role:?}");
        }
    }
}
