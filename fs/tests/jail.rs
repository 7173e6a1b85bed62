//! What the real program holds while it serves, and what Landlock forbids it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver;
mod tree;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use driver::{GID, Guest, UID, object};
use husk_fs::abi::{EntryOut, LinkIn, MkdirIn, MknodIn, Opcode, Rename2In, WriteIn};
use husk_fs::jail;
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::thread::UnshareFlags;
use tree::{Tree, lookup, open, tmpfs, walk};
use vm_memory::ByteValued;

/// The kernel's Landlock can be told from none, and moves files.
fn has_landlock() -> bool {
    // SAFETY: the call with these arguments only asks for the version.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    if version < 2 {
        println!("SKIPPED: no Landlock that lets files be moved here");
    }
    version >= 2
}

#[test]
fn the_process_keeps_little() {
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    let proc = PathBuf::from(format!("/proc/{}", guest.child.id()));
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(field("Seccomp:"), "2");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Threads:"), "1");
    // Who it is. The user that it acts for, the last, is the caller's.
    let ids = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        let ids = line.split_whitespace().skip(1);
        ids.map(|id| id.parse().unwrap()).collect::<Vec<u32>>()
    };
    assert_eq!(ids("Uid:"), [UID, UID, UID, 0]);
    assert_eq!(ids("Gid:"), [GID, GID, GID, 0]);
    assert!(ids("Groups:").is_empty());
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
    let capabilities = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 27 | 1u64 << 31;
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(
            u64::from_str_radix(&field(set), 16).unwrap(),
            capabilities,
            "{set}"
        );
    }
    assert_eq!(field("CapInh:"), "0000000000000000");
    // Neither a file nor a program gets a core dump, and files are bounded.
    let limits = fs::read_to_string(proc.join("limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let values = line[name.len()..].split_whitespace();
        values.take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(limit("Max core file size"), ["1", "1"]);
    // Nor does a socket get memory in one.
    let dumped = fs::read_to_string(proc.join("coredump_filter")).unwrap();
    assert_eq!(dumped.trim(), "00000000");
    // One thread, and nothing of its memory locked.
    assert_eq!(limit("Max processes"), ["1", "1"]);
    assert_eq!(limit("Max locked memory"), ["0", "0"]);
    let files = limit("Max open files");
    assert!(files[0].parse::<u64>().unwrap() <= 1 << 18);
    assert_eq!(files[0], files[1]);
    // It sees the tree alone.
    let mounts = fs::read_to_string(proc.join("mountinfo")).unwrap();
    let points: Vec<_> = (mounts.lines())
        .map(|line| line.split(' ').nth(4).unwrap())
        .collect();
    assert_eq!(points, ["/", "/web/rootfs"]);
    for namespace in ["mnt", "net", "ipc", "uts", "cgroup", "pid"] {
        let theirs = fs::read_link(proc.join("ns").join(namespace)).unwrap();
        let ours = fs::read_link(Path::new("/proc/self/ns").join(namespace)).unwrap();
        assert_ne!(theirs, ours);
    }
    // Nothing else is open.
    let listed = [
        // The tree, and /proc/self/fd, which is a mount of its own.
        ("/", 2),
        ("mountinfo", 1),
        // The front end's socket, and its copy to wait for.
        ("socket:", 2),
        // What it sent: a kick and a call for each queue, and guest memory.
        ("anon_inode:[eventfd]", 4),
        ("/memfd:guest (deleted)", 1),
    ];
    let entries = fs::read_dir(proc.join("fd")).unwrap().map(Result::unwrap);
    let beyond_streams =
        entries.filter(|entry| !["0", "1", "2"].map(Into::into).contains(&entry.file_name()));
    let mut counts = BTreeMap::new();
    for entry in beyond_streams {
        let link = fs::read_link(entry.path()).unwrap();
        let link = link.to_str().unwrap();
        let kind = match link {
            _ if link.ends_with("/mountinfo") => "mountinfo",
            _ if link.starts_with("socket:") => "socket:",
            _ => link,
        };
        *counts.entry(kind.to_owned()).or_insert(0) += 1;
    }
    assert_eq!(
        counts,
        listed.map(|(kind, count)| (kind.to_owned(), count)).into()
    );
    assert!(guest.hang_up().success());
}

/// Makes a file of that kind.
fn make(guest: &mut Guest, parent: u64, name: &[u8], kind: FileType) -> Result<EntryOut, i32> {
    let mknod = MknodIn {
        mode: kind.as_raw_mode() | 0o644,
        rdev: 0x0103,
        ..MknodIn::default()
    };
    let made = guest.ask(Opcode::Mknod, parent, &[mknod.as_slice(), name, b"\0"])?;
    Ok(object(&made))
}

/// All that a guest does with files goes on behind Landlock, in what was mounted
/// after it was shut as well: moving and linking between directories, device
/// nodes, files without a name.
#[test]
fn late_volumes_are_as_free_as_early_ones() {
    let Some(tree) = Tree::new() else { return };
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    tmpfs(&tree.path("web/mounts/0"));
    // A root as containerd mounts it.
    let root = tree.path("web/mounts/1");
    let layers = tree.path("web/.layers");
    for dir in [&root, &layers] {
        fs::create_dir(dir).unwrap();
    }
    tmpfs(&layers);
    let layer = |name| {
        fs::create_dir(layers.join(name)).unwrap();
        layers.join(name).display().to_string()
    };
    let (lower, upper, work) = (layer("lower"), layer("upper"), layer("work"));
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let options = CString::new(options).unwrap();
    rustix::mount::mount("overlay", &root, "overlay", MountFlags::empty(), &*options).unwrap();
    // A file that is a volume, as Kubernetes mounts /etc/hosts.
    fs::write(tree.path("web/rootfs/hosts"), "localhost").unwrap();
    fs::write(tree.path("web/mounts/0/hosts"), "").unwrap();
    rustix::mount::mount_bind(
        tree.path("web/rootfs/hosts"),
        tree.path("web/mounts/0/hosts"),
    )
    .unwrap();
    for place in ["web/rootfs", "web/mounts/0", "web/mounts/1"] {
        let top = walk(&mut guest, place).nodeid;
        let mkdir = MkdirIn {
            mode: 0o755,
            umask: 0,
        };
        let [one, two] = [b"one\0", b"two\0"].map(|name| {
            let made = guest.ask(Opcode::Mkdir, top, &[mkdir.as_slice(), name]);
            object::<EntryOut>(&made.unwrap()).nodeid
        });
        let file = make(&mut guest, one, b"file", FileType::RegularFile).unwrap();
        for (name, kind) in [
            (&b"device"[..], FileType::CharacterDevice),
            (b"disk", FileType::BlockDevice),
            (b"fifo", FileType::Fifo),
            (b"socket", FileType::Socket),
        ] {
            assert!(make(&mut guest, one, name, kind).is_ok(), "{place}");
        }
        let opened = open(&mut guest, file.nodeid, libc::O_RDWR | libc::O_TRUNC).unwrap();
        let write = WriteIn {
            fh: opened.fh,
            size: 4,
            ..WriteIn::default()
        };
        let written = guest.ask(Opcode::Write, file.nodeid, &[write.as_slice(), b"text"]);
        assert!(written.is_ok(), "{place}");
        let link = LinkIn {
            oldnodeid: file.nodeid,
        };
        let linked = guest.ask(Opcode::Link, two, &[link.as_slice(), b"link\0"]);
        assert!(linked.is_ok(), "{place}: {linked:?}");
        let rename = Rename2In {
            newdir: two,
            ..Rename2In::default()
        };
        let names = [rename.as_slice(), b"file\0moved\0"];
        let moved = guest.ask(Opcode::Rename2, one, &names);
        assert!(moved.is_ok(), "{place}: {moved:?}");
        for name in ["link", "moved"] {
            let path = tree.path(place).join("two").join(name);
            assert_eq!(fs::read_to_string(path).unwrap(), "text");
        }
        // It stays in reach without a name.
        for name in [&b"link\0"[..], b"moved\0"] {
            guest.ask(Opcode::Unlink, two, &[name]).unwrap();
        }
        assert!(
            open(&mut guest, file.nodeid, libc::O_RDONLY).is_ok(),
            "{place}"
        );
    }
    let hosts = walk(&mut guest, "web/mounts/0/hosts").nodeid;
    assert!(open(&mut guest, hosts, libc::O_RDWR).is_ok());
    assert!(guest.hang_up().success());
}

/// What a process tells its own user is closed to the server, though it acts for
/// that user: of what it may do besides files, Landlock leaves nothing.
#[test]
fn other_processes_stay_closed() {
    let Some(tree) = Tree::new() else { return };
    if !has_landlock() {
        return;
    }
    rustix::mount::mount_bind_recursive("/proc", tree.path("web/mounts/0")).unwrap();
    let mut guest = Guest::start(&tree.path(""));
    guest.init();
    guest.ids = (1234, 2345);
    let mut other = Command::new("/bin/sleep")
        .arg("60")
        .uid(guest.ids.0)
        .gid(guest.ids.1)
        .spawn()
        .unwrap();
    let process = walk(&mut guest, &format!("web/mounts/0/{}", other.id())).nodeid;
    let status = lookup(&mut guest, process, b"status").unwrap().nodeid;
    assert!(open(&mut guest, status, libc::O_RDONLY).is_ok());
    let environment = lookup(&mut guest, process, b"environ").unwrap().nodeid;
    let opened = open(&mut guest, environment, libc::O_RDONLY);
    assert_eq!(opened.unwrap_err(), libc::EACCES);
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(guest.hang_up().success());
}

/// The server's rules, on a thread that can see other files.
#[test]
fn landlock_leaves_the_tree_alone() {
    let Some(tree) = Tree::new() else { return };
    if !has_landlock() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let late = tree.path("web/mounts/0");
    let is_ruled_out = AtomicBool::new(false);
    let denied = |result: std::io::Result<()>| {
        let error = result.unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::ACCESS));
    };
    let server = || {
        // Its mounts are copies, to which the tree's are added later.
        // SAFETY: no other thread shares this one's working directory.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
        rustix::thread::set_no_new_privs(true).unwrap();
        let top = File::open(tree.path("")).unwrap();
        let passwd = File::open("/etc/passwd").unwrap();
        jail::rule_out(top.as_fd()).unwrap();
        is_ruled_out.store(true, Ordering::SeqCst);

        let descriptor = format!("/proc/self/fd/{}", passwd.as_raw_fd());
        denied(File::open("/etc/passwd").map(drop));
        denied(File::open(descriptor).map(drop));
        denied(fs::read_dir(outside.path()).map(drop));
        denied(File::create(outside.path().join("file")).map(drop));
        denied(fs::create_dir(outside.path().join("dir")));
        assert!(fs::read(tree.path("web/rootfs/hello")).is_ok());
        let end = Instant::now() + Duration::from_secs(10);
        while !late.join("a/file").exists() {
            assert!(Instant::now() < end, "no mount came");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(fs::read(late.join("a/file")).unwrap(), b"late");
        fs::rename(late.join("a/file"), late.join("b/file")).unwrap();
        fs::hard_link(late.join("b/file"), late.join("a/link")).unwrap();
        // What is there is data.
        fs::write(late.join("program"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(late.join("program"), Permissions::from_mode(0o755)).unwrap();
        denied(Command::new(late.join("program")).spawn().map(drop));
    };
    std::thread::scope(|scope| {
        let server = scope.spawn(server);
        while !is_ruled_out.load(Ordering::SeqCst) && !server.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // As the shim does: finished before it appears.
        let volume = tree.path("web/volume");
        fs::create_dir(&volume).unwrap();
        tmpfs(&volume);
        fs::create_dir(volume.join("a")).unwrap();
        fs::create_dir(volume.join("b")).unwrap();
        fs::write(volume.join("a/file"), "late").unwrap();
        rustix::mount::mount_bind(&volume, &late).unwrap();
        server.join().unwrap();
    });
}
