//! What is in a directory, as the agent is told it.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use husk_protocol::agent::VolumeEntry;
use husk_protocol::limit;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, readlinkat, statat};
use rustix::io::Errno;

/// Most bytes of content and names: what fits in one message to the agent.
const BYTES: usize = limit::MESSAGE_BYTES / 2;

/// Most entries. Each may take a page of the guest's memory.
const ENTRIES: usize = 4_000;

/// What an entry costs beside its content, bytes.
const ENTRY_BYTES: usize = 64;

/// Directories in directories at most.
const DEPTH: usize = 16;

/// How often one looks again when things have changed meanwhile.
const ATTEMPTS: usize = 5;

/// The link that says which version of the files holds: the kubelet makes another
/// directory and then swaps it.
const VERSION: &str = "..data";

/// Why there is no snapshot.
enum Failed {
    /// More than the agent gets, or something else than files.
    NotForCopies,
    Io(io::Error),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Errno> for Failed {
    fn from(error: Errno) -> Self {
        match error {
            // Something else has come to stand there.
            Errno::LOOP | Errno::NOTDIR => Self::NotForCopies,
            error => Self::Io(error.into()),
        }
    }
}

/// What tells a directory from all others as long as it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirectoryId {
    device: u64,
    inode: u64,
}

impl DirectoryId {
    /// Of what is at `path`.
    ///
    /// # Errors
    /// Nothing is there.
    pub fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

/// All that is in `directory`, itself first, parents before what is in them, as
/// long as it is the one of this `id`: nobody shall have us read another by what
/// they put in its place or into it.
/// None: that is more than the agent gets, or is something else than files,
/// directories and links. Blocks.
///
/// # Errors
/// It cannot be read.
pub fn snapshot(directory: &Path, id: DirectoryId) -> io::Result<Option<Vec<VolumeEntry>>> {
    let mut attempts = 1;
    loop {
        let mut entries = Entries::default();
        let whole = open(directory, id)
            .map_err(Failed::Io)
            .and_then(|root| entries.add_directory(&root, "", 0).map(|()| root))
            .and_then(|root| entries.are_one_version(&root));
        match whole {
            Ok(is_one) if is_one || attempts == ATTEMPTS => return Ok(Some(entries.list)),
            // Changed while we looked; when it is gone for good, it stays so.
            Ok(_) => attempts += 1,
            Err(Failed::Io(error))
                if error.kind() == io::ErrorKind::NotFound && attempts < ATTEMPTS =>
            {
                attempts += 1;
            }
            Err(Failed::NotForCopies) => return Ok(None),
            Err(Failed::Io(error)) => return Err(error),
        }
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

fn open(directory: &Path, id: DirectoryId) -> io::Result<File> {
    let root = File::from(openat(CWD, directory, DIRECTORY, Mode::empty())?);
    let metadata = root.metadata()?;
    let found = DirectoryId {
        device: metadata.dev(),
        inode: metadata.ino(),
    };
    match found == id {
        true => Ok(root),
        false => Err(io::Error::other("another directory is in its place")),
    }
}

#[derive(Default)]
struct Entries {
    list: Vec<VolumeEntry>,
    bytes: usize,
}

impl Entries {
    fn add_directory(&mut self, at: &File, path: &str, depth: usize) -> Result<(), Failed> {
        if depth > DEPTH {
            return Err(Failed::NotForCopies);
        }
        self.push(entry(path, &at.metadata()?))?;
        let mut names = Vec::new();
        for found in Dir::read_from(at)? {
            let found = found?;
            let name = found.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            names.push(text(name)?);
            if names.len() > ENTRIES {
                return Err(Failed::NotForCopies);
            }
        }
        // The same files give the same list.
        names.sort_unstable();
        for name in names {
            let path = match path {
                "" => name.clone(),
                path => format!("{path}/{name}"),
            };
            self.add(at, &name, &path, depth + 1)?;
        }
        Ok(())
    }

    fn add(&mut self, at: &File, name: &str, path: &str, depth: usize) -> Result<(), Failed> {
        let found = statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::Directory => {
                let directory = openat(at, name, DIRECTORY, Mode::empty())?;
                self.add_directory(&File::from(directory), path, depth)
            }
            FileType::Symlink => {
                let target = text(readlinkat(at, name, Vec::new())?.to_bytes())?;
                self.push(VolumeEntry {
                    path: path.to_owned(),
                    mode: found.st_mode,
                    uid: found.st_uid,
                    gid: found.st_gid,
                    target,
                    ..VolumeEntry::default()
                })
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = File::from(openat(at, name, flags, Mode::empty())?);
                let metadata = file.metadata()?;
                if !metadata.is_file() {
                    return Err(Failed::NotForCopies);
                }
                let mut entry = entry(path, &metadata);
                entry.content = self.content(file, &metadata)?;
                self.push(entry)
            }
            _ => Err(Failed::NotForCopies),
        }
    }

    fn push(&mut self, entry: VolumeEntry) -> Result<(), Failed> {
        self.bytes += ENTRY_BYTES + entry.path.len() + entry.target.len() + entry.content.len();
        self.list.push(entry);
        match self.bytes > BYTES || self.list.len() > ENTRIES {
            true => Err(Failed::NotForCopies),
            false => Ok(()),
        }
    }

    fn content(&self, file: File, metadata: &Metadata) -> Result<Vec<u8>, Failed> {
        let left = BYTES.saturating_sub(self.bytes) as u64;
        if metadata.len() > left {
            return Err(Failed::NotForCopies);
        }
        let mut content = Vec::new();
        file.take(left).read_to_end(&mut content)?;
        Ok(content)
    }

    /// Nobody has swapped versions meanwhile.
    fn are_one_version(&self, root: &File) -> Result<bool, Failed> {
        let entry = |path: &str| self.list.iter().find(|entry| entry.path == path);
        let noted = entry(VERSION).map(|entry| entry.target.as_str());
        let is_there = noted.is_none_or(|target| target.contains('/') || entry(target).is_some());
        let now = match readlinkat(root, VERSION, Vec::new()) {
            Ok(target) => Some(text(target.to_bytes())?),
            Err(Errno::NOENT | Errno::INVAL) => None,
            Err(error) => return Err(error.into()),
        };
        let noted = noted.filter(|target| !target.is_empty());
        Ok(is_there && noted == now.as_deref())
    }
}

fn entry(path: &str, metadata: &Metadata) -> VolumeEntry {
    VolumeEntry {
        path: path.to_owned(),
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        ..VolumeEntry::default()
    }
}

/// The schema's names are text.
fn text(name: &[u8]) -> Result<String, Failed> {
    let name = std::str::from_utf8(name).map_err(|_| Failed::NotForCopies)?;
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn look(directory: &Path) -> io::Result<Option<Vec<VolumeEntry>>> {
        snapshot(directory, DirectoryId::of(directory)?)
    }

    #[test]
    fn lists_parents_first() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("..v1")).unwrap();
        fs::write(at("..v1/key"), "value").unwrap();
        symlink("..v1", at("..data")).unwrap();
        symlink("..data/key", at("key")).unwrap();
        let entries = look(dir.path()).unwrap().unwrap();
        let told: Vec<_> = entries
            .iter()
            .map(|entry| (&*entry.path, &*entry.target, &*entry.content))
            .collect();
        let none: &[u8] = b"";
        assert_eq!(
            told,
            [
                ("", "", none),
                ("..data", "..v1", none),
                ("..v1", "", none),
                ("..v1/key", "", &b"value"[..]),
                ("key", "..data/key", none),
            ]
        );
        assert_eq!(entries[0].mode & libc::S_IFMT, libc::S_IFDIR);
        assert_eq!(entries[3].mode & libc::S_IFMT, libc::S_IFREG);
    }

    #[test]
    fn leaves_what_is_too_much_or_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let large = dir.path().join("large");
        fs::write(&large, vec![0; BYTES + 1]).unwrap();
        assert!(look(dir.path()).unwrap().is_none());
        fs::write(&large, "small").unwrap();
        assert!(look(dir.path()).unwrap().is_some());
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        assert!(look(dir.path()).unwrap().is_none());
        let gone = dir.path().join("gone");
        assert_eq!(look(&gone).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_takes_its_place_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, other) = (dir.path().join("v"), dir.path().join("other"));
        for path in [&volume, &other] {
            fs::create_dir(path).unwrap();
        }
        fs::write(other.join("secret"), "x").unwrap();
        let id = DirectoryId::of(&volume).unwrap();
        assert_eq!(snapshot(&volume, id).unwrap().unwrap().len(), 1);
        // Links in it are told as what they are.
        symlink(&other, volume.join("link")).unwrap();
        let entries = snapshot(&volume, id).unwrap().unwrap();
        assert_eq!(entries[1].target, other.to_str().unwrap());
        assert_eq!(entries.len(), 2);
        fs::rename(&volume, dir.path().join("aside")).unwrap();
        fs::rename(&other, &volume).unwrap();
        assert!(snapshot(&volume, id).is_err());
        fs::rename(&volume, &other).unwrap();
        symlink(&other, &volume).unwrap();
        assert!(snapshot(&volume, id).is_err());
    }

    #[test]
    fn versions_are_not_mixed() {
        let dir = tempfile::tempdir().unwrap();
        let version = |name: &str| {
            let at = dir.path().join(name);
            fs::create_dir(&at).unwrap();
            fs::write(at.join("key"), name).unwrap();
            symlink(name, dir.path().join("new")).unwrap();
            fs::rename(dir.path().join("new"), dir.path().join("..data")).unwrap();
        };
        version("..v0");
        let id = DirectoryId::of(dir.path()).unwrap();
        let path = dir.path().to_owned();
        let reader = std::thread::spawn(move || {
            let mut seen = 0;
            while !path.join("done").exists() {
                // All attempts may find a name gone.
                let Ok(Some(entries)) = snapshot(&path, id) else {
                    continue;
                };
                let find = |path: &str| entries.iter().find(|entry| entry.path == path);
                let target = &find("..data").unwrap().target;
                assert!(find(&format!("{target}/key")).is_some(), "{entries:?}");
                seen += 1;
            }
            seen
        });
        for number in 1..100 {
            version(&format!("..v{number}"));
            fs::remove_dir_all(dir.path().join(format!("..v{}", number - 1))).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(3));
        }
        fs::write(dir.path().join("done"), "").unwrap();
        assert!(reader.join().unwrap() > 0);
    }
}
