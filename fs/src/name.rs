//! Names of directory entries as the guest sends them.

use std::ffi::CStr;

use rustix::io::Errno;

/// Longest name of an entry (`NAME_MAX`).
const NAME_BYTES: usize = 255;

/// Longest target of a symbolic link with its NUL (`PATH_MAX`).
const TARGET_BYTES: usize = 4096;

/// One component of a path: not empty, without a slash, neither `.` nor `..`.
/// The only way in which the guest's bytes become a path on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Takes a NUL-terminated name off the front of `bytes`.
    pub fn take(bytes: &mut &'a [u8]) -> Result<Self, Errno> {
        Self::new(take_text(bytes)?)
    }

    /// Checks a name.
    pub fn new(name: &'a CStr) -> Result<Self, Errno> {
        match name.to_bytes() {
            b"" => Err(Errno::NOENT),
            b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > NAME_BYTES => Err(Errno::NAMETOOLONG),
            _ => Ok(Self(name)),
        }
    }

    /// The name as the kernel takes it.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// Takes a NUL-terminated target of a symbolic link off the front of `bytes`.
pub fn take_target<'a>(bytes: &mut &'a [u8]) -> Result<&'a CStr, Errno> {
    let target = take_text(bytes)?;
    match target.count_bytes() {
        0 => Err(Errno::NOENT),
        count if count >= TARGET_BYTES => Err(Errno::NAMETOOLONG),
        _ => Ok(target),
    }
}

/// Takes a NUL-terminated text off the front of `bytes`.
pub fn take_text<'a>(bytes: &mut &'a [u8]) -> Result<&'a CStr, Errno> {
    let text = CStr::from_bytes_until_nul(bytes).map_err(|_| Errno::INVAL)?;
    *bytes = bytes
        .get(text.to_bytes_with_nul().len()..)
        .unwrap_or_default();
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(mut bytes: &[u8]) -> Result<&[u8], Errno> {
        Name::take(&mut bytes).map(|name| name.as_c_str().to_bytes())
    }

    #[test]
    fn takes_plain_names() {
        for name in ["a\0", "...\0", "..a\0", " \0", "\u{1f41a}\0", "a\0/etc\0"] {
            assert!(check(name.as_bytes()).is_ok(), "{name:?}");
        }
        let most = [&[b'x'; NAME_BYTES][..], b"\0"].concat();
        assert!(check(&most).is_ok());
    }

    #[test]
    fn refuses_what_leads_elsewhere() {
        for name in [
            "\0", ".\0", "..\0", "/\0", "a/b\0", "../a\0", "/a\0", "a/\0", "a", "",
        ] {
            assert!(check(name.as_bytes()).is_err(), "{name:?}");
        }
        let long = [&[b'x'; NAME_BYTES + 1][..], b"\0"].concat();
        assert_eq!(check(&long), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn takes_several() {
        let mut bytes = &b"one\0two\0rest"[..];
        assert_eq!(Name::take(&mut bytes).unwrap().as_c_str(), c"one");
        assert_eq!(Name::take(&mut bytes).unwrap().as_c_str(), c"two");
        assert_eq!(bytes, b"rest");
        assert!(Name::take(&mut bytes).is_err());
    }
}
