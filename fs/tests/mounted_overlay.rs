//! An overlay whose layers are all on a served volume, as an engine in a
//! container mounts one.

#![allow(clippy::unwrap_used)]

mod harness;

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::Path;

use harness::{Mount, SHARED};
use rustix::mount::{MountFlags, UnmountFlags};

/// The merged directory; unmounted when dropped.
struct Overlay(std::path::PathBuf);

impl Overlay {
    fn mount(dir: &Path) -> Self {
        let path = |name: &str| dir.join(name).display().to_string();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            path("lower"),
            path("upper"),
            path("work")
        );
        let options = CString::new(options).unwrap();
        let merged = dir.join("merged");
        rustix::mount::mount(
            "overlay",
            &merged,
            "overlay",
            MountFlags::empty(),
            &*options,
        )
        .unwrap();
        Self(merged)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::empty());
    }
}

#[test]
fn an_overlay_keeps_its_books_on_a_volume() {
    for budget in [1000, 2] {
        let Some(mount) = Mount::new(budget) else {
            return;
        };
        let dir = mount.guest(SHARED);
        for name in ["lower/dir", "lower/moved", "upper", "work", "merged"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        fs::write(dir.join("lower/dir/file"), "low").unwrap();
        symlink("file", dir.join("lower/dir/link")).unwrap();

        let overlay = Overlay::mount(&dir);
        let merged = &overlay.0;
        assert_eq!(fs::read(merged.join("dir/file")).unwrap(), b"low");
        fs::write(merged.join("dir/file"), "high").unwrap();
        assert_eq!(fs::read(dir.join("lower/dir/file")).unwrap(), b"low");
        // Noted on a symbolic link, which can have no such attribute on the host.
        fs::rename(merged.join("dir/link"), merged.join("link")).unwrap();
        fs::remove_dir_all(merged.join("dir")).unwrap();
        // Opaque: nothing of the lower one shows.
        fs::create_dir(merged.join("dir")).unwrap();
        fs::write(merged.join("dir/new"), "new").unwrap();
        fs::remove_dir(merged.join("moved")).unwrap();

        // From what is on the volume alone.
        drop(overlay);
        let overlay = Overlay::mount(&dir);
        let names = |path: &str| {
            let entries = fs::read_dir(overlay.0.join(path)).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names("dir"), ["new"]);
        assert_eq!(names(""), ["dir", "link"]);
        let link = fs::read_link(overlay.0.join("link")).unwrap();
        assert_eq!(link, Path::new("file"));
        let whiteout = mount.host(SHARED).join("upper/moved");
        let whiteout = fs::symlink_metadata(whiteout).unwrap();
        assert!(whiteout.file_type().is_char_device());
    }
}
