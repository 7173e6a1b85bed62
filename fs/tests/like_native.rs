//! Random sequences of file operations, by several users, on a served
//! directory and on one beside it: every result and the trees have to agree.

#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use harness::{Mount, OVERLAY, OWN, SHARED};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, Uid, XattrFlags,
};
use rustix::io::Errno;

#[derive(Clone, Debug)]
enum Operation {
    Mkdir(String, u32),
    Mknod(String, u32),
    Symlink(String, String),
    Link(String, String),
    Rename(String, String, u32),
    Unlink(String),
    Rmdir(String),
    Chmod(String, u32),
    Chown(String, Option<u32>, Option<u32>),
    Truncate(String, u64),
    Write(String, u32, u64, usize),
    Fallocate(String, u32, u64, u64),
    Copy(String, String),
    Setxattr(String, String, u8),
    Removexattr(String, String),
    Read(String),
    List(String),
}

/// An operation by one of three users with one of three umasks.
#[derive(Clone, Debug)]
struct Step {
    user: u32,
    umask: u32,
    operation: Operation,
}

fn path() -> impl Strategy<Value = String> {
    prop_oneof![
        9 => "[abc]",
        6 => "[ab]/[ab]",
        2 => "[ab]/[ab]/[ab]",
        1 => Just("a/../b".to_owned()),
        1 => Just(".".to_owned()),
    ]
}

fn mode() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => Just(0o777u32),
        2 => Just(0o666u32),
        1 => Just(0o2777u32),
        1 => Just(0o2766u32),
        3 => Just(0o6777u32),
        1 => Just(0o1777u32),
        2 => 0u32..0o10000,
    ]
}

fn user() -> impl Strategy<Value = u32> {
    prop_oneof![3 => Just(0u32), 2 => Just(1001u32), 1 => Just(1002u32)]
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation as O;
    let flags = prop_oneof![
        Just(OFlags::empty()),
        Just(OFlags::CREATE),
        Just(OFlags::CREATE | OFlags::EXCL),
        Just(OFlags::CREATE | OFlags::TRUNC),
        Just(OFlags::TRUNC),
        Just(OFlags::CREATE | OFlags::APPEND),
        Just(OFlags::NOFOLLOW),
    ];
    let name = prop_oneof![Just("user.a"), Just("user.b")];
    prop_oneof![
        6 => (path(), mode()).prop_map(|(p, m)| O::Mkdir(p, m)),
        1 => (path(), mode()).prop_map(|(p, m)| O::Mknod(p, m)),
        2 => (path(), path()).prop_map(|(t, p)| O::Symlink(t, p)),
        3 => (path(), path()).prop_map(|(p, q)| O::Link(p, q)),
        5 => (path(), path(), 0u32..4).prop_map(|(p, q, f)| O::Rename(p, q, f)),
        3 => path().prop_map(O::Unlink),
        2 => path().prop_map(O::Rmdir),
        4 => (path(), mode()).prop_map(|(p, m)| O::Chmod(p, m)),
        // Not with neither: a FUSE client then has nothing to send, although
        // it should take set-id bits off.
        2 => (path(), user(), prop::option::of(user()), any::<bool>())
            .prop_map(|(p, a, b, user_first)| match user_first {
                true => O::Chown(p, Some(a), b),
                false => O::Chown(p, b, Some(a)),
            }),
        2 => (path(), 0u64..20_000).prop_map(|(p, n)| O::Truncate(p, n)),
        8 => (path(), flags, 0u64..10_000, 0usize..10_000)
            .prop_map(|(p, f, o, n)| O::Write(p, f.bits(), o, n)),
        1 => (path(), prop_oneof![Just(0u32), Just(1), Just(3), Just(16)], 0u64..9000, 1u64..9000)
            .prop_map(|(p, m, o, n)| O::Fallocate(p, m, o, n)),
        1 => (path(), path()).prop_map(|(p, q)| O::Copy(p, q)),
        2 => (path(), name.clone(), any::<u8>())
            .prop_map(|(p, n, v)| O::Setxattr(p, n.to_owned(), v)),
        1 => (path(), name).prop_map(|(p, n)| O::Removexattr(p, n.to_owned())),
        3 => path().prop_map(O::Read),
        2 => path().prop_map(O::List),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let umask = prop_oneof![Just(0u32), Just(0o022u32), Just(0o077u32)];
    (user(), umask, operation()).prop_map(|(user, umask, operation)| Step {
        user,
        umask,
        operation,
    })
}

/// Acts as a user on this thread alone; capabilities follow the user id.
fn become_user(id: u32) {
    // SAFETY: the calls take one integer each.
    unsafe {
        libc::syscall(libc::SYS_setfsuid, 0);
        libc::syscall(libc::SYS_setfsgid, id);
        libc::syscall(libc::SYS_setfsuid, id);
    }
}

/// What an operation has brought, without what may differ.
fn run(root: &Path, step: &Step) -> Result<String, Errno> {
    rustix::process::umask(Mode::from_raw_mode(step.umask));
    become_user(step.user);
    let result = operate(root, &step.operation);
    become_user(0);
    rustix::process::umask(Mode::empty());
    result
}

fn operate(root: &Path, operation: &Operation) -> Result<String, Errno> {
    let at = |path: &str| root.join(path);
    let open = |path: &str, flags: OFlags| -> Result<OwnedFd, Errno> {
        rustix::fs::open(
            at(path),
            flags | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o666),
        )
    };
    match operation {
        Operation::Mkdir(path, mode) => {
            rustix::fs::mkdir(at(path), Mode::from_raw_mode(*mode))?;
        }
        Operation::Mknod(path, mode) => {
            let mode = Mode::from_raw_mode(*mode);
            rustix::fs::mknodat(CWD, at(path), FileType::Fifo, mode, 0)?;
        }
        Operation::Symlink(target, path) => rustix::fs::symlink(target, at(path))?,
        Operation::Link(old, new) => {
            rustix::fs::linkat(CWD, at(old), CWD, at(new), AtFlags::empty())?;
        }
        Operation::Rename(old, new, flags) => {
            let flags = RenameFlags::from_bits_retain(*flags);
            rustix::fs::renameat_with(CWD, at(old), CWD, at(new), flags)?;
        }
        Operation::Unlink(path) => rustix::fs::unlink(at(path))?,
        Operation::Rmdir(path) => rustix::fs::rmdir(at(path))?,
        Operation::Chmod(path, mode) => {
            rustix::fs::chmod(at(path), Mode::from_raw_mode(*mode))?;
        }
        Operation::Chown(path, user, group) => {
            let user = user.map(Uid::from_raw);
            let group = group.map(Gid::from_raw);
            rustix::fs::chownat(CWD, at(path), user, group, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Operation::Truncate(path, size) => {
            let file = open(path, OFlags::WRONLY | OFlags::NONBLOCK)?;
            rustix::fs::ftruncate(file, *size)?;
        }
        Operation::Write(path, flags, offset, size) => {
            let flags = OFlags::from_bits_retain(*flags) | OFlags::WRONLY | OFlags::NONBLOCK;
            let file = open(path, flags)?;
            let data: Vec<u8> = (0..*size).map(|i| (i % 247) as u8).collect();
            if flags.contains(OFlags::APPEND) {
                rustix::io::write(file, &data)?;
            } else {
                rustix::io::pwrite(file, &data, *offset)?;
            }
        }
        Operation::Fallocate(path, mode, offset, size) => {
            let file = open(path, OFlags::WRONLY | OFlags::NONBLOCK)?;
            let mode = FallocateFlags::from_bits_retain(*mode);
            rustix::fs::fallocate(file, mode, *offset, *size)?;
        }
        Operation::Copy(from, to) => {
            let from = open(from, OFlags::RDONLY | OFlags::NONBLOCK)?;
            let to = open(to, OFlags::WRONLY | OFlags::NONBLOCK)?;
            let copied = rustix::fs::copy_file_range(from, None, to, None, 5000)?;
            return Ok(copied.to_string());
        }
        Operation::Setxattr(path, name, value) => {
            let value = vec![*value; usize::from(*value)];
            rustix::fs::lsetxattr(at(path), name, &value, XattrFlags::empty())?;
        }
        Operation::Removexattr(path, name) => rustix::fs::lremovexattr(at(path), name)?,
        Operation::Read(path) => {
            let file = open(path, OFlags::RDONLY | OFlags::NONBLOCK)?;
            let mut data = vec![0; 40_000];
            let size = rustix::io::pread(file, &mut data, 0)?;
            data.truncate(size);
            return Ok(format!("{data:?}"));
        }
        Operation::List(path) => {
            let dir = open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            let mut names: Vec<_> = (rustix::fs::Dir::new(dir)?)
                .map(|entry| entry.map(|e| format!("{:?} {:?}", e.file_name(), e.file_type())))
                .collect::<Result<_, _>>()?;
            names.sort();
            return Ok(names.join(","));
        }
    }
    Ok(String::new())
}

/// Everything there is to know about a tree.
fn snapshot(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut left = vec![PathBuf::new()];
    while let Some(path) = left.pop() {
        let full = root.join(&path);
        let metadata = fs::symlink_metadata(&full).unwrap();
        let kind = metadata.file_type();
        let content = if kind.is_dir() {
            let names = fs::read_dir(&full).unwrap().map(|e| e.unwrap().file_name());
            left.extend(names.map(|name: OsString| path.join(name)));
            String::new()
        } else if kind.is_symlink() {
            format!("{:?}", fs::read_link(&full).unwrap())
        } else if kind.is_fifo() {
            "fifo".to_owned()
        } else {
            format!("{:?}", fs::read(&full).unwrap())
        };
        let size = if kind.is_dir() { 0 } else { metadata.len() };
        let attributes = ["user.a", "user.b"].map(|name| {
            let mut value = vec![0; 300];
            let size = rustix::fs::lgetxattr(&full, name, value.as_mut_slice());
            size.map(|size| value[..size].to_vec())
        });
        found.insert(
            path,
            format!(
                "{:o} {} {} {} {size} {attributes:?} {content}",
                metadata.mode(),
                metadata.uid(),
                metadata.gid(),
                metadata.nlink()
            ),
        );
    }
    found
}

#[test]
fn it_does_what_the_host_does() {
    for (budget, area) in [(1000, OWN), (2, OWN), (2, SHARED), (2, OVERLAY)] {
        let Some(mount) = Mount::new(budget) else {
            return;
        };
        let native = mount.host(area).join("native");
        fs::create_dir(&native).unwrap();
        let mut runner = TestRunner::new(Config {
            cases: 120,
            max_shrink_iters: 2000,
            failure_persistence: None,
            ..Config::default()
        });
        let mut case = 0;
        let case = std::cell::RefCell::new(&mut case);
        let result = runner.run(&prop::collection::vec(step(), 1..60), |steps| {
            **case.borrow_mut() += 1;
            let name = case.borrow().to_string();
            let roots = [native.join(&name), mount.guest(area).join(&name)];
            for root in &roots {
                fs::create_dir(root).unwrap();
                rustix::fs::chmod(root, Mode::from_raw_mode(0o777)).unwrap();
            }
            for (index, step) in steps.iter().enumerate() {
                let [expected, got] = roots.each_ref().map(|root| run(root, step));
                prop_assert_eq!(expected, got, "step {} {:?}", index, step);
            }
            let expected = snapshot(&roots[0]);
            prop_assert_eq!(&expected, &snapshot(&roots[1]));
            prop_assert_eq!(&expected, &snapshot(&mount.host(area).join(&name)));
            for root in &roots {
                fs::remove_dir_all(root).unwrap();
            }
            Ok(())
        });
        assert!(result.is_ok(), "{}", result.unwrap_err());
    }
}
