//! Requests that no Linux guest would send, to the server itself.

#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::path::Path;

use husk_fs::abi::{InHeader, InitIn, OutHeader};
use husk_fs::buffers::Buffers;
use husk_fs::server::{Resources, Server};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;
use vm_memory::{ByteValued, VolatileSlice};

const INIT: u32 = 26;
const DESTROY: u32 = 38;

/// A request: its header's fields, what follows, the length it claims to have
/// beyond the truth, and the room for the answer.
#[derive(Clone, Debug)]
struct Garbage {
    opcode: u32,
    node: u64,
    ids: (u32, u32),
    body: Vec<u8>,
    lie: i64,
    room: usize,
    cut: usize,
}

/// Words that are sometimes what an operation looks for: handles, nodes, sizes,
/// flags and names.
fn word() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => (0u64..6).prop_map(|n| n.to_le_bytes().to_vec()),
        2 => any::<u64>().prop_map(|n| n.to_le_bytes().to_vec()),
        2 => (0u32..64).prop_map(|n| (1u64 << n).to_le_bytes().to_vec()),
        1 => Just(u64::MAX.to_le_bytes().to_vec()),
        2 => any::<[u8; 4]>().prop_map(|n| n.to_vec()),
        4 => "[a-c]".prop_map(|name| [name.as_bytes(), b"\0"].concat()),
        1 => Just(b"..\0".to_vec()),
        1 => Just(b"/etc/passwd\0".to_vec()),
        1 => Just(b"user.a\0".to_vec()),
        1 => Just(b"security.capability\0".to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..300),
    ]
}

fn garbage() -> impl Strategy<Value = Garbage> {
    let opcode = prop_oneof![
        40 => (1u32..54).prop_filter("keeps the session", |code| *code != DESTROY),
        1 => Just(DESTROY),
        1 => any::<u32>(),
    ];
    let room = prop_oneof![Just(0usize), 0usize..40, 0usize..4096, Just(70_000usize)];
    (
        opcode,
        prop_oneof![9 => 0u64..6, 1 => any::<u64>()],
        (prop_oneof![Just(0u32), any::<u32>()], any::<u32>()),
        prop::collection::vec(word(), 0..12).prop_map(|words| words.concat()),
        prop_oneof![8 => Just(0i64), 1 => -50i64..50, 1 => any::<i32>().prop_map(i64::from)],
        room,
        1usize..60,
    )
        .prop_map(|(opcode, node, ids, body, lie, room, cut)| Garbage {
            opcode,
            node,
            ids,
            body,
            lie,
            room,
            cut,
        })
}

fn pieces(memory: &mut [u8], cut: usize) -> Buffers<'_> {
    let mut buffers = Buffers::default();
    let (first, second) = memory.split_at_mut(cut.min(memory.len()));
    buffers.push(VolatileSlice::from(first)).unwrap();
    buffers.push(VolatileSlice::from(second)).unwrap();
    buffers
}

/// Sends a request; the answer's header and body, if there is one.
fn send(server: &mut Server, request: &Garbage, unique: u64) -> Option<(OutHeader, Vec<u8>)> {
    let claimed = (size_of::<InHeader>() + request.body.len()) as i64 + request.lie;
    let header = InHeader {
        len: claimed as u32,
        opcode: request.opcode,
        unique,
        nodeid: request.node,
        uid: request.ids.0,
        gid: request.ids.1,
        ..InHeader::default()
    };
    let mut message = [header.as_slice(), &request.body].concat();
    let mut reply = vec![0xaa; request.room];
    let used = server.handle(
        pieces(&mut message, request.cut),
        pieces(&mut reply, request.cut),
    );
    assert!(used <= reply.len());
    let (head, body) = reply[..used].split_first_chunk::<16>()?;
    let mut answer = OutHeader::default();
    answer.as_mut_slice().copy_from_slice(head);
    assert_eq!((answer.len as usize, answer.unique), (used, unique));
    assert!((-4095..=0).contains(&answer.error), "{}", answer.error);
    assert!(answer.error == 0 || body.is_empty());
    Some((answer, body.to_vec()))
}

fn init() -> Garbage {
    let asked = InitIn {
        major: 7,
        minor: 41,
        flags: u32::MAX,
        flags2: u32::MAX,
        ..InitIn::default()
    };
    Garbage {
        opcode: INIT,
        node: 0,
        ids: (0, 0),
        body: asked.as_slice().to_vec(),
        lie: 0,
        room: 4096,
        cut: 40,
    }
}

/// Mounts a small tmpfs, in a mount namespace of this test.
fn mount_small(dir: &Path) {
    // SAFETY: no other thread shares this one's working directory.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    let small = c"size=4m,nr_inodes=500";
    rustix::mount::mount("tmpfs", dir, "tmpfs", MountFlags::NODEV, small).unwrap();
    std::fs::create_dir_all(dir.join("a/rootfs/b")).unwrap();
    std::fs::create_dir_all(dir.join("b/c")).unwrap();
    std::fs::write(dir.join("a/rootfs/a"), "content").unwrap();
    std::os::unix::fs::symlink("/etc", dir.join("c")).unwrap();
}

/// A server of this thread, which loses its privileges.
fn server(dir: &Path) -> Server {
    // SAFETY: the thread has used neither working directory nor umask.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.unwrap();
    let open = |path: &Path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).unwrap()
    };
    Server::new(Resources {
        top: open(dir),
        proc_self_fd: open(Path::new("/proc/self/fd")),
        mountinfo: None,
        reference_budget: 8,
    })
    .unwrap()
}

/// Sends sessions of garbage.
fn attack(dir: &Path) {
    let server = RefCell::new(server(dir));
    let mut runner = TestRunner::new(Config {
        cases: 200,
        failure_persistence: None,
        ..Config::default()
    });
    let session = prop::collection::vec(garbage(), 1..120);
    let result = runner.run(&session, |session| {
        let mut server = server.borrow_mut();
        for (unique, request) in std::iter::once(&init()).chain(&session).enumerate() {
            send(&mut server, request, unique as u64);
        }
        // It still serves.
        let (answer, _) = send(&mut server, &init(), 7).unwrap();
        prop_assert_eq!(answer.error, 0);
        prop_assert_eq!(server.counts(), (1, 0, 0));
        Ok(())
    });
    assert!(result.is_ok(), "{}", result.unwrap_err());
}

#[test]
fn nonsense_is_answered_with_errors() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: not root");
        return;
    }
    let outer = tempfile::tempdir().unwrap();
    let dir = outer.path().join("tree");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(outer.path().join("a"), "outside").unwrap();
    mount_small(&dir);
    std::thread::scope(|scope| scope.spawn(|| attack(&dir)).join()).unwrap();
    rustix::mount::unmount(&dir, rustix::mount::UnmountFlags::DETACH).unwrap();
    let outside: Vec<_> = (std::fs::read_dir(outer.path()).unwrap())
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(outside.len(), 2, "{outside:?}");
    assert_eq!(std::fs::read(outer.path().join("a")).unwrap(), b"outside");
}
