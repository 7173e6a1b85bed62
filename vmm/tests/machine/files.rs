//! Shared file systems of machines that go on from where another was saved: the
//! guest's memory is private, and the real file server sees none of it.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use husk_fs::abi::{InHeader, InitIn, Opcode};
use husk_fs::server::{Resources, Server};
use husk_vmm_spec::{BlockSpec, Descriptor, DeviceSpec, FsSpec, Message, RateSpec, Reply, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use vm_memory::ByteValued;

use crate::driver::{Attack, BUFFER, NEXT, WORDS, WRITABLE, attack, switch_on};
use crate::harness::{Request0, TestMachine};
use crate::jail::{Jailed, skip_unless_root};
use crate::saved::Saved;

const DONE: Message = Message::Reply(Ok(Reply::Done));

const ANSWER: u64 = BUFFER + 0x1000;

/// Length of the file that the guest looks for.
const FILE_BYTES: usize = 1234;

/// A file server on a thread of this process. Gives the VMM's end of its socket.
fn serve(top: &Path) -> OwnedFd {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let top = top.to_owned();
    thread::spawn(move || {
        // SAFETY: the thread gets a working directory and an umask of its own.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }.unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |path: &Path| rustix::fs::open(path, flags, Mode::empty()).unwrap();
        let mut server = Server::new(Resources {
            top: open(&top),
            proc_self_fd: open(Path::new("/proc/self/fd")),
            mountinfo: None,
            reference_budget: 100,
        })
        .unwrap();
        // What the program may not do, the thread may not do either.
        husk_fs::seccomp::install().unwrap();
        let _ = husk_fs::vhost_user::serve(theirs, &mut server);
    });
    ours.into()
}

fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("hello"), [7; FILE_BYTES]).unwrap();
    dir
}

/// One request in the second queue, and 256 bytes of room for its answer.
fn request(opcode: Opcode, node: u64, body: &[u8]) -> Attack {
    let header = InHeader {
        len: (size_of::<InHeader>() + body.len()) as u32,
        opcode: opcode as u32,
        unique: 5,
        nodeid: node,
        ..InHeader::default()
    };
    let bytes = [header.as_slice(), body].concat();
    let chain = [
        (BUFFER, bytes.len() as u32, NEXT, 1),
        (ANSWER, 256, WRITABLE, 0),
    ];
    Attack {
        queue: 1,
        memory: vec![(BUFFER, bytes), (ANSWER, vec![0; 256])],
        also: vec![0],
        ..Attack::chain(&chain)
    }
}

/// Says '+', waits for a file system in slot 5, begins a session and looks for
/// the file: 'i' and 'l' where the answers are right. Every 'u' is an answer, 't'
/// is none yet.
fn guest() -> String {
    let init = InitIn {
        major: 7,
        minor: 45,
        ..InitIn::default()
    };
    let ask = |request: &Attack, label: &str, check: &str| {
        format!(
            r#"
            {}
        again_{label}:
            cmp word ptr [r14 + 2], 0
            jne there_{label}
            call outcome
            jmp again_{label}
        there_{label}:
            mov edi, {ANSWER:#x}
            cmp dword ptr [rdi + 4], 0
            jne bad
            {check}
            "#,
            attack(request, label)
        )
    };
    [
        WORDS.to_owned(),
        r#"
        say '+'
    wait:
        config_read 5, 0
        cmp eax, 0x105a1af4
        jne wait
        config_write 5, 0x10, 0xd0000000
        "#
        .to_owned(),
        switch_on(5),
        ask(
            &request(Opcode::Init, 0, init.as_slice()),
            "init",
            "cmp dword ptr [rdi + 16], 7\n jne bad\n say 'i'\n",
        ),
        // The entry's attributes: the second is the size.
        ask(
            &request(Opcode::Lookup, 1, b"hello\0"),
            "lookup",
            &format!("cmp dword ptr [rdi + 64], {FILE_BYTES}\n jne bad\n say 'l'\n"),
        ),
        "1: jmp 1b\n bad:\n say '!'\n 1: jmp 1b\n".to_owned(),
    ]
    .concat()
}

/// The guest, saved before it has found anything.
fn saved() -> Saved {
    let mut machine = TestMachine::run(&guest());
    assert_eq!(machine.next_byte(), b'+');
    assert_eq!(machine.request(&Request::Pause, &[]), DONE);
    let saved = Saved::empty();
    let answer = machine.request(&Saved::request(), &saved.descriptors());
    assert_eq!(answer, DONE);
    saved.seal();
    saved
}

fn file_system(id: &str, socket: Descriptor) -> FsSpec {
    FsSpec {
        id: id.into(),
        socket,
        tag: "husk".into(),
    }
}

fn restored_with(saved: &Saved, dir: &Path) -> (Request0, File) {
    let (mut request, console) = saved.restore();
    let socket = request.give(serve(dir));
    request.spec.filesystems.push(file_system("shared", socket));
    (request, console)
}

/// What the guest has found.
fn found(console: &mut File) -> String {
    let mut found = String::new();
    while found.len() < 2 {
        let mut byte = [0];
        let mut ready = [PollFd::new(&*console, PollFlags::IN)];
        let patience = Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        let count = poll(&mut ready, Some(&patience)).unwrap();
        assert_eq!(count, 1, "the guest says nothing after {found:?}");
        console.read_exact(&mut byte).unwrap();
        match byte[0] {
            b'u' | b't' => {}
            other => found.push(other.into()),
        }
    }
    found
}

#[test]
fn restored_machines_share_files() {
    if skip_unless_root() {
        return;
    }
    let saved = saved();
    let dir = directory();
    // Two at once, each with a server of its own.
    let start = || {
        let (request, console) = restored_with(&saved, dir.path());
        let machine = TestMachine::start(request, console);
        assert!(matches!(machine.receive(), Message::Started(_)));
        machine
    };
    let (mut one, mut other) = (start(), start());
    assert_eq!(found(&mut one.console), "il");
    assert_eq!(found(&mut other.console), "il");
    assert_eq!(one.request(&Request::Pause, &[]), DONE);
    assert_eq!(one.request(&Request::Resume, &[]), DONE);
    let remove = Request::RemoveDevice("shared".into());
    assert_eq!(one.request(&remove, &[]), DONE);
    one.hang_up();
    other.hang_up();
}

#[test]
fn a_jailed_vmm_shares_files_with_a_restored_guest() {
    if skip_unless_root() {
        return;
    }
    let saved = saved();
    let dir = directory();
    let (request, mut console) = restored_with(&saved, dir.path());
    let vmm = Jailed::spawn();
    let answer = vmm.start(&request);
    assert!(matches!(answer, Message::Started(_)), "{answer:?}");
    assert_eq!(found(&mut console), "il");
    // It holds the template, and memory for this file system and for another one.
    let entries = std::fs::read_dir(vmm.proc("fd")).unwrap();
    let links = entries.map(|entry| std::fs::read_link(entry.unwrap().path()).unwrap());
    let mut files: Vec<_> = links
        .filter_map(|link| {
            let name = link.to_str()?.strip_prefix("/memfd:")?;
            Some(name.strip_suffix(" (deleted)")?.to_owned())
        })
        .collect();
    files.sort();
    assert_eq!(files, ["saved-memory", "shadow", "shadow"]);
    for request in [
        Request::Pause,
        Request::Resume,
        Request::RemoveDevice("shared".into()),
    ] {
        assert_eq!(vmm.request(&request), DONE);
    }
}

#[test]
fn a_file_system_comes_to_a_jailed_restored_guest_while_it_runs() {
    if skip_unless_root() {
        return;
    }
    let saved = saved();
    let dir = directory();
    let (request, mut console) = saved.restore();
    let vmm = Jailed::spawn();
    assert!(matches!(vmm.start(&request), Message::Started(_)));
    let add = |id| {
        let request = Request::AddDevice(DeviceSpec::Fs(file_system(id, Descriptor(0))));
        vmm.request_with(&request, &[serve(dir.path())])
    };
    assert_eq!(add("later"), DONE);
    assert_eq!(found(&mut console), "il");
    // There is no memory for another one.
    match add("again") {
        Message::Reply(Err(failure)) => {
            assert!(failure.message.contains("too many were added"), "{failure}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(vmm.request(&Request::RemoveDevice("later".into())), DONE);
}

#[test]
fn what_finds_no_slot_leaves_memory_for_another_one() {
    if skip_unless_root() {
        return;
    }
    let saved = saved();
    let dir = directory();
    let (request, console) = saved.restore();
    let machine = TestMachine::start(request, console);
    assert!(matches!(machine.receive(), Message::Started(_)));
    let mut disks = Vec::new();
    let refusal = loop {
        let id = format!("d{}", disks.len());
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let disk = BlockSpec {
            id: id.clone(),
            file: Descriptor(0),
            read_only: true,
            serial: id.clone(),
            rate: RateSpec::default(),
        };
        let add = Request::AddDevice(DeviceSpec::Block(disk));
        let answer = machine.request(&add, &[file.into()]);
        if answer != DONE {
            break answer;
        }
        disks.push(id);
    };
    assert!(format!("{refusal:?}").contains("slots"), "{refusal:?}");
    let add = Request::AddDevice(DeviceSpec::Fs(file_system("late", Descriptor(0))));
    let refusal = machine.request(&add, &[serve(dir.path())]);
    assert!(format!("{refusal:?}").contains("slots"), "{refusal:?}");
    let gone = Request::RemoveDevice(disks.remove(0));
    assert_eq!(machine.request(&gone, &[]), DONE);
    assert_eq!(machine.request(&add, &[serve(dir.path())]), DONE);
    machine.hang_up();
}
