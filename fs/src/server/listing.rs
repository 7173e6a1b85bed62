//! Open directories.

use std::os::fd::AsFd;

use rustix::fs::OFlags;
use rustix::io::Errno;
use vm_memory::ByteValued;

use crate::abi::{Dirent, EntryOut, FsyncIn, OpenOut, ReadIn, ReleaseIn, fopen, init};
use crate::directory::{Entry, Listing};
use crate::handle::Opened;
use crate::name::Name;

use super::entry::entry;
use super::{Answer, Request, Server, file};

/// Most bytes of one answer, however much the guest has room for.
const LISTING_BYTES: usize = 64 << 10;

impl Server {
    pub(super) fn opendir(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let id = request.header.nodeid;
        let dir = self.open_node(id, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let open_flags = if self.nodes.get(id)?.area.is_own() {
            fopen::CACHE_DIR | fopen::KEEP_CACHE
        } else {
            0
        };
        let opened = Opened::Directory(Box::new(Listing::new(dir)));
        let fh = self.handles.add(id, opened);
        self.answer(&OpenOut {
            fh,
            open_flags,
            padding: 0,
        })
    }

    pub(super) fn readdir(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        self.list(request, false)
    }

    pub(super) fn readdirplus(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        self.list(request, true)
    }

    fn list(&mut self, request: &mut Request<'_>, with_entries: bool) -> Result<Answer, Errno> {
        let read: ReadIn = request.body.read_object()?;
        let id = request.header.nodeid;
        let submounts = self.agreed(init::SUBMOUNTS);
        let room = (read.size as usize)
            .min(request.room.len())
            .min(LISTING_BYTES);
        let Self {
            handles,
            nodes,
            out,
            ..
        } = self;
        let listing = handles.directory(id, read.fh)?;
        listing.seek(read.offset)?;
        while let Some(found) = listing.peek()? {
            let name_bytes = found.name.count_bytes();
            let prefix = if with_entries {
                size_of::<EntryOut>()
            } else {
                0
            };
            let size = (prefix + size_of::<Dirent>() + name_bytes).next_multiple_of(8);
            if out.len() + size > room {
                break;
            }
            if with_entries {
                // Nodes that the guest is told of count as looked up. A name
                // that went away, `.` and `..` are told without a node.
                let told = Name::new(found.name)
                    .and_then(|name| entry(nodes, submounts, id, name))
                    .unwrap_or_default();
                out.extend_from_slice(told.as_slice());
            }
            push_dirent(out, &found);
            listing.advance();
        }
        if out.is_empty() && room < LISTING_BYTES && listing.peek()?.is_some() {
            // Not even one entry fits; nothing would look like the end.
            return Err(Errno::INVAL);
        }
        Ok(Answer::Out)
    }

    pub(super) fn releasedir(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let release: ReleaseIn = request.body.read_object()?;
        self.handles.remove(request.header.nodeid, release.fh)?;
        Ok(Answer::Out)
    }

    pub(super) fn fsyncdir(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let fsync: FsyncIn = request.body.read_object()?;
        let listing = self.handles.directory(request.header.nodeid, fsync.fh)?;
        file::sync(listing.as_fd(), fsync.fsync_flags)?;
        Ok(Answer::Out)
    }

    /// Writes the whole file system behind a mount back to its disk.
    pub(super) fn syncfs(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let file = self.open_node(request.header.nodeid, OFlags::RDONLY | OFlags::NONBLOCK)?;
        rustix::fs::syncfs(file.as_fd())?;
        Ok(Answer::Out)
    }
}

fn push_dirent(out: &mut Vec<u8>, found: &Entry<'_>) {
    let name = found.name.to_bytes();
    let dirent = Dirent {
        ino: found.inode,
        off: found.next,
        // At most NAME_MAX.
        namelen: name.len() as u32,
        kind: found.kind.into(),
    };
    out.extend_from_slice(dirent.as_slice());
    out.extend_from_slice(name);
    out.resize(out.len().next_multiple_of(8), 0);
}
