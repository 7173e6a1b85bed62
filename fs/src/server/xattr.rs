//! Extended attributes.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, XattrFlags};
use rustix::io::Errno;

use crate::abi::{self, SetxattrIn, XattrSize};
use crate::host::{self, FdName};
use crate::name::take_text;

use super::{Answer, Request, Server};

/// Largest value, and largest list of names (`XATTR_SIZE_MAX`).
const VALUE_BYTES: usize = 64 << 10;

/// Longest name (`XATTR_NAME_MAX`).
const NAME_BYTES: usize = 255;

/// Under which the host keeps the guest's `trusted.*`, without this. Setting the
/// host's own takes a right over the whole node, and they are the host's books:
/// its overlayfs has them, and the guest's shall not mix with them.
const KEPT: &str = "user.husk.";

/// What the guest's kernel gives to its administrators alone.
const TRUSTED: &[u8] = b"trusted.";

/// The attributes that pass between guest and host as they are. Others belong to
/// the host: its security labels, and its `trusted.*`.
fn is_shared(name: &[u8]) -> bool {
    (name.starts_with(b"user.") && !name.starts_with(KEPT.as_bytes()))
        || name == b"security.capability"
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
}

/// A name of the guest's, as the host has it.
#[derive(Debug, PartialEq)]
struct HostName<'a> {
    text: Cow<'a, CStr>,
    is_kept: bool,
}

impl HostName<'_> {
    /// Only files and directories can have it on the host.
    fn is_nowhere(&self, file: &OwnedFd) -> Result<bool, Errno> {
        let has = |kind| matches!(kind, FileType::RegularFile | FileType::Directory);
        Ok(self.is_kept && !has(host::kind(&host::stat(file.as_fd())?)))
    }
}

fn take_name<'a>(arguments: &mut &'a [u8]) -> Result<HostName<'a>, Errno> {
    let name = take_text(arguments)?;
    match name.to_bytes() {
        b"" => Err(Errno::INVAL),
        bytes if bytes.len() > NAME_BYTES => Err(Errno::RANGE),
        bytes if is_shared(bytes) => Ok(HostName {
            text: Cow::Borrowed(name),
            is_kept: false,
        }),
        bytes if bytes.starts_with(TRUSTED) => {
            let text = [KEPT.as_bytes(), bytes].concat();
            if text.len() > NAME_BYTES {
                return Err(Errno::RANGE);
            }
            Ok(HostName {
                text: Cow::Owned(CString::new(text).map_err(|_| Errno::INVAL)?),
                is_kept: true,
            })
        }
        _ => Err(Errno::OPNOTSUPP),
    }
}

/// The guest's name of one that the host has, if it has one.
fn guest_name(name: &[u8]) -> Option<&[u8]> {
    match name.strip_prefix(KEPT.as_bytes()) {
        Some(kept) => kept.starts_with(TRUSTED).then_some(kept),
        None => is_shared(name).then_some(name),
    }
}

// The calls take a path: the descriptor's name in the working directory, which
// is /proc/self/fd.
impl Server {
    pub(super) fn setxattr(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let set: SetxattrIn = request.body.read_object()?;
        self.with_arguments(request, |server, header, arguments| {
            let name = take_name(arguments)?;
            let value = arguments.get(..set.size as usize).ok_or(Errno::INVAL)?;
            if value.len() > VALUE_BYTES {
                return Err(Errno::TOOBIG);
            }
            let file = server.changeable(header.nodeid)?;
            if name.is_nowhere(&file)? {
                // The guest's overlayfs notes where a symbolic link came from, and
                // gives up what it is about to do when it cannot. It never misses
                // the note.
                return Ok(Answer::Out);
            }
            let kill_set_group_id = set.setxattr_flags & abi::SETXATTR_ACL_KILL_SGID != 0;
            server.credentials.keep_set_id(!kill_set_group_id)?;
            let flags = XattrFlags::from_bits_retain(set.flags);
            let path = FdName::of(&file);
            rustix::fs::setxattr(path.as_c_str(), &*name.text, value, flags)?;
            Ok(Answer::Out)
        })
    }

    pub(super) fn getxattr(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let get: XattrSize = request.body.read_object()?;
        self.with_arguments(request, |server, header, arguments| {
            let name = take_name(arguments)?;
            let file = server.reference(header.nodeid)?;
            if name.is_nowhere(&file)? {
                return Err(Errno::NODATA);
            }
            let (path, name) = (FdName::of(&file), &*name.text);
            if get.size == 0 {
                let size = rustix::fs::getxattr_query(path.as_c_str(), name)?;
                return server.answer_size(size);
            }
            let size = (get.size as usize).min(VALUE_BYTES);
            server.out.resize(size, 0);
            let used = rustix::fs::getxattr(path.as_c_str(), name, server.out.as_mut_slice())?;
            server.out.truncate(used);
            Ok(Answer::Out)
        })
    }

    pub(super) fn listxattr(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let list: XattrSize = request.body.read_object()?;
        let file = self.reference(request.header.nodeid)?;
        let path = FdName::of(&file);
        let mut names = vec![0; rustix::fs::listxattr_query(path.as_c_str())?];
        if !names.is_empty() {
            let used = rustix::fs::listxattr(path.as_c_str(), names.as_mut_slice())?;
            names.truncate(used);
        }
        for name in names.split_inclusive(|byte| *byte == 0) {
            if let Some(name) = name.strip_suffix(b"\0").and_then(guest_name) {
                self.out.extend_from_slice(name);
                self.out.push(0);
            }
        }
        let size = self.out.len();
        if list.size == 0 {
            self.out.clear();
            return self.answer_size(size);
        }
        if size > list.size as usize {
            return Err(Errno::RANGE);
        }
        Ok(Answer::Out)
    }

    pub(super) fn removexattr(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        self.with_arguments(request, |server, header, arguments| {
            let name = take_name(arguments)?;
            let file = server.changeable(header.nodeid)?;
            if name.is_nowhere(&file)? {
                return Err(Errno::NODATA);
            }
            server.credentials.keep_set_id(true)?;
            rustix::fs::removexattr(FdName::of(&file).as_c_str(), &*name.text)?;
            Ok(Answer::Out)
        })
    }

    fn answer_size(&mut self, size: usize) -> Result<Answer, Errno> {
        self.answer(&XattrSize {
            size: u32::try_from(size).map_err(|_| Errno::TOOBIG)?,
            padding: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_attributes_stay_on_the_host() {
        for name in [
            c"user.a",
            c"security.capability",
            c"system.posix_acl_default",
        ] {
            let mut arguments = name.to_bytes_with_nul();
            assert_eq!(take_name(&mut arguments).unwrap().text, Cow::Borrowed(name));
        }
        for name in [
            c"user.husk.trusted.overlay.opaque",
            c"user.husk.mine",
            c"security.selinux",
            c"security.ima",
            c"system.nfs4_acl",
            c"User.a",
            c"user",
        ] {
            let mut arguments = name.to_bytes_with_nul();
            assert_eq!(take_name(&mut arguments), Err(Errno::OPNOTSUPP), "{name:?}");
        }
    }

    #[test]
    fn the_guests_trusted_attributes_are_not_the_hosts() {
        let mut arguments = c"trusted.overlay.opaque".to_bytes_with_nul();
        let name = take_name(&mut arguments).unwrap();
        assert_eq!(&*name.text, c"user.husk.trusted.overlay.opaque");
        assert_eq!(
            guest_name(name.text.to_bytes()),
            Some(&b"trusted.overlay.opaque"[..])
        );
        assert_eq!(guest_name(b"trusted.overlay.opaque"), None);
        assert_eq!(guest_name(b"user.husk.mine"), None);
        let long = CString::new([TRUSTED, &[b'x'; NAME_BYTES - 10]].concat()).unwrap();
        let mut arguments = long.to_bytes_with_nul();
        assert_eq!(take_name(&mut arguments), Err(Errno::RANGE));
    }
}
