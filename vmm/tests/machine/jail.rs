//! The real binary, as the shim starts it.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use husk_vmm_spec::{
    BlockSpec, BucketSpec, CONTROL_FD, Descriptor, DeviceSpec, ExitReason, Message, RateSpec,
    Reply, Request, VfioFunctionSpec, VfioSpec,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::driver::{self, Attack, BUFFER, NEXT, WRITABLE};
use crate::harness::{Request0, receive, send, skip, socket_pair, try_send};
use crate::payload;
use crate::saved::Saved;

const UID: u32 = 64_123;
const GID: u32 = 64_124;

pub fn skip_unless_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: only root can start a jailed VMM");
    }
    !root || skip()
}

pub struct Jailed {
    child: Child,
    shim: OwnedFd,
}

impl Jailed {
    pub fn spawn() -> Self {
        Self::spawn_as(UID)
    }

    /// Under a user of its own, with whom nobody shares limits.
    pub fn spawn_as(uid: u32) -> Self {
        let (shim, vmm) = socket_pair();
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk-vmm"));
        command
            .args(["--uid", &uid.to_string(), "--gid", &GID.to_string()])
            .stderr(Stdio::piped());
        let fd = vmm.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe, and nothing else is done in the child.
        unsafe {
            command.pre_exec(move || match libc::dup2(fd, CONTROL_FD) {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        let spawn = move || {
            // As the shim does it: the first process of a PID namespace.
            // SAFETY: descriptors stay shared.
            unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.unwrap();
            command.spawn().unwrap()
        };
        let child = thread::spawn(spawn).join().unwrap();
        Self { child, shim }
    }

    pub fn start(&self, request: &Request0) -> Message {
        self.try_start(request).expect("the VMM hung up")
    }

    /// None: it has hung up without a word.
    pub fn try_start(&self, request: &Request0) -> Option<Message> {
        let bytes = serde_json::to_vec(&request.spec).unwrap();
        // It may have said before that it cannot.
        let _ = try_send(&self.shim, &bytes, &request.descriptors);
        receive(&self.shim)
    }

    /// How it ended, which it does by itself, and what it printed.
    pub fn ended(&mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        let mut stream = self.child.stderr.take().unwrap();
        stream.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap(), said)
    }

    pub fn request(&self, request: &Request) -> Message {
        self.request_with(request, &[])
    }

    /// What it says of itself.
    pub fn next(&self) -> Option<Message> {
        receive(&self.shim)
    }

    /// None: it has hung up.
    pub fn try_request(&self, request: &Request) -> Option<Message> {
        let bytes = serde_json::to_vec(request).unwrap();
        let _ = try_send(&self.shim, &bytes, &[]);
        receive(&self.shim)
    }

    pub fn request_with(&self, request: &Request, descriptors: &[OwnedFd]) -> Message {
        let bytes = serde_json::to_vec(request).unwrap();
        send(&self.shim, &bytes, descriptors);
        receive(&self.shim).expect("the VMM hung up")
    }

    pub fn proc(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.child.id())
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads one field of `/proc/PID/status`.
fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("no {name} in {status}"))
        .split_whitespace()
        .collect()
}

#[test]
fn a_running_vmm_holds_nothing_of_the_host() {
    if skip_unless_root() {
        return;
    }
    let mut vmm = Jailed::spawn();
    let (mut request, mut console) = Request0::new(payload::build("say '+'\n 1: jmp 1b"));
    request.spec.vcpus.max = 2;
    assert!(matches!(vmm.start(&request), Message::Started(_)));
    drop(request);
    let mut byte = [0];
    console.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"+");

    // Every thread has lost its privileges and has a filter.
    let mut names = Vec::new();
    for task in fs::read_dir(vmm.proc("task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        names.push(field(&status, "Name").join(" "));
        let (uid, gid) = (UID.to_string(), GID.to_string());
        assert_eq!(field(&status, "Uid"), [uid.as_str(); 4]);
        assert_eq!(field(&status, "Gid"), [gid.as_str(); 4]);
        assert_eq!(field(&status, "Groups"), [""; 0]);
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(&status, set), ["0000000000000000"], "{set}");
        }
        assert_eq!(field(&status, "NoNewPrivs"), ["1"]);
        assert_eq!(field(&status, "Seccomp"), ["2"], "{names:?}");
    }
    // KVM puts kernel threads of its own into the group.
    names.retain(|name| !name.starts_with("kvm-"));
    names.sort();
    assert_eq!(names, ["devices", "husk-vmm", "vcpu0", "vcpu1"]);

    // Only the empty root is mounted.
    let mounts = fs::read_to_string(vmm.proc("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let mount: Vec<_> = mounts.split_whitespace().collect();
    assert_eq!(mount[4], "/", "{mounts}");
    assert!(mount[5].starts_with("ro,"), "{mounts}");
    assert!(mounts.contains("tmpfs"), "{mounts}");
    assert_eq!(fs::read_dir(vmm.proc("root")).unwrap().count(), 0);

    // Namespaces are its own, and there is nobody else in that of users.
    for name in ["mnt", "net", "ipc", "uts", "cgroup", "pid", "user"] {
        let theirs = fs::read_link(vmm.proc(&format!("ns/{name}"))).unwrap();
        let ours = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        assert_ne!(theirs, ours);
    }
    for (name, id) in [("uid_map", UID), ("gid_map", GID)] {
        let map = fs::read_to_string(vmm.proc(name)).unwrap();
        let id = id.to_string();
        assert_eq!(map.split_whitespace().collect::<Vec<_>>(), [&id, &id, "1"]);
    }

    // It has what it needs: descriptors, its threads and the kernel's for it.
    let limits = fs::read_to_string(vmm.proc("limits")).unwrap();
    for (name, most) in [
        ("Max open files", "8192"),
        ("Max processes", "23"),
        ("Max locked memory", "1048576"),
        ("Max core file size", "1"),
    ] {
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        let values = line.unwrap().split_whitespace().take(2);
        assert_eq!(values.collect::<Vec<_>>(), [most; 2], "{name}");
    }

    // Descriptors: streams to nowhere, and nothing that names a file. They are
    // those of this list, which src/descriptors.rs knows by their kinds.
    let anonymous = [
        "[eventfd]",
        "[eventpoll]",
        "[io_uring]",
        "kvm-vm",
        "kvm-vcpu:",
    ];
    for entry in fs::read_dir(vmm.proc("fd")).unwrap() {
        let entry = entry.unwrap();
        let number = entry.file_name().into_string().unwrap();
        let target = fs::read_link(entry.path()).unwrap();
        let target = target.to_str().unwrap();
        match number.parse::<u32>().unwrap() {
            0..=2 => assert_eq!(target, "/dev/null"),
            3 => assert!(target.starts_with("socket:"), "{target}"),
            _ => assert!(
                ["pipe:", "/memfd:guest-memory", "/dev/kvm"]
                    .iter()
                    .any(|known| target.starts_with(known))
                    || target.strip_prefix("anon_inode:").is_some_and(|kind| {
                        anonymous.iter().any(|known| kind.starts_with(known))
                    }),
                "{target}"
            ),
        }
    }

    // It still works, and ends when it is told to.
    let done = Message::Reply(Ok(Reply::Done));
    assert_eq!(vmm.request(&Request::Pause), done);
    assert_eq!(vmm.request(&Request::Resume), done);
    assert_eq!(
        vmm.request(&Request::Kill),
        Message::Exited(ExitReason::Killed)
    );
    assert_eq!(receive(&vmm.shim), None);
    assert!(vmm.child.wait().unwrap().success());
}

/// On a node where `user.max_user_namespaces` is 0, for instance.
#[test]
fn a_vmm_does_without_a_user_namespace() {
    if skip_unless_root() {
        return;
    }
    let none_left = || {
        let new_user = SeccompCmpOp::MaskedEq(libc::CLONE_NEWUSER as u64);
        let flags = libc::CLONE_NEWUSER as u64;
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, new_user, flags);
        let rule = SeccompRule::new(vec![condition.unwrap()]).unwrap();
        let filter: BpfProgram = SeccompFilter::new(
            [(libc::SYS_unshare, vec![rule])].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(libc::ENOSPC as u32),
            TargetArch::x86_64,
        )
        .unwrap()
        .try_into()
        .unwrap();
        // It stays with this thread and what it starts.
        seccompiler::apply_filter(&filter).unwrap();
        Jailed::spawn()
    };
    let vmm = thread::spawn(none_left).join().unwrap();
    let (request, _console) = Request0::new(payload::build("1: jmp 1b"));
    assert!(matches!(vmm.start(&request), Message::Started(_)));
    let users = fs::read_link(vmm.proc("ns/user")).unwrap();
    assert_eq!(users, fs::read_link("/proc/self/ns/user").unwrap());
    let status = fs::read_to_string(vmm.proc("status")).unwrap();
    assert_eq!(field(&status, "Uid"), [UID.to_string().as_str(); 4]);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, set), ["0000000000000000"], "{set}");
    }
}

#[test]
fn a_jailed_vmm_takes_disks_that_come_and_go() {
    if skip_unless_root() {
        return;
    }
    let vmm = Jailed::spawn();
    let (request, _console) = Request0::new(payload::build("1: jmp 1b"));
    assert!(matches!(vmm.start(&request), Message::Started(_)));
    let done = Message::Reply(Ok(Reply::Done));
    let rings = || {
        let entries = fs::read_dir(vmm.proc("fd")).unwrap();
        let links = entries.map(|entry| fs::read_link(entry.unwrap().path()).unwrap());
        let is_ring = |link: &std::path::PathBuf| link.to_str() == Some("anon_inode:[io_uring]");
        links.filter(is_ring).count()
    };
    // Whatever was to be made for them was there before.
    let before = rings();
    assert!(before > 0);
    for _ in 0..2 {
        let names: Vec<String> = (0..before).map(|i| format!("d{i}")).collect();
        for id in &names {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4096).unwrap();
            let spec = BlockSpec {
                id: id.clone(),
                file: Descriptor(0),
                read_only: false,
                serial: id.clone(),
                rate: Default::default(),
            };
            let request = Request::AddDevice(DeviceSpec::Block(spec));
            assert_eq!(vmm.request_with(&request, &[file.into()]), done);
            assert_eq!(rings(), before);
        }
        for id in names {
            assert_eq!(vmm.request(&Request::RemoveDevice(id)), done);
        }
        assert_eq!(rings(), before);
    }
}

/// That a machine gets PCI devices of the node is decided as it begins; what is none
/// changes nothing.
#[test]
fn a_jailed_vmm_refuses_what_is_no_pci_device() {
    if skip_unless_root() {
        return;
    }
    for (vfio, said) in [
        (false, "was not made for PCI devices"),
        (true, "VFIO_IOMMU_MAP_DMA of guest memory"),
    ] {
        let vmm = Jailed::spawn();
        let (mut request, _console) = Request0::new(payload::build("1: jmp 1b"));
        request.spec.vfio = vfio;
        assert!(matches!(vmm.start(&request), Message::Started(_)));
        let spec = VfioSpec {
            id: "vfio-7".into(),
            container: Descriptor(0),
            group: Descriptor(1),
            functions: vec![VfioFunctionSpec {
                device: Descriptor(2),
                slot: 31,
            }],
        };
        let file = || tempfile::tempfile().unwrap().into();
        for _ in 0..2 {
            let request = Request::AddVfio(spec.clone());
            let answer = vmm.request_with(&request, &[file(), file(), file()]);
            let Message::Reply(Err(failure)) = answer else {
                panic!("{answer:?}");
            };
            assert!(failure.message.contains(said), "{failure}");
        }
        let gone = vmm.request(&Request::RemoveDevice("vfio-7".into()));
        assert!(matches!(gone, Message::Reply(Err(_))));
    }
}

/// The kernel flushes by a thread of its own, which counts among the VMM's.
#[test]
fn a_jailed_vmm_flushes_a_disk() {
    if skip_unless_root() {
        return;
    }
    const FLUSH: u8 = 4;
    const STATUS: u64 = BUFFER + 0x2000;
    let mut flush = Attack::chain(&[(BUFFER, 16, NEXT, 1), (STATUS, 1, WRITABLE, 0)]);
    let mut header = vec![0; 16];
    header[0] = FLUSH;
    flush.memory = vec![(BUFFER, header), (STATUS, vec![9])];
    let source = [
        driver::WORDS.to_owned(),
        driver::switch_on(5),
        driver::attack(&flush, "flush"),
        format!("mov rsi, {STATUS}\n mov al, [rsi]\n add al, '0'\n"),
        "mov dx, COM1\n out dx, al\n 1: jmp 1b\n".to_owned(),
    ];
    let (mut request, mut console) = Request0::new(payload::build(&source.concat()));
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(4096).unwrap();
    let file = request.give(disk.into());
    request.spec.blocks.push(BlockSpec {
        id: "d".into(),
        file,
        read_only: false,
        serial: "d".into(),
        rate: RateSpec::default(),
    });
    let vmm = Jailed::spawn();
    assert!(matches!(vmm.start(&request), Message::Started(_)));
    let mut said = [0; 2];
    console.read_exact(&mut said).unwrap();
    assert_eq!(said, *b"u0");
}

/// One byte, and then one a second.
fn slowly() -> RateSpec {
    let bucket = BucketSpec {
        per_second: 1,
        burst: 1,
    };
    RateSpec {
        bytes: Some(bucket),
        operations: None,
    }
}

#[test]
fn a_jailed_vmm_holds_a_limited_disk_back() {
    if skip_unless_root() {
        return;
    }
    // Reads a sector, and another one after a reset of the device.
    let read = Attack::chain(&[
        (BUFFER, 16, NEXT, 1),
        (BUFFER + 0x1000, 512, NEXT | WRITABLE, 2),
        (BUFFER + 0x2000, 1, WRITABLE, 0),
    ]);
    let source = [
        driver::WORDS.to_owned(),
        driver::switch_on(5),
        driver::attack(&read, "first"),
        driver::attack(&read, "second"),
        "say '.'\n1: jmp 1b\n".to_owned(),
    ];
    let (mut request, mut console) = Request0::new(payload::build(&source.concat()));
    let disk = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        OwnedFd::from(file)
    };
    let file = request.give(disk());
    let spec = |id: &str, file| BlockSpec {
        id: id.into(),
        file,
        read_only: false,
        serial: id.into(),
        rate: slowly(),
    };
    request.spec.blocks.push(spec("slow", file));
    let vmm = Jailed::spawn();
    assert!(matches!(vmm.start(&request), Message::Started(_)));
    let mut said = [0; 3];
    console.read_exact(&mut said).unwrap();
    assert_eq!(said, *b"ut.", "{}", String::from_utf8_lossy(&said));
    // Pausing and unplugging wait for no tokens; another one can be plugged.
    let done = Message::Reply(Ok(Reply::Done));
    assert_eq!(vmm.request(&Request::Pause), done);
    assert_eq!(vmm.request(&Request::Resume), done);
    let again = Request::AddDevice(DeviceSpec::Block(spec("again", Descriptor(0))));
    assert_eq!(vmm.request_with(&again, &[disk()]), done);
    for id in ["slow", "again"] {
        assert_eq!(vmm.request(&Request::RemoveDevice(id.into())), done);
    }
    let mut never = spec("never", Descriptor(0));
    never.rate.bytes.as_mut().unwrap().per_second = 0;
    let never = Request::AddDevice(DeviceSpec::Block(never));
    match vmm.request_with(&never, &[disk()]) {
        Message::Reply(Err(failure)) => {
            assert!(failure.message.contains("is 0 a second"), "{failure}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_descriptor_that_is_not_listed_is_refused() {
    if skip_unless_root() {
        return;
    }
    let vmm = Jailed::spawn();
    let (mut request, _console) = Request0::new(payload::build("1: jmp 1b"));
    // The shim would have to be wrong: a directory for the console.
    request.descriptors[2] = fs::File::open("/").unwrap().into();
    match vmm.start(&request) {
        Message::Exited(ExitReason::Failed(failure)) => {
            assert!(failure.message.contains("is a Directory"), "{failure}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_jailed_vmm_ends_when_the_shim_hangs_up() {
    if skip_unless_root() {
        return;
    }
    for vcpus in [1, 4] {
        let mut vmm = Jailed::spawn();
        let (mut request, _console) = Request0::new(payload::build("1: jmp 1b"));
        request.spec.vcpus.max = vcpus;
        assert!(matches!(vmm.start(&request), Message::Started(_)));
        let (other, _) = socket_pair();
        vmm.shim = other;
        assert!(vmm.child.wait().unwrap().success());
    }
}

#[test]
fn a_jailed_vmm_reports_how_its_guest_ends() {
    if skip_unless_root() {
        return;
    }
    let mut vmm = Jailed::spawn();
    let (request, _console) = Request0::new(payload::build("reset"));
    assert!(matches!(vmm.start(&request), Message::Started(_)));
    assert_eq!(receive(&vmm.shim), Some(Message::Exited(ExitReason::Reset)));
    assert!(vmm.child.wait().unwrap().success());
}

#[test]
fn a_jailed_vmm_saves_its_guest_and_another_goes_on() {
    if skip_unless_root() {
        return;
    }
    let done = Message::Reply(Ok(Reply::Done));
    let vmm = Jailed::spawn();
    let payload = "xor ebx, ebx\n 1: inc bl\n mov dx, COM1\n mov al, bl\n out dx, al\n jmp 1b";
    let (mut request, mut console) = Request0::new(payload::build(payload));
    request.spec.vcpus.max = 2;
    assert!(matches!(vmm.start(&request), Message::Started(_)));
    let mut first = [0; 2];
    console.read_exact(&mut first).unwrap();
    assert_eq!(first, [1, 2]);
    drop(request);
    assert_eq!(vmm.request(&Request::Pause), done);
    let saved = Saved::empty();
    let descriptors = saved.descriptors();
    assert_eq!(vmm.request_with(&Saved::request(), &descriptors), done);
    drop(descriptors);
    saved.seal();
    drop(vmm);
    let mut said = Vec::new();
    console.read_to_end(&mut said).unwrap();

    for _ in 0..2 {
        let vmm = Jailed::spawn();
        let (mut request, mut console) = saved.restore();
        request.spec.vcpus.max = 2;
        assert!(matches!(vmm.start(&request), Message::Started(_)));
        drop(request);
        // What the pipe had no room for was dropped, so only where it goes on is
        // not known.
        let mut next = [0; 3];
        console.read_exact(&mut next).unwrap();
        assert_eq!(next[1], next[0].wrapping_add(1));
        assert_eq!(next[2], next[0].wrapping_add(2));
        assert_eq!(vmm.request(&Request::Pause), done);
        assert_eq!(vmm.request(&Request::Resume), done);
        assert_eq!(
            vmm.request(&Request::Kill),
            Message::Exited(ExitReason::Killed)
        );
    }
}

/// Processor time of each thread, in ticks, by name.
fn ticks(vmm: &Jailed) -> Vec<(String, u64)> {
    let tasks = fs::read_dir(vmm.proc("task")).unwrap();
    let of_task = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap();
        let (name, fields) = stat.rsplit_once(") ").unwrap();
        let (_, name) = name.split_once('(').unwrap();
        // proc_pid_stat(5): utime and stime, and the third field is the first here.
        let times = fields.split(' ').skip(14 - 3).take(2);
        let times = times.map(|time| time.parse::<u64>().unwrap());
        (name.to_owned(), times.sum())
    };
    tasks.map(|task| of_task(task.unwrap())).collect()
}

#[test]
fn a_guest_that_spins_on_exits_costs_its_own_processor_alone() {
    if skip_unless_root() {
        return;
    }
    // A port and a register of nobody's, and a device's that notes nothing.
    let source = r#"
        config_write 3, 4, 6
        config_read 3, 0x10
        mov ebx, eax
        and ebx, 0xfffffff0
        mov r12d, 0xd0000000
        say '+'
    1:  in al, 0x80
        out 0x80, al
        mov eax, [r12]
        mov [r12], eax
        mov al, [rbx + 20]
        jmp 1b
    "#;
    let (request, mut console) = Request0::new(payload::build(source));
    let vmm = Jailed::spawn();
    assert!(matches!(vmm.start(&request), Message::Started(_)));
    console.read_exact(&mut [0]).unwrap();
    let exits = || match vmm.request(&Request::Stats) {
        Message::Reply(Ok(Reply::Stats(stats))) => stats.exits,
        other => panic!("{other:?}"),
    };
    let (before, first) = (ticks(&vmm), exits());
    let began = Instant::now();
    let spun = |now: &[(String, u64)]| -> Vec<(String, u64)> {
        let differences = now.iter().zip(&before);
        differences
            .map(|(now, before)| (now.0.clone(), now.1 - before.1))
            .collect()
    };
    // Until there is something to see, on a busy machine too.
    let used = loop {
        thread::sleep(Duration::from_millis(100));
        let used = spun(&ticks(&vmm));
        if used
            .iter()
            .any(|(name, ticks)| name == "vcpu0" && *ticks >= 50)
        {
            break used;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{used:?}");
    };
    assert!(exits() > first + 1000);
    for (name, ticks) in &used {
        assert!(name == "vcpu0" || *ticks <= 2, "{used:?}");
    }
}

#[test]
fn a_wrong_command_line_is_refused() {
    let output = Command::new(env!("CARGO_BIN_EXE_husk-vmm"))
        .args(["--uid", "0", "--gid", "1"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("--uid must be a number from 1"), "{said}");
}

#[test]
fn the_jail_costs_little() {
    if skip_unless_root() {
        return;
    }
    // The best of some: the machine may be busy with other things.
    let best = (0..20)
        .map(|_| {
            let (request, _console) = Request0::new(payload::build("1: jmp 1b"));
            let vmm = Jailed::spawn();
            let Message::Started(timeline) = vmm.start(&request) else {
                panic!("did not start");
            };
            (
                timeline.spec_ns - timeline.exec_ns,
                timeline.entered_ns - timeline.spec_ns,
            )
        })
        .min()
        .unwrap();
    println!(
        "jail and spec {} us, boot {} us",
        best.0 / 1000,
        best.1 / 1000
    );
    assert!(best.0 < 5_000_000, "{} us", best.0 / 1000);
}
