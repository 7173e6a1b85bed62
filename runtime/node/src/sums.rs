//! What the files that a guest boots from must be: `SHA256SUMS` beside them, as
//! `sha256sum` writes and checks it.

use std::borrow::Cow;
use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Its name, in the folder of the file that it is asked about.
pub const FILE: &str = "SHA256SUMS";

/// Most that is read of it, bytes.
const LONGEST: u64 = 1 << 20;

/// How much of a file is hashed at once, bytes.
const PIECE: usize = 1 << 16;

/// The SHA-256 of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hash([u8; 32]);

/// What is said of a file beside it.
#[derive(Clone, Debug)]
pub struct Listed {
    path: PathBuf,
    sums: PathBuf,
    /// At least one; all must be true, as for `sha256sum --check`.
    hashes: Vec<Hash>,
}

/// A file that is not known to be what it should be.
#[derive(Debug, thiserror::Error)]
pub enum SumsError {
    /// There is nothing to compare it with.
    #[error(
        "{path} is not booted, as there is no {sums}; for a file of your own, `sha256sum {} > \
         SHA256SUMS` in its folder",
        name(path)
    )]
    Missing {
        /// The file.
        path: PathBuf,
        /// What is to say its hash.
        sums: PathBuf,
    },
    /// Nothing is said about it.
    #[error(
        "{path} is not booted, as {sums} has no line for it; for a file of your own, \
         add its line (sha256sum {})",
        name(path)
    )]
    Unlisted {
        /// The file.
        path: PathBuf,
        /// What is to say its hash.
        sums: PathBuf,
    },
    /// It is another.
    #[error(
        "{path} is not booted, as its sha256 is {found} and in {sums} {expected}; install the \
         package again, or, for a file of your own, replace its line (sha256sum {})",
        name(path)
    )]
    Differs {
        /// The file.
        path: PathBuf,
        /// What says its hash.
        sums: PathBuf,
        /// What it says.
        expected: Hash,
        /// What it is.
        found: Hash,
    },
    /// One of both could not be read to its end.
    #[error("{path} could not be read")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// As lines have it.
fn name(path: &Path) -> Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

impl Hash {
    /// Of 64 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let mut hash = [0; 32];
        let digits = text.as_bytes();
        if digits.len() != 2 * hash.len() {
            return None;
        }
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let [high, low] = [*pair.first()?, *pair.get(1)?].map(|c| char::from(c).to_digit(16));
            *byte = u8::try_from(high? << 4 | low?).ok()?;
        }
        Some(Self(hash))
    }

    /// Of all that a regular file has now, wherever its position is.
    ///
    /// # Errors
    /// It cannot be read, is no regular file, or was written to meanwhile.
    pub fn of(file: &File) -> io::Result<(Self, Metadata)> {
        let before = file.metadata()?;
        if !before.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        let mut digest = Sha256::new();
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        // One that grows for ever has an end here all the same.
        while at < before.size() {
            let count = match file.read_at(&mut piece, at) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let read = piece.get(..count).unwrap_or_default();
            if read.is_empty() {
                break;
            }
            digest.update(read);
            at += count as u64;
        }
        let after = file.metadata()?;
        match identity(&before) == identity(&after) && at == after.size() {
            true => Ok((Self(digest.finalize().into()), after)),
            false => Err(io::Error::other("it is being written to")),
        }
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Listed {
    /// What is said of the file of this name, which may be a link.
    ///
    /// # Errors
    /// Nothing is.
    pub fn of(path: &Path) -> Result<Self, SumsError> {
        let sums = path.with_file_name(FILE);
        let text = match read(&sums) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let path = path.to_owned();
                return Err(SumsError::Missing { path, sums });
            }
            Err(source) => return Err(SumsError::Read { path: sums, source }),
        };
        let name = name(path);
        let lines = text.lines();
        let hashes: Vec<_> = lines.filter_map(|line| listed(line, &name)).collect();
        let path = path.to_owned();
        match hashes.is_empty() {
            true => Err(SumsError::Unlisted { path, sums }),
            false => Ok(Self { path, sums, hashes }),
        }
    }

    /// Whether a hash that the file has is that.
    ///
    /// # Errors
    /// It is another.
    pub fn compare(&self, found: Hash) -> Result<(), SumsError> {
        match self.hashes.iter().find(|expected| **expected != found) {
            None => Ok(()),
            Some(&expected) => Err(SumsError::Differs {
                path: self.path.clone(),
                sums: self.sums.clone(),
                expected,
                found,
            }),
        }
    }

    /// That the file could not be read.
    pub fn unread(&self, source: io::Error) -> SumsError {
        SumsError::Read {
            path: self.path.clone(),
            source,
        }
    }
}

fn read(sums: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(sums)?.take(LONGEST).read_to_string(&mut text)?;
    Ok(text)
}

/// The hash in a line about this file: `HASH  NAME`, with `*` before the name where
/// it was read as binary.
fn listed(line: &str, name: &str) -> Option<Hash> {
    let (hash, rest) = line.split_once(' ')?;
    let about = rest.strip_prefix([' ', '*'])?;
    (about == name).then(|| Hash::parse(hash))?
}

/// Which file it is, as it is: another after every change to it.
pub fn identity(file: &Metadata) -> String {
    format!(
        "{}:{} {} {}.{:09} {}.{:09}",
        file.dev(),
        file.ino(),
        file.size(),
        file.mtime(),
        file.mtime_nsec(),
        file.ctime(),
        file.ctime_nsec()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// printf kernel | sha256sum
    const KERNEL: &str = "6923dd1bc0460082c5d55a831908c24a282860b7f1cd6c2b79cf1bc8857c639c";

    #[test]
    fn a_file_is_what_is_said_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        fs::write(&path, "kernel").unwrap();
        let file = File::open(&path).unwrap();
        let (hash, metadata) = Hash::of(&file).unwrap();
        assert_eq!(hash.to_string(), KERNEL);
        assert_eq!(Hash::parse(&KERNEL.to_uppercase()), Some(hash));
        assert_eq!(metadata.size(), 6);
        // Whoever gets the descriptor reads it from its beginning.
        let mut text = String::new();
        (&file).read_to_string(&mut text).unwrap();
        assert_eq!(text, "kernel");

        let other = KERNEL.replace("6923", "0000");
        let sums = dir.path().join(FILE);
        let compare = |text: &str| {
            fs::write(&sums, text).unwrap();
            let compared = Listed::of(&path).and_then(|listed| listed.compare(hash));
            compared.map_err(|error| error.to_string())
        };
        for right in [
            format!("{KERNEL}  vmlinux\n"),
            format!("{other}  vmlinux.old\n{KERNEL} *vmlinux"),
            format!("# words\n\n{KERNEL}  vmlinux\n{KERNEL}  vmlinux\n"),
        ] {
            assert_eq!(compare(&right), Ok(()), "{right}");
        }
        let advice = "add its line (sha256sum vmlinux)";
        for none in [
            String::new(),
            format!("{KERNEL}  vmlinux.old\n"),
            format!("{KERNEL} vmlinux\n"),
            format!("{KERNEL}0  vmlinux\n"),
            format!("{}é  vmlinux\n", &KERNEL[..62]),
            format!("{}  vmlinux\n", KERNEL.replace('f', "+")),
        ] {
            let error = compare(&none).unwrap_err();
            assert!(error.contains("has no line for it"), "{none}: {error}");
            assert!(error.ends_with(advice), "{error}");
        }
        let error = compare(&format!("{KERNEL}  vmlinux\n{other}  vmlinux\n")).unwrap_err();
        let words = [
            path.to_str().unwrap(),
            KERNEL,
            &other,
            "replace its line (sha256sum vmlinux)",
        ];
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        fs::remove_file(&sums).unwrap();
        let error = Listed::of(&path).unwrap_err().to_string();
        assert!(error.contains("is not booted, as there is no"), "{error}");
    }

    #[test]
    fn what_has_no_end_is_not_hashed() {
        let error = Hash::of(&File::open("/dev/zero").unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "it is no regular file");
    }

    #[test]
    fn long_files_are_read_to_their_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initramfs.cpio");
        fs::write(&path, vec![b'x'; 300_000]).unwrap();
        let (hash, _) = Hash::of(&File::open(&path).unwrap()).unwrap();
        // head -c 300000 /dev/zero | tr '\0' x | sha256sum
        assert_eq!(
            hash.to_string(),
            "29927e273accc68286005017f7fa6e4f27bddb4db3083ff8b8d4c3667905b7fa"
        );
    }
}
