//! What is in a directory, as the agent is told it.

use std::fs::{self, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use husk_protocol::agent::VolumeEntry;
use husk_protocol::limit;

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

/// All that is in `directory`, itself first, parents before what is in them.
/// None: that is more than the agent gets, or is something else than files,
/// directories and links. Blocks.
///
/// # Errors
/// It cannot be read.
pub fn snapshot(directory: &Path) -> io::Result<Option<Vec<VolumeEntry>>> {
    let mut attempts = 1;
    loop {
        let mut entries = Entries::default();
        match entries.add(directory, "", 0) {
            Ok(()) => return Ok(Some(entries.list)),
            Err(Failed::NotForCopies) => return Ok(None),
            // Changed while we looked; when it is gone for good, it stays so.
            Err(Failed::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                if attempts == ATTEMPTS {
                    return Err(error);
                }
                attempts += 1;
            }
            Err(Failed::Io(error)) => return Err(error),
        }
    }
}

#[derive(Default)]
struct Entries {
    list: Vec<VolumeEntry>,
    bytes: usize,
}

impl Entries {
    fn add(&mut self, at: &Path, name: &str, depth: usize) -> Result<(), Failed> {
        let metadata = fs::symlink_metadata(at)?;
        let kind = metadata.file_type();
        let mut entry = VolumeEntry {
            path: name.to_owned(),
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
            ..VolumeEntry::default()
        };
        if kind.is_symlink() {
            entry.target = text(fs::read_link(at)?.into_os_string())?;
        } else if kind.is_file() {
            entry.content = self.content(at, &metadata)?;
        } else if !kind.is_dir() || depth > DEPTH {
            return Err(Failed::NotForCopies);
        }
        self.bytes += ENTRY_BYTES + name.len() + entry.target.len() + entry.content.len();
        self.list.push(entry);
        if self.bytes > BYTES || self.list.len() > ENTRIES {
            return Err(Failed::NotForCopies);
        }
        if !kind.is_dir() {
            return Ok(());
        }
        let mut names = Vec::new();
        for found in fs::read_dir(at)? {
            names.push(text(found?.file_name())?);
            if names.len() > ENTRIES {
                return Err(Failed::NotForCopies);
            }
        }
        // The same files give the same list.
        names.sort_unstable();
        for below in names {
            let path = match name {
                "" => below.clone(),
                name => format!("{name}/{below}"),
            };
            self.add(&at.join(below), &path, depth + 1)?;
        }
        Ok(())
    }

    fn content(&self, at: &Path, metadata: &Metadata) -> Result<Vec<u8>, Failed> {
        let left = BYTES.saturating_sub(self.bytes) as u64;
        if metadata.len() > left {
            return Err(Failed::NotForCopies);
        }
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(at)?;
        let mut content = Vec::new();
        file.take(left).read_to_end(&mut content)?;
        Ok(content)
    }
}

/// The schema's names are text.
fn text(name: std::ffi::OsString) -> Result<String, Failed> {
    name.into_string().map_err(|_| Failed::NotForCopies)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn lists_parents_first() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("..v1")).unwrap();
        fs::write(at("..v1/key"), "value").unwrap();
        symlink("..v1", at("..data")).unwrap();
        symlink("..data/key", at("key")).unwrap();
        let entries = snapshot(dir.path()).unwrap().unwrap();
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
        assert!(snapshot(dir.path()).unwrap().is_none());
        fs::write(&large, "small").unwrap();
        assert!(snapshot(dir.path()).unwrap().is_some());
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        assert!(snapshot(dir.path()).unwrap().is_none());
        let gone = dir.path().join("gone");
        assert_eq!(snapshot(&gone).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
