//! The directory of a snapshot: an overlay of the guest writes in directories
//! that lie in it, and what else lies there is not the guest's.

#![allow(clippy::unwrap_used)]

mod harness;

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::Path;

use harness::{Mount, SHARED};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

/// Where it is in the tree.
const LAYERS: &str = "web/layers";

fn snapshot(mount: &Mount) -> std::path::PathBuf {
    let dir = mount.host(LAYERS);
    for name in ["fs", "work"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    fs::write(dir.join(".marker"), "the snapshotter's").unwrap();
    symlink("fs", dir.join("link")).unwrap();
    dir
}

fn refused<T>(result: io::Result<T>) {
    let error = result.err().and_then(|error| error.raw_os_error());
    assert_eq!(error, Some(libc::EROFS));
}

#[test]
fn the_directory_itself_is_not_the_guests() {
    let Some(mount) = Mount::new(1000) else {
        return;
    };
    let host = snapshot(&mount);
    let before = fs::metadata(&host).unwrap();
    let dir = mount.guest(LAYERS);
    // Nothing but directories is found.
    for name in [".marker", "link"] {
        let found = fs::symlink_metadata(dir.join(name));
        assert_eq!(found.unwrap_err().kind(), io::ErrorKind::NotFound, "{name}");
    }
    // No new names, no changed ones.
    let inside = dir.join("fs/file");
    fs::write(&inside, "mine").unwrap();
    refused(fs::write(dir.join("layer.erofs"), "forged"));
    refused(fs::create_dir(dir.join("new")));
    refused(symlink("fs", dir.join("new")));
    refused(fs::hard_link(&inside, dir.join("new")));
    refused(fs::rename(&inside, dir.join("new")));
    refused(fs::rename(dir.join("fs"), dir.join("other")));
    refused(fs::rename(dir.join("fs"), dir.join("work/fs")));
    refused(fs::remove_dir(dir.join("work")));
    let removed = rustix::fs::unlinkat(CWD, dir.join(".marker"), AtFlags::empty());
    assert_eq!(removed, Err(Errno::NOENT));
    let unnamed = OFlags::TMPFILE | OFlags::WRONLY;
    let unnamed = rustix::fs::open(&dir, unnamed, Mode::RUSR);
    assert_eq!(unnamed.err(), Some(Errno::ROFS));
    // Nor what it is like.
    refused(fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)));
    refused(std::os::unix::fs::chown(&dir, Some(7), None));
    let set = rustix::fs::setxattr(&dir, c"user.a", b"b", XattrFlags::empty());
    assert_eq!(set, Err(Errno::ROFS));

    assert_eq!(
        fs::metadata(&host).unwrap().permissions(),
        before.permissions()
    );
    let mut names: Vec<_> = fs::read_dir(&host)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, [".marker", "fs", "link", "work"]);
    assert_eq!(fs::read(host.join("fs/file")).unwrap(), b"mine");
}

#[test]
fn an_overlay_writes_in_what_lies_there() {
    for budget in [1000, 2] {
        let Some(mount) = Mount::new(budget) else {
            return;
        };
        let host = snapshot(&mount);
        let dir = mount.guest(LAYERS);
        let lower = mount.guest(SHARED).join("lower");
        fs::create_dir_all(lower.join("gone")).unwrap();
        fs::write(lower.join("file"), "low").unwrap();
        let merged = mount.guest(SHARED).join("merged");
        fs::create_dir(&merged).unwrap();
        let options = CString::new(format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            dir.join("fs").display(),
            dir.join("work").display()
        ))
        .unwrap();
        let flags = MountFlags::empty();
        rustix::mount::mount("overlay", &merged, "overlay", flags, &*options).unwrap();
        assert_eq!(fs::read(merged.join("file")).unwrap(), b"low");
        fs::write(merged.join("file"), "high").unwrap();
        fs::rename(merged.join("file"), merged.join("moved")).unwrap();
        fs::remove_dir(merged.join("gone")).unwrap();
        fs::create_dir(merged.join("new")).unwrap();
        rustix::mount::unmount(&merged, UnmountFlags::empty()).unwrap();

        // As the snapshotter's layer has it.
        let layer = host.join("fs");
        assert_eq!(fs::read(layer.join("moved")).unwrap(), b"high");
        assert!(layer.join("new").is_dir());
        let whiteout = |path: &Path| {
            let kind = fs::symlink_metadata(path).unwrap().file_type();
            assert!(kind.is_char_device(), "{}", path.display());
        };
        whiteout(&layer.join("gone"));
        whiteout(&layer.join("file"));
        assert_eq!(
            fs::read(host.join(".marker")).unwrap(),
            b"the snapshotter's"
        );
    }
}
