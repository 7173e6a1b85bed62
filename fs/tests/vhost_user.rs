//! The real program over vhost-user: requests in descriptor chains, and guests
//! that break the rules. What it holds is in `jail.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver;
mod tree;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use driver::{BASE, Descriptor, Guest, INDIRECT, MEMORY_BYTES, QUEUE_SIZE, SCRATCH, object};
use husk_fs::abi::{
    self, CreateIn, EntryOut, InHeader, LinkIn, MkdirIn, Opcode, ReadIn, SetattrIn, SetxattrIn,
    WriteIn, WriteOut, fattr, fopen,
};
use tree::{Tree, lookup, open, tmpfs, walk};
use vhost::VhostBackend;
use vm_memory::ByteValued;

#[test]
fn files_travel_through_chains() {
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start(&tree.path(""));
    assert_eq!(
        lookup(&mut guest, abi::ROOT_ID, b"web").unwrap_err(),
        libc::EIO
    );
    let init = guest.init();
    assert_eq!(
        (init.major, init.max_write, init.max_pages),
        (7, 1 << 20, 256)
    );

    let rootfs = walk(&mut guest, "web/rootfs");
    assert_eq!(rootfs.attr.flags, abi::ATTR_SUBMOUNT);
    assert!(rootfs.entry_valid > 3600);
    let file = walk(&mut guest, "web/rootfs/hello");
    assert_eq!((file.attr.size, file.attr.flags), (12, 0));
    let opened = open(&mut guest, file.nodeid, libc::O_RDWR).unwrap();
    assert_eq!(opened.open_flags, fopen::KEEP_CACHE | fopen::NOFLUSH);

    let read = ReadIn {
        fh: opened.fh,
        offset: 7,
        size: 100,
        ..ReadIn::default()
    };
    let text = guest.ask(Opcode::Read, file.nodeid, &[read.as_slice()]);
    assert_eq!(text.unwrap(), b"guest");

    let write = WriteIn {
        fh: opened.fh,
        offset: 12,
        size: 8,
        ..WriteIn::default()
    };
    let parts: [&[u8]; 3] = [write.as_slice(), b", and", b" us"];
    let out = guest.ask(Opcode::Write, file.nodeid, &parts).unwrap();
    assert_eq!(object::<WriteOut>(&out).size, 8);
    let told = fs::read_to_string(tree.path("web/rootfs/hello")).unwrap();
    assert_eq!(told, "hello, guest, and us");
    assert!(guest.hang_up().success());
}

#[test]
fn it_acts_for_any_user_in_its_jail() {
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    let rootfs = walk(&mut guest, "web/rootfs").nodeid;
    guest.ids = (1234, 2345);
    let create = CreateIn {
        flags: libc::O_RDWR as u32,
        mode: 0o640,
        ..CreateIn::default()
    };
    let answer = guest.ask(Opcode::Create, rootfs, &[create.as_slice(), b"new\0"]);
    let file = object::<EntryOut>(&answer.unwrap());
    assert_eq!((file.attr.uid, file.attr.gid), (1234, 2345));
    // By way of /proc/self/fd: open, chmod, link and attributes.
    assert!(open(&mut guest, file.nodeid, libc::O_RDWR).is_ok());
    let chmod = SetattrIn {
        valid: fattr::MODE,
        mode: 0o600,
        ..SetattrIn::default()
    };
    guest
        .ask(Opcode::Setattr, file.nodeid, &[chmod.as_slice()])
        .unwrap();
    let link = LinkIn {
        oldnodeid: file.nodeid,
    };
    guest
        .ask(Opcode::Link, rootfs, &[link.as_slice(), b"again\0"])
        .unwrap();
    let set = SetxattrIn {
        size: 5,
        ..SetxattrIn::default()
    };
    let set: [&[u8]; 3] = [set.as_slice(), b"user.colour\0", b"green"];
    let set = guest.ask(Opcode::Setxattr, file.nodeid, &set);
    // tmpfs has user attributes since Linux 6.6.
    assert!(matches!(set, Ok(_) | Err(libc::EOPNOTSUPP)), "{set:?}");
    let metadata = fs::metadata(tree.path("web/rootfs/again")).unwrap();
    assert_eq!(
        (metadata.mode() & 0o7777, metadata.uid(), metadata.nlink()),
        (0o600, 1234, 2)
    );
    assert!(guest.hang_up().success());
}

#[test]
fn volumes_appear_while_it_runs_and_are_not_kept() {
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    let before = walk(&mut guest, "web/mounts/0");
    assert_eq!(before.attr.flags, 0);

    tmpfs(&tree.path("web/mounts/0"));
    fs::write(tree.path("web/mounts/0/key"), "1").unwrap();
    let after = walk(&mut guest, "web/mounts/0");
    assert_ne!(before.nodeid, after.nodeid);
    assert_eq!(after.attr.flags, abi::ATTR_SUBMOUNT);
    assert_eq!(after.entry_valid, 1);
    let key = lookup(&mut guest, after.nodeid, b"key").unwrap();
    assert_eq!(
        open(&mut guest, key.nodeid, libc::O_RDONLY)
            .unwrap()
            .open_flags,
        0
    );
    assert_eq!(
        lookup(&mut guest, after.nodeid, b"none").unwrap_err(),
        libc::ENOENT
    );

    // The root file system's absent names are kept.
    let rootfs = walk(&mut guest, "web/rootfs");
    let absent = lookup(&mut guest, rootfs.nodeid, b"none").unwrap();
    assert_eq!(absent.nodeid, 0);
    assert!(absent.entry_valid > 3600);
    assert!(guest.hang_up().success());
}

#[test]
fn what_is_unmounted_is_let_go_of() {
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    let volume = tree.path("web/mounts/0");
    tmpfs(&volume);
    fs::create_dir(volume.join("dir")).unwrap();
    fs::write(volume.join("dir/file"), "text").unwrap();
    let dir = walk(&mut guest, "web/mounts/0/dir").nodeid;
    let file = lookup(&mut guest, dir, b"file").unwrap().nodeid;
    let kept = walk(&mut guest, "web/rootfs/hello").nodeid;
    let read = |guest: &mut Guest, node, fh| {
        let read = ReadIn {
            fh,
            size: 100,
            ..ReadIn::default()
        };
        guest.ask(Opcode::Read, node, &[read.as_slice()])
    };
    let opened = open(&mut guest, file, libc::O_RDONLY).unwrap().fh;
    let still = open(&mut guest, kept, libc::O_RDONLY).unwrap().fh;
    assert_eq!(read(&mut guest, file, opened).unwrap(), b"text");
    let descriptors = |guest: &Guest| {
        let dir = format!("/proc/{}/fd", guest.child.id());
        fs::read_dir(dir).unwrap().count()
    };
    let before = descriptors(&guest);
    rustix::mount::unmount(&volume, rustix::mount::UnmountFlags::DETACH).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    // The volume's top, the directory, the file and the open file.
    while descriptors(&guest) > before - 4 {
        assert!(Instant::now() < end, "{} {before}", descriptors(&guest));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(read(&mut guest, file, opened).unwrap_err(), libc::EBADF);
    assert_eq!(lookup(&mut guest, dir, b"file").unwrap_err(), libc::ESTALE);
    assert_eq!(read(&mut guest, kept, still).unwrap(), b"hello, guest");
    // Another volume in the same place is another one.
    tmpfs(&volume);
    fs::write(volume.join("file"), "new").unwrap();
    let file = walk(&mut guest, "web/mounts/0/file").nodeid;
    let opened = open(&mut guest, file, libc::O_RDONLY).unwrap().fh;
    assert_eq!(read(&mut guest, file, opened).unwrap(), b"new");
    assert!(guest.hang_up().success());
}

#[test]
fn its_own_memory_stays_closed() {
    let Some(tree) = Tree::new() else { return };
    rustix::mount::mount_bind_recursive("/proc", tree.path("web/mounts/0")).unwrap();
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    let own = format!("web/mounts/0/{}", guest.child.id());
    let status = walk(&mut guest, &format!("{own}/status")).nodeid;
    let opened = open(&mut guest, status, libc::O_RDONLY).unwrap();
    assert_eq!(opened.open_flags, fopen::DIRECT_IO);
    for name in ["mem".to_owned(), format!("task/{}/mem", guest.child.id())] {
        let node = walk(&mut guest, &format!("{own}/{name}")).nodeid;
        for flags in [libc::O_RDONLY, libc::O_RDWR] {
            assert_eq!(open(&mut guest, node, flags).unwrap_err(), libc::EACCES);
        }
    }
    assert!(guest.hang_up().success());
}

#[test]
fn the_tree_cannot_be_left() {
    let Some(tree) = Tree::new() else { return };
    rustix::fs::mknodat(
        rustix::fs::CWD,
        tree.path("web/rootfs/null"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::from_raw_mode(0o666),
        rustix::fs::makedev(1, 3),
    )
    .unwrap();
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    let rootfs = walk(&mut guest, "web/rootfs").nodeid;
    let names: [&[u8]; 6] = [b"..", b".", b"../..", b"/etc", b"a/b", b"hello/"];
    for name in names {
        for parent in [abi::ROOT_ID, rootfs] {
            assert_eq!(lookup(&mut guest, parent, name).unwrap_err(), libc::EINVAL);
        }
    }
    // Neither links nor devices are opened here.
    let link = lookup(&mut guest, rootfs, b"link").unwrap().nodeid;
    assert_eq!(lookup(&mut guest, link, b"x").unwrap_err(), libc::ENOTDIR);
    assert_eq!(
        open(&mut guest, link, libc::O_RDONLY).unwrap_err(),
        libc::ELOOP
    );
    let null = lookup(&mut guest, rootfs, b"null").unwrap().nodeid;
    assert_eq!(
        open(&mut guest, null, libc::O_RDONLY).unwrap_err(),
        libc::ENXIO
    );
    assert_eq!(
        open(&mut guest, 12345, libc::O_RDONLY).unwrap_err(),
        libc::ESTALE
    );
    // The frame that carries the mounts is not the guest's to change.
    let mkdir = MkdirIn {
        mode: 0o755,
        umask: 0,
    };
    let web = walk(&mut guest, "web").nodeid;
    for parent in [abi::ROOT_ID, web] {
        let made = guest.ask(Opcode::Mkdir, parent, &[mkdir.as_slice(), b"new\0"]);
        assert_eq!(made.unwrap_err(), libc::EROFS);
    }
    assert_eq!(
        guest.ask(Opcode::Rmdir, web, &[b"mounts\0"]).unwrap_err(),
        libc::EROFS
    );
    assert!(
        guest
            .ask(Opcode::Mkdir, rootfs, &[mkdir.as_slice(), b"new\0"])
            .is_ok()
    );
    assert!(guest.hang_up().success());
}

/// Set when dropped, by a panic too.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Someone on the host swaps a directory for a link that leads out of the tree,
/// over and over, while the guest reaches through it.
#[test]
fn races_do_not_lead_out() {
    let Some(tree) = Tree::new() else { return };
    let (dir, link) = (tree.path("web/rootfs/dir"), tree.path("web/rootfs/swap"));
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "inside").unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("file"), "outside").unwrap();
    symlink(outside.path(), &link).unwrap();
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    let rootfs = walk(&mut guest, "web/rootfs").nodeid;
    let stop = AtomicBool::new(false);
    let (mut read, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let exchange = rustix::fs::RenameFlags::EXCHANGE;
                let here = rustix::fs::CWD;
                rustix::fs::renameat_with(here, &dir, here, &link, exchange).unwrap();
            }
        });
        let _stop = Stop(&stop);
        let end = Instant::now() + Duration::from_secs(20);
        while (read < 100 || refused < 100) && Instant::now() < end {
            let node = lookup(&mut guest, rootfs, b"dir").unwrap().nodeid;
            match lookup(&mut guest, node, b"file") {
                Ok(file) => {
                    let opened = open(&mut guest, file.nodeid, libc::O_RDONLY).unwrap();
                    let ask = ReadIn {
                        fh: opened.fh,
                        size: 100,
                        ..ReadIn::default()
                    };
                    let text = guest.ask(Opcode::Read, file.nodeid, &[ask.as_slice()]);
                    assert_eq!(text.unwrap(), b"inside");
                    read += 1;
                }
                Err(error) => {
                    assert_eq!(error, libc::ENOTDIR);
                    refused += 1;
                }
            }
        }
    });
    assert!(read >= 100 && refused >= 100, "{read} {refused}");
    assert!(guest.hang_up().success());
}

#[test]
fn broken_chains_cost_the_guest_alone() {
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    let header = InHeader {
        len: 100,
        opcode: Opcode::Lookup as u32,
        nodeid: 1,
        ..InHeader::default()
    };
    guest.put(SCRATCH, header);
    let end = BASE + MEMORY_BYTES;
    let read = Descriptor::readable;
    let write = Descriptor::writable;
    let chains: [&[Descriptor]; 12] = [
        &[read(SCRATCH, 40)],
        &[read(SCRATCH, 40), write(SCRATCH + 4096, 15)],
        // Says 100 bytes and has 40.
        &[read(SCRATCH, 40), write(SCRATCH + 4096, 16)],
        &[read(SCRATCH, 0), write(SCRATCH, 0)],
        &[read(SCRATCH, 12), write(SCRATCH + 4096, 100)],
        &[write(SCRATCH + 4096, 100)],
        &[write(SCRATCH + 4096, 100), read(SCRATCH, 40)],
        &[read(0, 40), write(SCRATCH + 4096, 100)],
        &[read(end - 8, 40), write(SCRATCH + 4096, 100)],
        &[read(SCRATCH, 40), write(end - 8, 100)],
        &[read(SCRATCH, u32::MAX), write(SCRATCH, u32::MAX)],
        &[read(u64::MAX, u32::MAX), write(u64::MAX - 7, u32::MAX)],
    ];
    for (index, chain) in chains.iter().enumerate() {
        let used = guest.submit(1, chain);
        let writable: u32 = (chain.iter())
            .filter(|descriptor| descriptor.flags != 0)
            .fold(0, |sum, descriptor| sum.saturating_add(descriptor.length));
        assert!(used.expect("an end") <= writable, "chain {index}");
        assert!(
            lookup(&mut guest, abi::ROOT_ID, b"web").is_ok(),
            "chain {index}"
        );
    }
    // A table in a table, tables of odd size, a loop, a head out of range.
    let table = SCRATCH + 0x8000;
    let indirect = |length| Descriptor {
        address: table,
        length,
        flags: INDIRECT,
    };
    guest.write_table(table, &[indirect(32), indirect(32)]);
    for length in [0, 16, 17, 32, !15] {
        assert!(guest.submit(1, &[indirect(length)]).is_some());
    }
    let looped = [read(SCRATCH, 40), read(SCRATCH, 40)];
    guest.write_table(BASE + 0x2_0000, &looped);
    guest.put(BASE + 0x2_0000 + 16 + 12, 1u16);
    guest.put(BASE + 0x2_0000 + 16 + 14, 0u16);
    assert!(guest.submit_head(1, 0).is_some());
    assert!(lookup(&mut guest, abi::ROOT_ID, b"web").is_ok());
    // The other queue takes requests as well; FORGET has no answer.
    let forget = InHeader {
        len: 48,
        opcode: Opcode::Forget as u32,
        nodeid: 2,
        ..InHeader::default()
    };
    guest.put(SCRATCH, forget);
    guest.put(SCRATCH + 40, u64::MAX);
    assert_eq!(guest.submit(0, &[read(SCRATCH, 48)]), Some(0));
    assert!(guest.hang_up().success());
}

#[test]
fn a_ruined_queue_stops_and_can_be_started_again() {
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    // A head that is no descriptor, then more requests than the queue holds.
    assert_eq!(guest.submit_head(1, QUEUE_SIZE), None);
    let available = BASE + 0x2_0000 + 0x4000;
    for index in [2u16, 500] {
        // The connection lives, and the driver can start the queue again.
        assert_eq!(guest.front_end.get_vring_base(1).unwrap(), 2);
        guest.put(available + 2, index);
        guest.start_queue(1, 2);
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.front_end.get_vring_base(1).unwrap(), 2);
    guest.put(available + 2, 2u16);
    guest.start_queue(1, 2);
    assert!(lookup(&mut guest, abi::ROOT_ID, b"web").is_ok());
    assert!(guest.hang_up().success());
}

#[test]
fn bad_starts_are_told() {
    let run = |words: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_husk-fs"))
            .args(words)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let usage = "usage: husk-fs --socket-fd N --source DIR --uid N --gid N --nodes N";
    assert!(run(&[]).contains(usage));
    assert!(run(&["--socket-fd", "x", "--source", "/"]).contains("usage"));
    assert!(run(&["--socket-fd", "77", "--source", "/"]).contains("usage"));
    let with = |fd, uid, nodes| {
        let user = ["--uid", uid, "--gid", "7"];
        let others = ["--socket-fd", fd, "--source", "/", "--nodes", nodes];
        run(&[&user[..], &others].concat())
    };
    assert!(with("77", "7", "7").contains("77 is no descriptor"));
    assert!(with("1", "7", "7").contains("1 is no descriptor"));
    // Never root's.
    for number in ["0", "4294967295", "-1", ""] {
        let said = with("77", number, "7");
        assert!(said.contains("--uid must be a number from 1"), "{said}");
        let said = with("77", "7", number);
        assert!(said.contains("--nodes must be a number from 1"), "{said}");
    }
}
