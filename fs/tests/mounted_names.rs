//! Names and directories, through a mount of the server.

#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;

use harness::{Mount, everywhere};
use rustix::fs::{CWD, FileType, Mode, RenameFlags, mknodat, renameat_with};

#[test]
fn renames_move_and_replace() {
    everywhere(|mount| {
        let at = |name: &str| mount.guest.join(name);
        fs::write(at("a"), "a").unwrap();
        fs::write(at("b"), "b").unwrap();
        let mut replaced = File::open(at("b")).unwrap();
        fs::rename(at("a"), at("b")).unwrap();
        assert_eq!(fs::read(at("b")).unwrap(), b"a");
        assert!(!at("a").exists());
        let mut text = String::new();
        replaced.read_to_string(&mut text).unwrap();
        assert_eq!(text, "b");
        assert_eq!(replaced.metadata().unwrap().nlink(), 0);

        fs::create_dir_all(at("dir/sub/deep")).unwrap();
        fs::write(at("dir/sub/deep/file"), "deep").unwrap();
        let below = File::open(at("dir/sub/deep/file")).unwrap();
        fs::rename(at("dir/sub"), at("moved")).unwrap();
        assert_eq!(fs::read(at("moved/deep/file")).unwrap(), b"deep");
        assert_eq!(below.metadata().unwrap().len(), 4);
        fs::write(at("moved/deep/new"), "new").unwrap();
        assert_eq!(fs::read(mount.host.join("moved/deep/new")).unwrap(), b"new");
        fs::rename(at("b"), at("moved/deep/b")).unwrap();
        assert_eq!(
            fs::rename(at("moved"), at("moved/deep/x"))
                .unwrap_err()
                .kind(),
            ErrorKind::InvalidInput
        );
        assert_eq!(
            fs::rename(at("dir"), at("moved")).unwrap_err().kind(),
            ErrorKind::DirectoryNotEmpty
        );
    });
}

#[test]
fn renames_exchange_and_refuse() {
    everywhere(|mount| {
        let at = |name: &str| mount.guest.join(name);
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("dir/inside"), "inside").unwrap();
        fs::write(at("file"), "file").unwrap();
        let rename = |from: &str, to: &str, flags| renameat_with(CWD, at(from), CWD, at(to), flags);
        rename("dir", "file", RenameFlags::EXCHANGE).unwrap();
        assert_eq!(fs::read(at("file/inside")).unwrap(), b"inside");
        assert_eq!(fs::read(at("dir")).unwrap(), b"file");
        // The nodes are found under their new names, also after others came.
        for index in 0..10 {
            fs::write(at(&format!("other-{index}")), "x").unwrap();
        }
        assert_eq!(fs::metadata(at("file/inside")).unwrap().len(), 6);
        let refused = rename("dir", "file", RenameFlags::NOREPLACE);
        assert_eq!(refused, Err(rustix::io::Errno::EXIST));
        rename("dir", "free", RenameFlags::NOREPLACE).unwrap();
        assert_eq!(fs::read(at("free")).unwrap(), b"file");
    });
}

#[test]
fn hard_links_share_a_file() {
    everywhere(|mount| {
        let at = |name: &str| mount.guest.join(name);
        fs::write(at("one"), "text").unwrap();
        fs::create_dir(at("dir")).unwrap();
        fs::hard_link(at("one"), at("dir/two")).unwrap();
        let (one, two) = (
            fs::metadata(at("one")).unwrap(),
            fs::metadata(at("dir/two")).unwrap(),
        );
        assert_eq!((one.ino(), one.nlink()), (two.ino(), 2));
        fs::rename(at("one"), at("dir/two")).unwrap();
        assert!(
            at("one").exists(),
            "renaming a file onto itself does nothing"
        );
        fs::remove_file(at("one")).unwrap();
        for index in 0..10 {
            fs::write(at(&format!("other-{index}")), "x").unwrap();
        }
        let mut file = File::options().append(true).open(at("dir/two")).unwrap();
        file.write_all(b"!").unwrap();
        assert_eq!(fs::read(at("dir/two")).unwrap(), b"text!");
        assert_eq!(file.metadata().unwrap().nlink(), 1);
        symlink("dir", at("link")).unwrap();
        rustix::fs::linkat(
            CWD,
            at("link"),
            CWD,
            at("link-2"),
            rustix::fs::AtFlags::empty(),
        )
        .unwrap();
        assert_eq!(
            fs::read_link(mount.host.join("link-2")).unwrap(),
            Path::new("dir")
        );
        assert!(fs::hard_link(at("dir"), at("dir-2")).is_err());
    });
}

#[test]
fn links_and_special_files() {
    everywhere(|mount| {
        let at = |name: &str| mount.guest.join(name);
        let long = "x/".repeat(2000);
        for target in ["/etc/passwd", "../../..", "nowhere", &long] {
            symlink(target, at("link")).unwrap();
            assert_eq!(fs::read_link(at("link")).unwrap(), Path::new(target));
            assert_eq!(
                fs::read_link(mount.host.join("link")).unwrap(),
                Path::new(target)
            );
            fs::remove_file(at("link")).unwrap();
        }
        let kinds = [
            ("fifo", FileType::Fifo, 0),
            ("socket", FileType::Socket, 0),
            ("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
            (
                "disk",
                FileType::BlockDevice,
                rustix::fs::makedev(259, 300_000),
            ),
            ("plain", FileType::RegularFile, 0),
        ];
        for (name, kind, device) in kinds {
            mknodat(CWD, at(name), kind, Mode::from_raw_mode(0o640), device).unwrap();
            for path in [at(name), mount.host.join(name)] {
                let metadata = fs::symlink_metadata(path).unwrap();
                assert_eq!(metadata.mode(), kind.as_raw_mode() | 0o640, "{name}");
                assert_eq!(metadata.rdev(), device, "{name}");
            }
        }
        // The guest's kernel brings them to life, not the host's.
        assert!(fs::metadata(at("fifo")).unwrap().file_type().is_fifo());
        let listener = std::os::unix::net::UnixListener::bind(at("listening")).unwrap();
        let _client = std::os::unix::net::UnixStream::connect(at("listening")).unwrap();
        listener.accept().unwrap();
        let mut null = File::options().write(true).open(at("null")).unwrap();
        null.write_all(b"gone").unwrap();
    });
}

#[test]
fn directories_are_made_listed_and_removed() {
    everywhere(|mount| {
        let dir = mount.guest.join("dir");
        fs::create_dir(&dir).unwrap();
        assert_eq!(
            fs::create_dir(&dir).unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        let names: BTreeSet<String> = (0..500)
            .map(|i| format!("{i:0width$}", width = 1 + i % 200))
            .collect();
        for name in &names {
            fs::write(dir.join(name), name).unwrap();
        }
        let list = |path: &Path| -> BTreeSet<String> {
            (fs::read_dir(path).unwrap())
                .map(|entry| {
                    let entry = entry.unwrap();
                    assert!(entry.file_type().unwrap().is_file());
                    assert_eq!(
                        entry.metadata().unwrap().len() as usize,
                        entry.file_name().len()
                    );
                    entry.file_name().into_string().unwrap()
                })
                .collect()
        };
        assert_eq!(list(&dir), names);
        assert_eq!(list(&dir), names);
        // Removing while listing, as `rm -r` does.
        for entry in fs::read_dir(&dir).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        assert_eq!(list(&dir).len(), 0);
        assert_eq!(
            fs::metadata(&dir).unwrap().nlink(),
            fs::metadata(mount.host.join("dir")).unwrap().nlink()
        );
        fs::write(dir.join("last"), "").unwrap();
        assert_eq!(
            fs::remove_dir(&dir).unwrap_err().kind(),
            ErrorKind::DirectoryNotEmpty
        );
        assert_eq!(
            fs::remove_file(&dir).unwrap_err().kind(),
            ErrorKind::IsADirectory
        );
        fs::remove_file(dir.join("last")).unwrap();
        fs::remove_dir(&dir).unwrap();
        assert!(!mount.host.join("dir").exists());
        let long = "n".repeat(256);
        assert_eq!(
            fs::write(mount.guest.join(long), "")
                .unwrap_err()
                .raw_os_error(),
            Some(libc::ENAMETOOLONG)
        );
        fs::write(mount.guest.join("n".repeat(255)), "").unwrap();
    });
}

#[test]
fn ten_thousand_files() {
    let Some(mount) = Mount::in_memory(300) else {
        return;
    };
    let dir = mount.guest("web/rootfs");
    for outer in 0..100 {
        let dir = dir.join(format!("{outer}"));
        fs::create_dir(&dir).unwrap();
        for inner in 0..100 {
            fs::write(dir.join(format!("{inner}")), format!("{outer}/{inner}")).unwrap();
        }
    }
    for outer in (0..100).rev() {
        for inner in 0..100 {
            let name = format!("{outer}/{inner}");
            assert_eq!(fs::read_to_string(dir.join(&name)).unwrap(), name);
        }
    }
    // All are known, few are held open.
    let (nodes, references, handles) = mount.unmount();
    assert!(nodes > 10_000, "{nodes}");
    // The last ones used are given another chance, so it may be a few more.
    assert!(references <= 330, "{references}");
    assert_eq!(handles, 0);
}

#[test]
fn what_the_guest_forgets_is_forgotten() {
    let Some(mount) = Mount::in_memory(1000) else {
        return;
    };
    let dir = mount.guest("web/rootfs");
    for round in 0..3 {
        fs::create_dir_all(dir.join("a/b/c")).unwrap();
        for index in 0..200 {
            fs::write(dir.join(format!("a/b/c/{round}-{index}")), "x").unwrap();
        }
        fs::remove_dir_all(dir.join("a")).unwrap();
    }
    let (nodes, references, handles) = mount.unmount();
    // The last few forgets may still be under way.
    assert!(nodes < 150, "{nodes}");
    assert!(references < 150, "{references}");
    assert_eq!(handles, 0);
}
