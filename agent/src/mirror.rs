//! Volumes whose files the shim sends. Each is a file system of its own, written
//! here alone and only read by containers. A change is made as the kubelet makes
//! it: what is new comes first, then links are swapped, then what is gone goes.
//! Whoever watches (inotify) sees just that.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use husk_protocol::agent::VolumeEntry;
use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Uid, chmodat, chownat, mkdirat, openat, openat2,
    renameat, symlinkat, unlinkat,
};
use rustix::io::{Errno, write};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::error::{Doing, Error, OsError};
use crate::lock::lock;
use crate::sandbox::check_id;

/// Options of their file systems. A message bounds what comes at once, a file of
/// a byte takes a page, and during a swap there are two versions.
const OPTIONS: &std::ffi::CStr = c"size=64m,mode=0755";

/// Under this name a file or link is made that then takes another's place.
const TEMPORARY: &str = "..husk_tmp";

/// All of them.
#[derive(Debug)]
pub struct Mirrors {
    base: PathBuf,
    volumes: Mutex<HashMap<String, Volume>>,
}

/// What is known of a volume.
#[derive(Debug)]
enum Volume {
    /// Its files.
    Is(Tree),
    /// A change has failed: nobody knows what is there.
    Unknown,
    /// It has gone for good. A request that was overtaken does not bring it back:
    /// ids are not used again.
    Removed,
}

/// What is in a volume, by path; parents sort before what is in them.
type Tree = BTreeMap<String, Node>;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    kind: Kind,
    mode: u32,
    uid: u32,
    gid: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Directory,
    File(Vec<u8>),
    Link(String),
}

impl Mirrors {
    /// None yet; they will be in directories of `base`.
    pub fn new(base: impl Into<PathBuf>) -> Self {
        Self {
            base: base.into(),
            volumes: Mutex::default(),
        }
    }

    /// Makes the volume, or changes it. Blocks.
    pub fn set(&self, id: &str, entries: Vec<VolumeEntry>) -> Result<(), Error> {
        check_id(id)?;
        let new = tree(entries)?;
        let mut volumes = lock(&self.volumes);
        let path = self.base.join(id);
        let old = match volumes.insert(id.to_owned(), Volume::Unknown) {
            Some(Volume::Is(old)) => old,
            Some(Volume::Unknown) => {
                clear(&path);
                Tree::new()
            }
            Some(Volume::Removed) => {
                volumes.insert(id.to_owned(), Volume::Removed);
                return Err(Error::Invalid {
                    field: "volume_id",
                    reason: format!("volume {id} has been removed"),
                });
            }
            None => {
                make(&path).inspect_err(|_| {
                    volumes.remove(id);
                })?;
                Tree::new()
            }
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, &path, flags, Mode::empty()).doing("open", path.display())?;
        change(&root, &old, &new)?;
        volumes.insert(id.to_owned(), Volume::Is(new));
        Ok(())
    }

    /// Unmounts the volume, if it has been made; it will not be any more. Blocks.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        check_id(id)?;
        let mut volumes = lock(&self.volumes);
        match volumes.insert(id.to_owned(), Volume::Removed) {
            Some(Volume::Is(_) | Volume::Unknown) => {}
            Some(Volume::Removed) | None => return Ok(()),
        }
        let path = self.base.join(id);
        unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .doing("unmount", path.display())?;
        fs::remove_dir(&path).doing("remove", path.display())?;
        Ok(())
    }
}

fn make(path: &Path) -> Result<(), OsError> {
    fs::create_dir_all(path).doing("create", path.display())?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("volume", path, "tmpfs", flags, Some(OPTIONS))
        .doing("mount", path.display())
        .inspect_err(|_| {
            let _ = fs::remove_dir(path);
        })
}

/// Checks what the shim has sent.
fn tree(entries: Vec<VolumeEntry>) -> Result<Tree, Error> {
    let invalid = |path: &str, reason: &str| Error::Invalid {
        field: "entries",
        reason: format!("{path:?}: {reason}"),
    };
    let mut tree = Tree::new();
    for entry in entries {
        let path = entry.path;
        let plain = |name: &str| !matches!(name, "" | "." | ".." | TEMPORARY);
        if !path.is_empty() && !path.split('/').all(plain) {
            return Err(invalid(&path, "no path in a volume"));
        }
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        let of_directory = |node: &Node| node.kind == Kind::Directory;
        if !path.is_empty() && !tree.get(parent).is_some_and(of_directory) {
            return Err(invalid(&path, "not in a directory that came before"));
        }
        let kind = match entry.mode & libc::S_IFMT {
            libc::S_IFDIR => Kind::Directory,
            libc::S_IFREG if !path.is_empty() => Kind::File(entry.content),
            libc::S_IFLNK if !path.is_empty() => Kind::Link(entry.target),
            _ => return Err(invalid(&path, "no file, directory or link")),
        };
        let node = Node {
            kind,
            mode: entry.mode & 0o7777,
            uid: entry.uid,
            gid: entry.gid,
        };
        tree.insert(path, node);
    }
    match tree.contains_key("") {
        true => Ok(tree),
        false => Err(invalid("", "the volume itself is missing")),
    }
}

fn change(root: &OwnedFd, old: &Tree, new: &Tree) -> Result<(), OsError> {
    let same_kind = |path: &str, node: &Node| {
        let new = new.get(path);
        new.is_some_and(|new| {
            std::mem::discriminant(&new.kind) == std::mem::discriminant(&node.kind)
        })
    };
    // What makes way for something else has to go first.
    let turned = |path: &&String| new.contains_key(*path) && !same_kind(path, &old[*path]);
    for path in old.keys().rev().filter(turned) {
        let below = format!("{path}/");
        for gone in old.range(below.clone()..).rev() {
            if gone.0.starts_with(&below) {
                remove(root, gone.0, gone.1)?;
            }
        }
        remove(root, path, &old[path])?;
    }
    let is_link = |node: &Node| matches!(node.kind, Kind::Link(_));
    for links in [false, true] {
        for (path, node) in new.iter().filter(|(_, node)| is_link(node) == links) {
            let before = old.get(path).filter(|before| same_kind(path, before));
            if before != Some(node) {
                put(root, path, before, node).doing("write", path)?;
            }
        }
    }
    for (path, node) in old.iter().rev() {
        if !new.contains_key(path) {
            remove(root, path, node)?;
        }
    }
    Ok(())
}

fn put(root: &OwnedFd, path: &str, before: Option<&Node>, node: &Node) -> Result<(), Errno> {
    let (uid, gid) = (Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid)));
    let mode = Mode::from_raw_mode(node.mode);
    if path.is_empty() {
        chownat(root, "", uid, gid, AtFlags::EMPTY_PATH)?;
        return chmodat(root, ".", mode, AtFlags::empty());
    }
    let (parent, name) = open_parent(root, path)?;
    let content_is_the_same = before.is_some_and(|before| before.kind == node.kind);
    let at = match before {
        Some(_) if !content_is_the_same => TEMPORARY,
        _ => name,
    };
    match &node.kind {
        _ if content_is_the_same => {}
        Kind::Directory => mkdirat(&parent, at, Mode::RWXU)?,
        Kind::File(content) => write_file(&parent, at, content)?,
        Kind::Link(target) => symlinkat(target.as_str(), &parent, at)?,
    }
    chownat(&parent, at, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    if !matches!(node.kind, Kind::Link(_)) {
        // After the owner, which takes set-id bits away; nobody else writes
        // here, so it is still no link.
        chmodat(&parent, at, mode, AtFlags::empty())?;
    }
    if at != name {
        renameat(&parent, at, &parent, name)?;
    }
    Ok(())
}

fn write_file(parent: &OwnedFd, name: &str, content: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?;
    let mut left = content;
    while !left.is_empty() {
        match write(&file, left) {
            Ok(count) => left = &left[count..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn remove(root: &OwnedFd, path: &str, node: &Node) -> Result<(), OsError> {
    let flags = match node.kind {
        Kind::Directory => AtFlags::REMOVEDIR,
        Kind::File(_) | Kind::Link(_) => AtFlags::empty(),
    };
    let removed = open_parent(root, path).and_then(|(parent, name)| unlinkat(&parent, name, flags));
    match removed {
        // It went with what it lay in.
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
        removed => removed.doing("remove", path),
    }
}

/// The directory that something is in, and its name there.
fn open_parent<'a>(root: &OwnedFd, path: &'a str) -> Result<(OwnedFd, &'a str), Errno> {
    let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let parent = openat2(root, parent, flags, Mode::empty(), resolve)?;
    Ok((parent, name))
}

/// Empties a volume, as far as that goes.
fn clear(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let removed = match is_directory {
            true => fs::remove_dir_all(entry.path()),
            false => fs::remove_file(entry.path()),
        };
        if let Err(error) = removed {
            log::warn!("{}: {error}", entry.path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn entry(path: &str, mode: u32, text: &str) -> VolumeEntry {
        let mut entry = VolumeEntry {
            path: path.to_owned(),
            mode,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            ..VolumeEntry::default()
        };
        match mode & libc::S_IFMT {
            libc::S_IFLNK => entry.target = text.to_owned(),
            _ => entry.content = text.as_bytes().to_vec(),
        }
        entry
    }

    const DIR: u32 = libc::S_IFDIR | 0o755;
    const FILE: u32 = libc::S_IFREG | 0o640;
    const LINK: u32 = libc::S_IFLNK | 0o777;

    fn version(name: &str, value: &str) -> Tree {
        tree(vec![
            entry("", DIR, ""),
            entry(name, DIR, ""),
            entry(&format!("{name}/key"), FILE, value),
            entry("..data", LINK, name),
            entry("key", LINK, "..data/key"),
        ])
        .unwrap()
    }

    fn open(path: &Path) -> OwnedFd {
        openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn swaps_as_the_kubelet_does() {
        let dir = tempfile::tempdir().unwrap();
        let root = open(dir.path());
        let (one, two) = (version("..v1", "old"), version("..v2", "new"));
        change(&root, &Tree::new(), &one).unwrap();
        let key = dir.path().join("key");
        assert_eq!(fs::read_to_string(&key).unwrap(), "old");
        assert_eq!(fs::metadata(&key).unwrap().mode() & 0o7777, 0o640);
        let user_link = fs::symlink_metadata(&key).unwrap().ino();
        change(&root, &one, &two).unwrap();
        assert_eq!(fs::read_to_string(&key).unwrap(), "new");
        assert_eq!(names(dir.path()), ["..data", "..v2", "key"]);
        // What did not change was left alone.
        assert_eq!(fs::symlink_metadata(&key).unwrap().ino(), user_link);
    }

    #[test]
    fn a_request_that_was_overtaken_makes_no_volume() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::new(dir.path());
        mirrors.remove("1").unwrap();
        let late = mirrors.set("1", vec![entry("", DIR, "")]);
        assert!(late.unwrap_err().to_string().contains("has been removed"));
        let again = mirrors.set("1", vec![entry("", DIR, "")]);
        assert!(again.is_err());
        assert_eq!(names(dir.path()), Vec::<String>::new());
        mirrors.remove("1").unwrap();
    }

    #[test]
    fn things_turn_into_others() {
        let dir = tempfile::tempdir().unwrap();
        let root = open(dir.path());
        let one = tree(vec![
            entry("", DIR, ""),
            entry("a", DIR, ""),
            entry("a/b", FILE, "x"),
            entry("a-c", FILE, "x"),
            entry("d", FILE, "x"),
        ]);
        let two = tree(vec![
            entry("", DIR | 0o70, ""),
            entry("a", FILE, "y"),
            entry("a-c", LINK, "d"),
            entry("d", FILE & !0o40, "x"),
        ]);
        let (one, two) = (one.unwrap(), two.unwrap());
        change(&root, &Tree::new(), &one).unwrap();
        change(&root, &one, &two).unwrap();
        assert_eq!(names(dir.path()), ["a", "a-c", "d"]);
        assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "y");
        assert_eq!(fs::read_to_string(dir.path().join("a-c")).unwrap(), "x");
        let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().mode() & 0o7777;
        assert_eq!((mode("."), mode("d")), (0o775, 0o600));
        change(&root, &two, &one).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("a/b")).unwrap(), "x");
    }

    #[test]
    fn nothing_is_written_outside() {
        for path in [
            "..",
            "../x",
            "a/../b",
            "/etc",
            "a//b",
            "missing/x",
            ".",
            TEMPORARY,
        ] {
            let refused = tree(vec![
                entry("", DIR, ""),
                entry("a", DIR, ""),
                entry(path, FILE, ""),
            ]);
            assert!(refused.is_err(), "{path}");
        }
        let below_a_link = vec![
            entry("", DIR, ""),
            entry("a", LINK, "/"),
            entry("a/b", FILE, ""),
        ];
        assert!(tree(below_a_link).is_err());
        assert!(tree(vec![entry("a", FILE, "")]).is_err());
        assert!(tree(vec![entry("", FILE, "")]).is_err());
        assert!(tree(vec![entry("", DIR, ""), entry("p", libc::S_IFIFO, "")]).is_err());

        // A directory that somebody has made a link of.
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let root = open(dir.path());
        let one = tree(vec![entry("", DIR, ""), entry("a", DIR, "")]).unwrap();
        change(&root, &Tree::new(), &one).unwrap();
        fs::remove_dir(dir.path().join("a")).unwrap();
        symlink(outside.path(), dir.path().join("a")).unwrap();
        let two = vec![
            entry("", DIR, ""),
            entry("a", DIR, ""),
            entry("a/b", FILE, ""),
        ];
        assert!(change(&root, &one, &tree(two).unwrap()).is_err());
        assert!(names(outside.path()).is_empty());
    }
}
