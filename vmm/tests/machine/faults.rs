//! Each system call of the jailed program fails once, at every step of a start: the
//! shim learns in one sentence what was refused, and no machine runs in a jail that
//! is not shut.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use husk_vmm_spec::{
    BlockSpec, CONTROL_FD, ExitReason, HostPort, Message, RateSpec, Reply, Request, VsockSpec,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::retry_on_intr;

use crate::harness::{Request0, socket_pair};
use crate::jail::{Jailed, skip_unless_root};
use crate::payload;
use crate::saved::Saved;

/// What the language's run time does without asking whether it worked, and what
/// cannot fail in a program that is right.
const SPARED: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_wait,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_madvise,
    libc::SYS_mprotect,
    libc::SYS_munmap,
    libc::SYS_poll,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    // Whoever is not told anything waits no longer than it wants to.
    libc::SYS_sendmsg,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
];

/// The program's first call of its own: it takes the control socket.
const FIRST: (i64, u64, u64) = (libc::SYS_fcntl, CONTROL_FD as u64, libc::F_SETFD as u64);

/// How often a call fails that is made for each of many: rings, capabilities.
const OFTEN: usize = 12;

/// A system call, and which of those that are many in one, or for what.
type Call = (i64, u64);

fn call_of(data: &libc::seccomp_data) -> Call {
    let (call, args) = (i64::from(data.nr), data.args);
    let which = match call {
        libc::SYS_ioctl | libc::SYS_fcntl => args[1],
        libc::SYS_prctl => args[0],
        libc::SYS_mmap => args[3],
        _ => 0,
    };
    (call, which)
}

/// What the host would say, were there no more.
fn errno_of(call: Call) -> i32 {
    match call.0 {
        libc::SYS_clone | libc::SYS_clone3 => libc::EAGAIN,
        // What the C library makes of it.
        libc::SYS_mmap if call.1 & libc::MAP_STACK as u64 != 0 => libc::EAGAIN,
        libc::SYS_eventfd2
        | libc::SYS_epoll_create1
        | libc::SYS_memfd_create
        | libc::SYS_openat => libc::EMFILE,
        _ => libc::ENOMEM,
    }
}

/// The calling thread, and whoever it starts, ask before each call but the spared.
fn listen() -> OwnedFd {
    let op = |code: u32, jt: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf: 0,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let end = libc::BPF_RET | libc::BPF_K;
    let mut program = vec![op(load, 0, mem::offset_of!(libc::seccomp_data, nr) as u32)];
    for (index, call) in SPARED.iter().enumerate() {
        program.push(op(equal, (SPARED.len() - index) as u8, *call as u32));
    }
    program.push(op(end, 0, libc::SECCOMP_RET_USER_NOTIF));
    program.push(op(end, 0, libc::SECCOMP_RET_ALLOW));
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program lives through the call; root needs no `no_new_privs`.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    assert!(listener >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the call has just made it.
    unsafe { OwnedFd::from_raw_fd(listener as i32) }
}

/// What fails.
#[derive(Clone, Copy)]
enum Fault {
    Nothing,
    /// The one call of this number, counted from the program's first.
    Once(usize),
    /// Every one of these, also when the machine has begun.
    Always(Call, i32),
}

/// Answers what a VMM asks, until it and whoever started it are gone.
struct Oracle {
    fault: Fault,
    failed: Option<Call>,
    calls: Vec<Call>,
    /// The machine has begun, and what it calls now is no part of a start.
    has_begun: Arc<AtomicBool>,
    /// What failed was a processor's.
    is_fatal: Arc<AtomicBool>,
}

impl Oracle {
    fn serve(mut self, listener: &OwnedFd) -> Self {
        loop {
            let mut ready = [PollFd::new(listener, PollFlags::IN)];
            retry_on_intr(|| poll(&mut ready, None)).unwrap();
            if ready[0].revents().contains(PollFlags::HUP) {
                return self;
            }
            answer(listener, |data| self.errno(data));
        }
    }

    /// What the program gets for this call; 0: what the kernel says.
    fn errno(&mut self, data: &libc::seccomp_data) -> i32 {
        let call = call_of(data);
        // std looks at each descriptor that it closes, where assertions are on.
        if call == (libc::SYS_fcntl, libc::F_GETFD as u64) {
            return 0;
        }
        let is_first = (i64::from(data.nr), data.args[0], data.args[1]) == FIRST;
        // What starts the program asks, too.
        let is_over = match self.fault {
            Fault::Always(refused, errno) if call == refused => return errno,
            Fault::Always(..) => true,
            Fault::Nothing | Fault::Once(_) => self.has_begun.load(Ordering::Relaxed),
        };
        if self.calls.is_empty() && !is_first || is_over {
            return 0;
        }
        self.calls.push(call);
        match self.fault {
            Fault::Once(number) if number + 1 == self.calls.len() => {
                self.failed = Some(call);
                let is_fatal = call == (libc::SYS_ioctl, KVM_RUN);
                self.is_fatal.store(is_fatal, Ordering::Relaxed);
                errno_of(call)
            }
            _ => 0,
        }
    }
}

/// Answers one question; who asked may be gone.
fn answer(listener: &OwnedFd, mut asked: impl FnMut(&libc::seccomp_data) -> i32) {
    // SAFETY: numbers, for which zeros are right; the kernel wants them so.
    let mut question: libc::seccomp_notif = unsafe { mem::zeroed() };
    // SAFETY: the kernel fills what is there for it.
    let told = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_RECV,
            &raw mut question,
        )
    };
    if told != 0 {
        return;
    }
    let errno = asked(&question.data);
    let mut answer = libc::seccomp_notif_resp {
        id: question.id,
        val: 0,
        error: -errno,
        flags: if errno == 0 {
            libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32
        } else {
            0
        },
    };
    // SAFETY: the kernel reads it.
    unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            &raw mut answer,
        )
    };
}

/// What of a running VMM's jail the host can see; it may end meanwhile.
fn jail_of(vmm: &Jailed) -> io::Result<Vec<String>> {
    let read = |name: &str| fs::read_to_string(vmm.proc(name));
    let mut seen = Vec::new();
    for task in fs::read_dir(vmm.proc("task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        // KVM puts threads of its own into the group.
        if status.starts_with("Name:\tkvm-") {
            continue;
        }
        let kept = status.lines().filter(|line| {
            let kept = ["Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp"];
            kept.iter().any(|field| line.starts_with(field))
        });
        seen.extend(kept.map(str::to_owned));
    }
    for mount in read("mountinfo")?.lines() {
        // Where, how, and of which kind; the rest is numbers.
        let words: Vec<&str> = mount.split(' ').collect();
        seen.push(words[4..].join(" "));
    }
    for space in ["mnt", "net", "ipc", "uts", "cgroup", "pid", "user"] {
        let theirs = fs::read_link(vmm.proc(&format!("ns/{space}")))?;
        let ours = fs::read_link(format!("/proc/self/ns/{space}"))?;
        seen.push(format!("{space} of its own: {}", theirs != ours));
    }
    for name in ["uid_map", "gid_map", "setgroups", "limits"] {
        seen.push(read(name)?);
    }
    for entry in fs::read_dir(vmm.proc("fd"))? {
        let link = fs::read_link(entry?.path())?;
        let link = link.display().to_string();
        // The numbers of pipes and sockets differ.
        let kind = link.trim_end_matches(|end: char| end.is_ascii_digit() || end == ']');
        let kind = if kind.ends_with(":[") { kind } else { &link };
        seen.push(format!("holds {kind}"));
    }
    seen.sort();
    Ok(seen)
}

/// How a start came out.
#[derive(Debug)]
enum Outcome {
    /// It runs, shut in like this.
    Runs(Vec<String>),
    /// It has said why not.
    Told(String),
    /// It has ended without a word on the control socket.
    Ended(ExitStatus, String),
}

/// Starts the program, whose calls the oracle decides.
fn spawn(
    uid: u32,
    fault: Fault,
    has_begun: &Arc<AtomicBool>,
    is_fatal: &Arc<AtomicBool>,
) -> (Jailed, JoinHandle<Oracle>) {
    let (listeners, listener) = mpsc::channel::<OwnedFd>();
    let oracle = Oracle {
        fault,
        failed: None,
        calls: Vec::new(),
        has_begun: Arc::clone(has_begun),
        is_fatal: Arc::clone(is_fatal),
    };
    let oracle = thread::spawn(move || oracle.serve(&listener.recv().unwrap()));
    // A thread of its own: it, too, has to ask from then on.
    let spawn = move || {
        listeners.send(listen()).unwrap();
        Jailed::spawn_as(uid)
    };
    (thread::spawn(spawn).join().unwrap(), oracle)
}

/// Starts a machine, of which this fails.
fn start(uid: u32, request: &Request0, fault: Fault) -> (Outcome, Option<Call>, Vec<Call>) {
    let has_begun = Arc::new(AtomicBool::new(false));
    let is_fatal = Arc::new(AtomicBool::new(false));
    let (mut vmm, oracle) = spawn(uid, fault, &has_begun, &is_fatal);
    let mut jail = None;
    let outcome = loop {
        let said = match jail {
            None => vmm.try_start(request),
            // It ends by itself, but perhaps later than somebody asks for it.
            Some(_) if is_fatal.load(Ordering::Relaxed) => vmm.next(),
            // What fails may be of its first moments.
            Some(_) => vmm.try_request(&Request::Kill),
        };
        match (said, jail.take()) {
            (Some(Message::Started(_)), None) => {
                has_begun.store(true, Ordering::Relaxed);
                jail = Some(jail_of(&vmm).unwrap_or_default());
            }
            (Some(Message::Exited(ExitReason::Killed)), Some(jail)) => {
                assert!(vmm.ended().0.success());
                break Outcome::Runs(jail);
            }
            (Some(Message::Exited(ExitReason::Failed(failure))), _) => {
                vmm.ended();
                break Outcome::Told(failure.message);
            }
            (None, _) => {
                let (status, said) = vmm.ended();
                break Outcome::Ended(status, said);
            }
            (Some(other), _) => panic!("{other:?}"),
        }
    };
    let Oracle { failed, calls, .. } = oracle.join().unwrap();
    (outcome, failed, calls)
}

/// Of what was to be had, this much is not: rings, of which a disk needs none.
const RING: &str = "holds anon_inode:[io_uring]";

/// What a machine can do without; nothing of that shuts it in.
fn is_dispensable((call, which): Call) -> bool {
    match call {
        // That kernel has none, then, or disks wait for each request.
        libc::SYS_landlock_create_ruleset
        | libc::SYS_io_uring_setup
        | libc::SYS_io_uring_register => true,
        // Names of threads, and where the language's run time says that a stack is full.
        libc::SYS_gettid | libc::SYS_rt_sigaction => true,
        // Events, which cannot be lost; what else is written shows in the jail.
        libc::SYS_read | libc::SYS_write => true,
        libc::SYS_prctl => which == libc::PR_SET_NAME as u64,
        // Either of them may show that nobody writes to a file.
        libc::SYS_fcntl => which == libc::F_GETFL as u64 || which == libc::F_GET_SEALS as u64,
        // A ring's.
        libc::SYS_mmap => which == (libc::MAP_SHARED | libc::MAP_POPULATE) as u64,
        libc::SYS_ioctl => [KVM_ENABLE_CAP, KVM_CHECK_EXTENSION, KVM_CLOCK_CTRL].contains(&which),
        _ => false,
    }
}

/// `_IOW(KVMIO, 0xa3, struct kvm_enable_cap)`: one of them is for newer kernels.
const KVM_ENABLE_CAP: u64 = 0x4068_aea3;

/// `_IO(KVMIO, 0x03)`: what the kernel does not have need not be needed.
const KVM_CHECK_EXTENSION: u64 = 0xae03;

/// `_IO(KVMIO, 0xad)`: has a guest's watchdogs forgive a pause.
const KVM_CLOCK_CTRL: u64 = 0xaead;

/// Checks how a start came out one of whose calls has failed; `calm` is the jail of
/// one where none has.
fn check(what: &str, call: Call, outcome: &Outcome, calm: &[String]) {
    match outcome {
        Outcome::Runs(jail) => {
            assert!(is_dispensable(call), "{what}: it runs");
            let mut gone = calm.to_vec();
            for line in jail {
                let known = gone.iter().position(|other| other == line);
                gone.remove(known.unwrap_or_else(|| panic!("{what}: {line}")));
            }
            assert!(gone.iter().all(|line| line == RING), "{what}: {gone:?}");
        }
        Outcome::Told(said) => {
            let why = io::Error::from_raw_os_error(errno_of(call)).to_string();
            let is_said = said.contains(&why);
            // Questions whose answer is no, then.
            let no = match call.0 {
                libc::SYS_ioctl => &["KVM lacks", "is it /dev/kvm?", "saved with another"][..],
                libc::SYS_fcntl => &["can write to the file"],
                _ => &[],
            };
            let is_no = no.iter().any(|words| said.contains(words));
            assert!(is_said || is_no, "{what}: {said:?}");
            assert!(said.len() < 300 && !said.contains('\n'), "{what}: {said:?}");
        }
        // Before there is a socket to tell it on.
        Outcome::Ended(status, said) if call.0 == FIRST.0 => {
            assert_eq!(status.code(), Some(2), "{what}");
            assert!(said.starts_with("husk-vmm: descriptor 3 is not"), "{said}");
        }
        // The language's run time gives up that has no memory for a thread it has.
        Outcome::Ended(status, _) => {
            let is_own = call.1 & libc::MAP_ANONYMOUS as u64 != 0;
            assert!(call.0 == libc::SYS_mmap && is_own, "{what}: {outcome:?}");
            assert!(status.signal().is_some(), "{what}: {status}");
        }
    }
}

/// Each call of such a start fails once.
fn sweep(uid: u32, make: impl Fn() -> Request0) {
    let (calm, _, calls) = start(uid, &make(), Fault::Nothing);
    let Outcome::Runs(calm) = calm else {
        panic!("{calm:?}");
    };
    let mut failed: BTreeMap<Call, usize> = BTreeMap::new();
    for (failing, expected) in calls.iter().enumerate() {
        if failed.get(expected).is_some_and(|times| *times >= OFTEN) {
            continue;
        }
        let (outcome, call, _) = start(uid, &make(), Fault::Once(failing));
        // Threads take turns, so it may be another one, or none any more.
        let Some(call) = call else { continue };
        *failed.entry(call).or_default() += 1;
        check(&format!("call {failing}, {call:x?}"), call, &outcome, &calm);
    }
    let (kinds, times) = (failed.len(), failed.values().sum::<usize>());
    println!("{times} of {} calls, of {kinds} kinds", calls.len());
    assert!(kinds > 40, "{failed:x?}");
}

/// A disk.
fn add_disk(request: &mut Request0) {
    // Whose name is always the same.
    let disk = fs::File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
    disk.set_len(1 << 20).unwrap();
    let file = request.give(disk.into());
    request.spec.blocks.push(BlockSpec {
        id: "disk".into(),
        file,
        read_only: false,
        serial: "disk".into(),
        rate: RateSpec::default(),
    });
}

#[test]
fn a_call_that_fails_ends_a_boot_in_one_sentence() {
    if skip_unless_root() {
        return;
    }
    sweep(64_201, || {
        let (mut request, _console) = Request0::new(payload::build("1: jmp 1b"));
        add_disk(&mut request);
        let stream = request.give(socket_pair().1);
        request.spec.vsock = Some(VsockSpec {
            cid: 3,
            host_ports: vec![HostPort { port: 1024, stream }],
        });
        let initramfs = tempfile::tempfile().unwrap();
        initramfs.set_len(4096).unwrap();
        request.give_initramfs(initramfs);
        request
    });
}

#[test]
fn a_call_that_fails_ends_a_restored_machine_in_one_sentence() {
    if skip_unless_root() {
        return;
    }
    let done = Message::Reply(Ok(Reply::Done));
    let vmm = Jailed::spawn();
    let (request, _console) = Request0::new(payload::build("1: jmp 1b"));
    assert!(matches!(vmm.start(&request), Message::Started(_)));
    assert_eq!(vmm.request(&Request::Pause), done);
    let saved = Saved::empty();
    let descriptors = saved.descriptors();
    assert_eq!(vmm.request_with(&Saved::request(), &descriptors), done);
    drop((vmm, descriptors));
    saved.seal();
    sweep(64_202, || {
        let (mut request, _console) = saved.restore();
        add_disk(&mut request);
        request
    });
}

/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: u64 = 0xae80;

/// As where the pod may have no more processes: KVM wants a thread for the machine.
#[test]
fn a_processor_that_kvm_does_not_run_ends_the_machine() {
    if skip_unless_root() {
        return;
    }
    let refused = Fault::Always((libc::SYS_ioctl, KVM_RUN), libc::EAGAIN);
    let (mut vmm, oracle) = spawn(64_203, refused, &Arc::default(), &Arc::default());
    let (mut request, _console) = Request0::new(payload::build("1: jmp 1b"));
    request.spec.vcpus.max = 2;
    assert!(matches!(vmm.start(&request), Message::Started(_)));
    match vmm.next() {
        Some(Message::Exited(ExitReason::Failed(failure))) => {
            let why = "KVM_RUN: Resource temporarily unavailable (os error 11)";
            assert_eq!(failure.message, why);
        }
        other => panic!("{other:?}"),
    }
    assert!(vmm.ended().0.success());
    oracle.join().unwrap();
}
