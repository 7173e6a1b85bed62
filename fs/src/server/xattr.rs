//! Extended attributes.

use std::ffi::CStr;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::abi::{self, SetxattrIn, XattrSize};
use crate::host::FdName;
use crate::name::take_text;

use super::{Answer, Request, Server};

/// Largest value, and largest list of names (`XATTR_SIZE_MAX`).
const VALUE_BYTES: usize = 64 << 10;

/// Longest name (`XATTR_NAME_MAX`).
const NAME_BYTES: usize = 255;

/// The attributes that pass between guest and host. Others belong to the host:
/// its security labels, and `trusted.*`, in which overlayfs keeps its books.
fn is_shared(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || name == b"security.capability"
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
}

fn take_name<'a>(arguments: &mut &'a [u8]) -> Result<&'a CStr, Errno> {
    let name = take_text(arguments)?;
    match name.to_bytes() {
        b"" => Err(Errno::INVAL),
        bytes if bytes.len() > NAME_BYTES => Err(Errno::RANGE),
        bytes if is_shared(bytes) => Ok(name),
        _ => Err(Errno::OPNOTSUPP),
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
            let file = server.reference(header.nodeid)?;
            let kill_set_group_id = set.setxattr_flags & abi::SETXATTR_ACL_KILL_SGID != 0;
            server.credentials.keep_set_id(!kill_set_group_id)?;
            let flags = XattrFlags::from_bits_retain(set.flags);
            let path = FdName::of(&file);
            rustix::fs::setxattr(path.as_c_str(), name, value, flags)?;
            Ok(Answer::Out)
        })
    }

    pub(super) fn getxattr(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let get: XattrSize = request.body.read_object()?;
        self.with_arguments(request, |server, header, arguments| {
            let name = take_name(arguments)?;
            let file = server.reference(header.nodeid)?;
            let path = FdName::of(&file);
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
            if name.strip_suffix(b"\0").is_some_and(is_shared) {
                self.out.extend_from_slice(name);
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
            let file = server.reference(header.nodeid)?;
            server.credentials.keep_set_id(true)?;
            rustix::fs::removexattr(FdName::of(&file).as_c_str(), name)?;
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
            assert_eq!(take_name(&mut arguments), Ok(name));
        }
        for name in [
            c"trusted.overlay.opaque",
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
}
