//! What the files that guests boot from were when they were last hashed, so that a
//! boot need not hash them again: `verified` beside the templates, on tmpfs.
//!
//! A line a file: its hash, and what tells it from others and from itself as it was
//! before. It is trusted as the templates are: where nobody but the shim's user can
//! have written it. What is no such line is as good as none.

use std::fs::{DirBuilder, File, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock, openat, renameat, unlinkat};

use crate::sums::{Hash, identity};

/// Its name below `template_dir`.
pub const FILE: &str = "verified";

/// What [`FILE`] is before it is complete.
const NEW_FILE: &str = "verified.new";

/// Most files that are known; a node has two or three, and each upgrade brings others.
const MOST: usize = 16;

/// Most that is read of it, bytes.
const LONGEST: u64 = 8 << 10;

/// What was written to less than that ago may be written to again without another
/// time of change: file systems count in ticks, some in seconds.
const SETTLED: Duration = Duration::from_secs(2);

/// The record of a node.
#[derive(Clone, Debug)]
pub struct Verified {
    dir: PathBuf,
}

impl Verified {
    /// The one in this directory, written or not.
    pub fn new(dir: &Path) -> Self {
        let dir = dir.to_owned();
        Self { dir }
    }

    /// What a file was, if it has been hashed since it was last changed.
    pub fn hash_of(&self, file: &Metadata) -> Option<Hash> {
        let dir = self.open().ok()?;
        let wanted = identity(file);
        let lines = lines(&dir);
        let mut known = lines.iter().filter_map(|line| parse(line));
        let (hash, _) = known.find(|(_, identity)| *identity == wanted)?;
        Some(hash)
    }

    /// Notes what a file is, unless it was changed only just now, or somebody else is
    /// noting something.
    ///
    /// # Errors
    /// The directory is not for the user alone, or the file system refuses.
    pub fn note(&self, file: &Metadata, hash: Hash) -> io::Result<()> {
        if !is_settled(file) {
            return Ok(());
        }
        let dir = match self.open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut builder = DirBuilder::new();
                builder.recursive(true).mode(0o700).create(&self.dir)?;
                self.open()?
            }
            opened => opened?,
        };
        // Who does not get it hashes once more next time.
        if flock(&dir, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(());
        }
        let mut lines = lines(&dir);
        let identity = identity(file);
        lines.retain(|line| parse(line).is_some_and(|(_, other)| other != identity));
        lines.push(format!("{hash} {identity}"));
        let text: String = lines
            .iter()
            .skip(lines.len().saturating_sub(MOST))
            .map(|line| format!("{line}\n"))
            .collect();
        // Of one that was killed.
        let _ = unlinkat(dir.as_fd(), NEW_FILE, AtFlags::empty());
        let how = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mut new = File::from(openat(
            dir.as_fd(),
            NEW_FILE,
            how,
            Mode::from_raw_mode(0o600),
        )?);
        new.write_all(text.as_bytes())?;
        renameat(dir.as_fd(), NEW_FILE, dir.as_fd(), FILE)?;
        Ok(())
    }

    fn open(&self) -> io::Result<File> {
        let dir = File::open(&self.dir)?;
        trusted(&dir.metadata()?)?;
        Ok(dir)
    }
}

/// What it says, of which nothing is checked; nothing where it is not to be trusted.
fn lines(dir: &File) -> Vec<String> {
    let read = || {
        let how = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(openat(dir.as_fd(), FILE, how, Mode::empty())?);
        trusted(&file.metadata()?)?;
        let mut text = String::new();
        file.take(LONGEST).read_to_string(&mut text)?;
        io::Result::Ok(text)
    };
    let text = read().unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn parse(line: &str) -> Option<(Hash, &str)> {
    let (hash, identity) = line.split_once(' ')?;
    Some((Hash::parse(hash)?, identity))
}

/// Every later change shows.
fn is_settled(file: &Metadata) -> bool {
    let changed = u64::try_from(file.ctime()).map(Duration::from_secs);
    let since = |changed| SystemTime::now().duration_since(UNIX_EPOCH + changed);
    matches!(changed.map(since), Ok(Ok(since)) if since > SETTLED)
}

/// Nobody but this user, who is root, can have put it there.
///
/// # Errors
/// Somebody else can.
pub fn trusted(file: &Metadata) -> io::Result<()> {
    let user = rustix::process::geteuid().as_raw();
    match file.uid() == user && file.mode() & 0o022 == 0 {
        true => Ok(()),
        false => Err(io::Error::other("others can write to it")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A file that was changed last when it was: none is settled that a test has made.
    fn old_file() -> Metadata {
        let old = fs::metadata("/proc/self/exe").unwrap();
        match is_settled(&old) {
            true => old,
            false => fs::metadata("/bin/sh").unwrap(),
        }
    }

    fn hash(digit: char) -> Hash {
        Hash::parse(&digit.to_string().repeat(64)).unwrap()
    }

    #[test]
    fn what_was_hashed_is_known_until_it_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let record = Verified::new(&dir.path().join("a/b"));
        let (file, one) = (old_file(), hash('1'));
        assert_eq!(record.hash_of(&file), None);
        record.note(&file, one).unwrap();
        assert_eq!(record.hash_of(&file), Some(one));
        assert_eq!(record.hash_of(&fs::metadata("/etc/passwd").unwrap()), None);
        record.note(&file, hash('2')).unwrap();
        assert_eq!(record.hash_of(&file), Some(hash('2')));
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&record.dir), 0o700);
        assert_eq!(mode(&record.dir.join(FILE)), 0o600);
        // What was changed just now may be changed again within the same tick.
        let young = dir.path().join("young");
        fs::write(&young, "x").unwrap();
        let young = fs::metadata(young).unwrap();
        record.note(&young, one).unwrap();
        assert_eq!(record.hash_of(&young), None);
        let names = fs::read_dir(&record.dir).unwrap();
        assert_eq!(names.count(), 1);
    }

    #[test]
    fn garbage_is_as_good_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let record = Verified::new(dir.path());
        fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        let (file, one) = (old_file(), hash('1'));
        let path = dir.path().join(FILE);
        let identity = identity(&file);
        for garbage in [
            b"\xff\xfe".to_vec(),
            b"\n \n1 2\n".to_vec(),
            identity.clone().into_bytes(),
            format!("11 {identity}\n").into_bytes(),
            format!("{one} {identity}0\n").into_bytes(),
            vec![b'x'; 1 << 20],
        ] {
            fs::write(&path, &garbage).unwrap();
            assert_eq!(record.hash_of(&file), None);
            record.note(&file, one).unwrap();
            assert_eq!(record.hash_of(&file), Some(one));
        }
        // It stays small, and knows the latest.
        for at in 0..100 {
            let mut text = fs::read_to_string(&path).unwrap();
            text.insert_str(0, &format!("{one} {at}\n"));
            fs::write(&path, text).unwrap();
            record.note(&file, one).unwrap();
            assert!(fs::read_to_string(&path).unwrap().lines().count() <= MOST);
            assert_eq!(record.hash_of(&file), Some(one));
        }
        // Left by one that was killed.
        fs::write(dir.path().join(NEW_FILE), "half").unwrap();
        record.note(&file, hash('3')).unwrap();
        assert_eq!(record.hash_of(&file), Some(hash('3')));
        assert!(!dir.path().join(NEW_FILE).exists());
    }

    #[test]
    fn only_what_nobody_else_writes_is_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let record = Verified::new(dir.path());
        let (file, one) = (old_file(), hash('1'));
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        };
        mode(dir.path(), 0o1777);
        assert!(record.note(&file, one).is_err());
        mode(dir.path(), 0o755);
        record.note(&file, one).unwrap();
        mode(dir.path(), 0o1777);
        assert_eq!(record.hash_of(&file), None);
        mode(dir.path(), 0o755);
        assert_eq!(record.hash_of(&file), Some(one));
        let path = dir.path().join(FILE);
        for others in [0o620, 0o602] {
            mode(&path, others);
            assert_eq!(record.hash_of(&file), None);
        }
        mode(&path, 0o600);
        let elsewhere = dir.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        symlink(&elsewhere, &path).unwrap();
        assert_eq!(record.hash_of(&file), None, "a link");
        record.note(&file, one).unwrap();
        assert_eq!(record.hash_of(&file), Some(one));
        assert!(elsewhere.exists());
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(1), None).unwrap();
            assert_eq!(record.hash_of(&file), None);
        }
    }

    #[test]
    fn several_note_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let record = Verified::new(dir.path());
        let (file, one) = (old_file(), hash('1'));
        record.note(&file, one).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        record.note(&file, one).unwrap();
                        assert_eq!(record.hash_of(&file), Some(one));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
