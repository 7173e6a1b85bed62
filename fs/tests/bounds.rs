//! What a guest can make the real program hold, and where that ends: see the table in
//! the library's description.

#![allow(clippy::unwrap_used)]

mod driver;
mod tree;

use std::collections::BTreeSet;
use std::fs;

use driver::{Guest, object};
use husk_fs::abi::{Dirent, EntryOut, MknodIn, Opcode, OpenIn, OpenOut, ReadIn, ReleaseIn};
use rustix::fs::FileType;
use tree::{Tree, lookup, open, walk};
use vm_memory::ByteValued;

/// Memory of its own that the server has, in bytes.
fn memory(guest: &Guest) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", guest.child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<usize>().unwrap() << 10
}

fn open_directory(guest: &mut Guest, node: u64) -> Result<u64, i32> {
    let opened = guest.ask(Opcode::Opendir, node, &[OpenIn::default().as_slice()])?;
    Ok(object::<OpenOut>(&opened).fh)
}

/// Names and their positions, of one answer of 4 KiB.
fn list(guest: &mut Guest, node: u64, fh: u64, offset: u64) -> Vec<(u64, Vec<u8>)> {
    let read = ReadIn {
        fh,
        offset,
        size: 4096,
        ..ReadIn::default()
    };
    let answer = guest.ask(Opcode::Readdir, node, &[read.as_slice()]);
    let answer = answer.unwrap();
    let mut rest = answer.as_slice();
    let mut found = Vec::new();
    while let Some((head, names)) = rest.split_at_checked(size_of::<Dirent>()) {
        let head: Dirent = object(head);
        let name = &names[..head.namelen as usize];
        found.push((head.off, name.to_vec()));
        let size = (size_of::<Dirent>() + name.len()).next_multiple_of(8);
        rest = rest.get(size..).unwrap_or_default();
    }
    found
}

#[test]
fn open_files_end_with_the_descriptors() {
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start_with_descriptors(&tree.path(""), 128);
    guest.init();
    let directory = walk(&mut guest, "web/rootfs").nodeid;
    let file = lookup(&mut guest, directory, b"hello").unwrap().nodeid;
    let mut files = Vec::new();
    let error = loop {
        // References make room first, so this is what handles alone hold.
        assert!(files.len() < 128);
        match open(&mut guest, file, libc::O_RDONLY) {
            Ok(opened) => files.push(opened.fh),
            Err(error) => break error,
        }
    };
    assert_eq!(error, libc::ENFILE);
    // A directory takes fewer references on the way.
    let mut directories = 0;
    let error = loop {
        assert!(files.len() + directories < 128);
        match open_directory(&mut guest, directory) {
            Ok(_) => directories += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error, libc::ENFILE);
    assert!(files.len() + directories > 64, "{}", files.len());
    // The server lives, and what is given back may be used again.
    for fh in files.drain(..8) {
        let release = ReleaseIn {
            fh,
            ..ReleaseIn::default()
        };
        let released = guest.ask(Opcode::Release, file, &[release.as_slice()]);
        released.unwrap();
    }
    assert!(open_directory(&mut guest, directory).is_ok());
    assert!(lookup(&mut guest, directory, b"hello").is_ok());
    assert!(guest.hang_up().success());
}

#[test]
fn removed_files_end_with_the_descriptors() {
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start_with_descriptors(&tree.path(""), 128);
    guest.init();
    let directory = walk(&mut guest, "web/rootfs").nodeid;
    let mut removed = 0;
    // Their nodes, which the guest does not forget, can be had by no name again.
    let error = loop {
        assert!(removed < 128);
        let mknod = MknodIn {
            mode: FileType::RegularFile.as_raw_mode() | 0o600,
            ..MknodIn::default()
        };
        let parts: [&[u8]; 2] = [mknod.as_slice(), b"gone\0"];
        let made = guest.ask(Opcode::Mknod, directory, &parts);
        let gone = made.and_then(|_| guest.ask(Opcode::Unlink, directory, &[b"gone\0"]));
        match gone {
            Ok(_) => removed += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error, libc::ENFILE);
    assert!((64..128).contains(&removed), "{removed}");
    // A session's end closes them all.
    guest.ask(Opcode::Destroy, 0, &[]).unwrap();
    guest.init();
    walk(&mut guest, "web/rootfs/hello");
    assert!(guest.hang_up().success());
}

#[test]
fn listings_hold_little_however_many_are_open() {
    const OPEN: usize = 2000;
    let Some(tree) = Tree::new() else { return };
    let names: BTreeSet<Vec<u8>> = (0..1000)
        .map(|index| format!("{index:060}").into_bytes())
        .collect();
    fs::create_dir(tree.path("web/rootfs/many")).unwrap();
    for name in &names {
        let name = str::from_utf8(name).unwrap();
        fs::write(tree.path("web/rootfs/many").join(name), "").unwrap();
    }
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    let directory = walk(&mut guest, "web/rootfs/many").nodeid;
    let first = open_directory(&mut guest, directory).unwrap();
    let mut found = list(&mut guest, directory, first, 0);
    let before = memory(&guest);
    for _ in 0..OPEN {
        let fh = open_directory(&mut guest, directory).unwrap();
        assert!(!list(&mut guest, directory, fh, 0).is_empty());
    }
    // Were all of what is read ahead kept, that would be 32 MiB.
    let grown = memory(&guest) - before;
    assert!(grown < 8 << 20, "{grown}");
    // The first one goes on where it was.
    loop {
        let more = list(&mut guest, directory, first, found.last().unwrap().0);
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    let found: Vec<_> = found.into_iter().map(|(_, name)| name).collect();
    assert_eq!(found.len(), names.len() + 2);
    let found: BTreeSet<_> = found.into_iter().filter(|name| name[0] != b'.').collect();
    assert_eq!(found, names);
    assert!(guest.hang_up().success());
}

#[test]
fn a_guest_knows_so_many_files_and_no_more() {
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start_with_nodes(&tree.path(""), 100);
    guest.init();
    let directory = walk(&mut guest, "web/rootfs").nodeid;
    let mut known = Vec::new();
    let refused = loop {
        let name = known.len().to_string();
        assert!(known.len() < 200);
        fs::write(tree.path("web/rootfs").join(&name), "").unwrap();
        match lookup(&mut guest, directory, name.as_bytes()) {
            Ok(entry) => known.push(entry.nodeid),
            Err(errno) => break errno,
        }
    };
    assert_eq!(refused, rustix::io::Errno::NFILE.raw_os_error());
    // The top and the directories on the way are among them.
    assert_eq!(known.len(), 97);
    // What it knows it may use, and what it forgets makes room.
    assert!(lookup(&mut guest, directory, b"0").is_ok());
    guest.forget(known[1]);
    assert!(lookup(&mut guest, directory, b"97").is_ok());
    assert!(guest.hang_up().success());
}

#[test]
fn a_known_file_costs_half_a_kib() {
    const FILES: usize = 30_000;
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    let directory = walk(&mut guest, "web/rootfs").nodeid;
    let before = memory(&guest);
    for index in 0..FILES {
        let name = format!("{index:060}");
        fs::write(tree.path("web/rootfs").join(&name), "").unwrap();
        let entry: EntryOut = lookup(&mut guest, directory, name.as_bytes()).unwrap();
        assert_ne!(entry.nodeid, 0);
    }
    let each = (memory(&guest) - before) / FILES;
    assert!(each < 512, "{each}");
    // More than that is no longer open.
    let open = fs::read_dir(format!("/proc/{}/fd", guest.child.id())).unwrap();
    assert!(open.count() < 8192 + 300);
    assert!(guest.hang_up().success());
}
