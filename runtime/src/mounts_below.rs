//! What is mounted below a directory of the node, for telling whether two copies
//! of it hold the same.

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A digest of the mounts below `path`, as this thread sees them, but for those
/// in `except`; 0 when there are none.
///
/// # Errors
/// There is no such path, or no table of mounts.
pub fn mounts_below(path: &Path, except: &Path) -> io::Result<u64> {
    let path = fs::canonicalize(path)?;
    let table = fs::read("/proc/thread-self/mountinfo")?;
    let table = String::from_utf8_lossy(&table);
    // proc_pid_mountinfo(5): device, root and mount point are fields 3 to 5.
    let below: Vec<_> = table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            let what = (fields.next()?, fields.next()?);
            let at = unescaped(fields.next()?);
            let at = Path::new(OsStr::from_bytes(&at));
            let below = at.strip_prefix(&path).ok()?;
            let counts = !below.as_os_str().is_empty() && !at.starts_with(except);
            counts.then(|| (what, below.to_owned()))
        })
        .collect();
    if below.is_empty() {
        return Ok(0);
    }
    let mut digest = DefaultHasher::new();
    below.hash(&mut digest);
    Ok(digest.finish())
}

/// A text of mountinfo, in which some bytes are three octal digits.
pub fn unescaped(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let value = digits
            .and_then(|digits| str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(value.unwrap_or(*first));
        rest = match value {
            Some(_) => &after[3..],
            None => after,
        };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_how_the_kernel_writes_paths() {
        for (text, expected) in [
            ("/plain", "/plain"),
            ("/a\\040b\\134c", "/a b\\c"),
            ("/end\\04", "/end\\04"),
            ("\\", "\\"),
        ] {
            assert_eq!(unescaped(text), expected.as_bytes(), "{text}");
        }
    }

    #[test]
    fn tells_only_what_is_below() {
        // Every machine has something there.
        let all = mounts_below(Path::new("/"), Path::new("/no such place")).unwrap();
        let others = mounts_below(Path::new("/"), Path::new("/proc")).unwrap();
        assert!(all != 0 && all != others);
        assert_eq!(mounts_below(Path::new("/"), Path::new("/")).unwrap(), 0);
        let nowhere = Path::new("/no such place");
        assert!(mounts_below(nowhere, nowhere).is_err());
    }
}
