//! Paths inside a root file system that somebody hostile made: every lookup is
//! confined by the kernel, so no symbolic link leads out of it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2};
use rustix::io::Errno;

use crate::error::{Doing, OsError};

/// As the kernel bounds them.
const LINKS: usize = 40;

/// Another process in the same tree renames faster than we look up.
const RETRIES: usize = 32;

/// Opens a path below `root`, following links within it.
pub fn open(root: &impl AsFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    resolve(root, path, flags, ResolveFlags::empty())
}

/// Opens a path below `root` that has no link in it: ELOOP otherwise.
pub fn open_without_links(root: &impl AsFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    resolve(root, path, flags, ResolveFlags::NO_SYMLINKS)
}

fn resolve(
    root: &impl AsFd,
    path: &Path,
    flags: OFlags,
    more: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | more;
    let mut result = Err(Errno::AGAIN);
    for _ in 0..RETRIES {
        result = openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve);
        if !matches!(result, Err(Errno::AGAIN | Errno::INTR)) {
            break;
        }
    }
    result
}

/// An absolute path without `.`, `..` and doubled slashes.
pub fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Opens a directory below `root`, made when missing.
pub fn ensure_directory(root: &impl AsFd, path: &Path) -> Result<OwnedFd, OsError> {
    let mut links = LINKS;
    ensure_at(root, &clean(path), &mut links).doing("make directory", path.display())
}

fn ensure_at(root: &impl AsFd, path: &Path, links: &mut usize) -> Result<OwnedFd, Errno> {
    match open(root, path, OFlags::PATH | OFlags::DIRECTORY) {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::NOENT);
    };
    let directory = ensure_at(root, parent, links)?;
    match mkdirat(&directory, name, Mode::from(0o755)) {
        Ok(()) => return openat(&directory, name, DIRECTORY, Mode::empty()),
        Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    // Somebody else made it meanwhile, or it is a link to nowhere yet.
    match rustix::fs::readlinkat(&directory, name, Vec::new()) {
        Ok(target) => {
            *links = links.checked_sub(1).ok_or(Errno::LOOP)?;
            let target = Path::new(std::ffi::OsStr::new(
                target.to_str().map_err(|_| Errno::INVAL)?,
            ));
            ensure_at(root, &clean(&parent.join(target)), links)
        }
        Err(Errno::INVAL) => open(root, path, OFlags::PATH | OFlags::DIRECTORY),
        Err(errno) => Err(errno),
    }
}

const DIRECTORY: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Opens a file below `root` as a mount target, made empty when missing.
pub fn ensure_file(root: &impl AsFd, path: &Path) -> Result<OwnedFd, OsError> {
    let path = clean(path);
    let mut links = LINKS;
    ensure_file_at(root, &path, &mut links).doing("make file", path.display())
}

fn ensure_file_at(root: &impl AsFd, path: &Path, links: &mut usize) -> Result<OwnedFd, Errno> {
    match open(root, path, OFlags::PATH) {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::NOENT);
    };
    let directory = ensure_at(root, parent, links)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(&directory, name, flags, Mode::from(0o644)) {
        Ok(_) => openat(
            &directory,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        ),
        Err(Errno::EXIST) => match rustix::fs::readlinkat(&directory, name, Vec::new()) {
            Ok(target) => {
                *links = links.checked_sub(1).ok_or(Errno::LOOP)?;
                let target = Path::new(std::ffi::OsStr::new(
                    target.to_str().map_err(|_| Errno::INVAL)?,
                ));
                ensure_file_at(root, &clean(&parent.join(target)), links)
            }
            Err(Errno::INVAL) => open(root, path, OFlags::PATH),
            Err(errno) => Err(errno),
        },
        Err(errno) => Err(errno),
    }
}

/// Whether an open file is a directory.
pub fn is_directory(fd: &impl AsFd) -> Result<bool, Errno> {
    Ok(FileType::from_raw_mode(fstat(fd)?.st_mode) == FileType::Directory)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let directory = tempfile::tempdir().unwrap();
        let root = fs::File::open(directory.path()).unwrap();
        (directory, root.into())
    }

    #[test]
    fn paths_are_cleaned_without_leaving_the_root() {
        let clean = |path| clean(Path::new(path)).display().to_string();
        assert_eq!(clean("/a//b/./c"), "/a/b/c");
        assert_eq!(clean("../../etc"), "/etc");
        assert_eq!(clean("/a/../../b"), "/b");
        assert_eq!(clean(""), "/");
    }

    #[test]
    fn links_lead_nowhere_outside_of_the_root() {
        let (outside, _) = root();
        let (directory, root) = root();
        symlink(outside.path(), directory.path().join("absolute")).unwrap();
        symlink("../../../../../../tmp", directory.path().join("relative")).unwrap();
        ensure_directory(&root, Path::new("/absolute/deep")).unwrap();
        ensure_file(&root, Path::new("/relative/file")).unwrap();
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        assert!(directory.path().join("tmp/file").is_file());
        let inside = directory
            .path()
            .join(outside.path().strip_prefix("/").unwrap());
        assert!(inside.join("deep").is_dir());
    }

    #[test]
    fn a_ring_of_links_is_an_error() {
        let (directory, root) = root();
        symlink("b", directory.path().join("a")).unwrap();
        symlink("a", directory.path().join("b")).unwrap();
        let error = ensure_directory(&root, Path::new("/a/x")).unwrap_err();
        assert!(error.is(libc::ELOOP), "{error:?}");
        assert!(
            ensure_file(&root, Path::new("/a"))
                .unwrap_err()
                .is(libc::ELOOP)
        );
    }
}
