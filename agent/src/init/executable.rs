//! Finds the program to run. The texts are those that container tools know:
//! several of them tell exit codes 126 and 127 apart by them.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};

/// The program can't be run.
#[derive(Debug, thiserror::Error)]
pub enum ExecutableError {
    #[error("exec: {name:?}: executable file not found in $PATH")]
    NotInPath { name: String },
    #[error("exec: {name:?}: stat {name}: {}", lower(.errno))]
    Missing { name: String, errno: Errno },
    #[error("exec: {name:?}: {}", lower(.errno))]
    NotExecutable { name: String, errno: Errno },
    #[error("exec {path}: {}", lower(.errno))]
    Refused { path: String, errno: Errno },
    #[error("process.args is empty")]
    NoArguments,
}

/// An error number; the line that names it tells its text.
#[derive(Debug)]
pub struct Errno(i32);

impl ExecutableError {
    /// What execve(2) answered.
    pub fn refused(path: &Path, error: &io::Error) -> Self {
        Self::Refused {
            path: path.display().to_string(),
            errno: Errno(error.raw_os_error().unwrap_or(libc::EIO)),
        }
    }

    /// Whether there is no such program, rather than one that can't be run.
    pub fn is_missing(&self) -> bool {
        match self {
            Self::NotInPath { .. } | Self::Missing { .. } => true,
            Self::Refused { errno, .. } => errno.0 == libc::ENOENT,
            Self::NotExecutable { .. } | Self::NoArguments => false,
        }
    }
}

/// As libc words it, without the number and the capital.
fn lower(errno: &Errno) -> String {
    let text = io::Error::from_raw_os_error(errno.0).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}

/// A file, by whatever name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// This program's own.
    pub fn own() -> io::Result<Self> {
        Ok(Self::of(&fs::metadata("/proc/self/exe")?))
    }

    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// Finds what `name` means with this `PATH`, seen as the present user. It is
/// not to be `own`, which a container can name as /proc/self/exe.
pub fn find(name: &str, path: Option<&str>, own: FileId) -> Result<PathBuf, ExecutableError> {
    if name.contains('/') {
        return match check(Path::new(name), own) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(errno) if errno == libc::ENOENT || errno == libc::ENOTDIR => {
                Err(ExecutableError::Missing {
                    name: name.to_owned(),
                    errno: Errno(errno),
                })
            }
            Err(errno) => Err(ExecutableError::NotExecutable {
                name: name.to_owned(),
                errno: Errno(errno),
            }),
        };
    }
    let directories = path.unwrap_or_default().split(':');
    let candidates = directories
        // A directory relative to the working one is nobody's intention.
        .filter(|directory| directory.starts_with('/'))
        .map(|directory| Path::new(directory).join(name));
    for candidate in candidates {
        if !name.is_empty() && check(&candidate, own).is_ok() {
            return Ok(candidate);
        }
    }
    Err(ExecutableError::NotInPath {
        name: name.to_owned(),
    })
}

fn check(path: &Path, own: FileId) -> Result<(), i32> {
    let metadata = fs::metadata(path).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
    if metadata.is_dir() {
        return Err(libc::EISDIR);
    }
    if FileId::of(&metadata) == own {
        return Err(libc::EACCES);
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(|errno| errno.raw_os_error())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn own() -> FileId {
        FileId::own().unwrap()
    }

    #[test]
    fn this_program_is_none_to_run() {
        let error = find("/proc/self/exe", None, own()).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"exec: "/proc/self/exe": permission denied"#
        );
    }

    #[test]
    fn errors_read_as_tools_expect_them() {
        let directory = tempfile::tempdir().unwrap();
        let plain = directory.path().join("plain");
        fs::write(&plain, "").unwrap();
        fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
        let text = |name: &str, path| find(name, path, own()).unwrap_err().to_string();
        assert_eq!(
            text("foo", Some("/bin")),
            r#"exec: "foo": executable file not found in $PATH"#
        );
        assert_eq!(
            text("sh", None),
            r#"exec: "sh": executable file not found in $PATH"#
        );
        assert_eq!(
            text("", Some("/")),
            r#"exec: "": executable file not found in $PATH"#
        );
        assert_eq!(
            text("/no/foo", None),
            r#"exec: "/no/foo": stat /no/foo: no such file or directory"#
        );
        assert_eq!(text("/tmp", None), r#"exec: "/tmp": is a directory"#);
        let plain = plain.to_str().unwrap();
        assert_eq!(
            text(plain, None),
            format!("exec: {plain:?}: permission denied")
        );
    }

    #[test]
    fn programs_are_found_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("sh");
        fs::write(&program, "").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("/nowhere:.:{}:/bin", directory.path().display());
        assert_eq!(find("sh", Some(&path), own()).unwrap(), program);
        assert_eq!(find("/bin/sh", None, own()).unwrap(), Path::new("/bin/sh"));
    }
}
