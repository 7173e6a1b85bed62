//! Names in directories.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Mode, RenameFlags};
use rustix::io::Errno;

use crate::abi::{
    self, BatchForgetIn, EntryOut, ForgetIn, ForgetOne, LinkIn, MkdirIn, MknodIn, Rename2In,
    RenameIn, init,
};
use crate::area::Area;
use crate::host;
use crate::name::{self, Name};
use crate::node::{NodeId, NodeTable};

use super::{ARGUMENT_BYTES, Answer, Request, Server, seconds, with_room};

/// Bits of a mode that are not the type.
const PERMISSIONS: u32 = 0o7777;

const RENAME_FLAGS: RenameFlags = RenameFlags::NOREPLACE
    .union(RenameFlags::EXCHANGE)
    .union(RenameFlags::WHITEOUT);

impl Server {
    pub(super) fn lookup(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        self.with_arguments(request, |server, header, arguments| {
            let name = Name::take(arguments)?;
            match server.entry(header.nodeid, name) {
                Err(Errno::NOENT) => server.absent(header.nodeid, name),
                entry => server.answer(&entry?),
            }
        })
    }

    /// A name that does not exist; where only the guest could create it, it
    /// may remember that.
    fn absent(&mut self, parent: NodeId, name: Name<'_>) -> Result<Answer, Errno> {
        let area = self.nodes.get(parent)?.area.of_child(name);
        if !area.is_own() {
            return Err(Errno::NOENT);
        }
        let (entry_valid, entry_valid_nsec) = seconds(area.lifetime());
        self.answer(&EntryOut {
            entry_valid,
            entry_valid_nsec,
            ..EntryOut::default()
        })
    }

    /// Tells the guest of a directory's entry.
    pub(super) fn entry(&mut self, parent: NodeId, name: Name<'_>) -> Result<EntryOut, Errno> {
        let submounts = self.agreed(init::SUBMOUNTS);
        entry(&mut self.nodes, submounts, parent, name)
    }

    pub(super) fn forget(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let forget: ForgetIn = request.body.read_object()?;
        self.nodes.forget(request.header.nodeid, forget.nlookup);
        Ok(Answer::Silence)
    }

    pub(super) fn batch_forget(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let batch: BatchForgetIn = request.body.read_object()?;
        request.body.truncate(ARGUMENT_BYTES);
        for _ in 0..batch.count {
            // Ends with the body, however many were announced.
            let Ok(one) = request.body.read_object::<ForgetOne>() else {
                break;
            };
            self.nodes.forget(one.nodeid, one.nlookup);
        }
        Ok(Answer::Silence)
    }

    pub(super) fn readlink(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let link = self.reference(request.header.nodeid)?;
        let target = rustix::fs::readlinkat(&*link, c"", Vec::new())?;
        self.out.extend_from_slice(target.as_bytes());
        Ok(Answer::Out)
    }

    pub(super) fn symlink(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        self.with_arguments(request, |server, header, arguments| {
            let name = Name::take(arguments)?;
            let target = name::take_target(arguments)?;
            server.make(header.nodeid, name, 0, |dir| {
                rustix::fs::symlinkat(target, dir, name.as_c_str())
            })
        })
    }

    pub(super) fn mknod(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let mknod: MknodIn = request.body.read_object()?;
        self.with_arguments(request, |server, header, arguments| {
            let name = Name::take(arguments)?;
            let kind = match FileType::from_raw_mode(mknod.mode) {
                kind @ (FileType::RegularFile
                | FileType::Fifo
                | FileType::Socket
                | FileType::CharacterDevice
                | FileType::BlockDevice) => kind,
                _ => return Err(Errno::INVAL),
            };
            let mode = Mode::from_raw_mode(mknod.mode & PERMISSIONS);
            let device = host::decode_device(mknod.rdev);
            server.make(header.nodeid, name, mknod.umask, |dir| {
                rustix::fs::mknodat(dir, name.as_c_str(), kind, mode, device)
            })
        })
    }

    pub(super) fn mkdir(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let mkdir: MkdirIn = request.body.read_object()?;
        self.with_arguments(request, |server, header, arguments| {
            let name = Name::take(arguments)?;
            let mode = Mode::from_raw_mode(mkdir.mode & PERMISSIONS);
            server.make(header.nodeid, name, mkdir.umask, |dir| {
                rustix::fs::mkdirat(dir, name.as_c_str(), mode)
            })
        })
    }

    /// Creates an entry and tells the guest of it.
    fn make(
        &mut self,
        parent: NodeId,
        name: Name<'_>,
        umask: u32,
        create: impl FnOnce(BorrowedFd<'_>) -> Result<(), Errno>,
    ) -> Result<Answer, Errno> {
        let dir = self.changeable(parent)?;
        self.credentials.umask(umask);
        self.credentials.keep_set_id(true)?;
        create(dir.as_fd())?;
        let entry = self.entry(parent, name)?;
        self.answer(&entry)
    }

    pub(super) fn unlink(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        self.remove(request, AtFlags::empty())
    }

    pub(super) fn rmdir(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        self.remove(request, AtFlags::REMOVEDIR)
    }

    fn remove(&mut self, request: &mut Request<'_>, flags: AtFlags) -> Result<Answer, Errno> {
        self.with_arguments(request, |server, header, arguments| {
            let name = Name::take(arguments)?;
            let parent = header.nodeid;
            let dir = server.changeable(parent)?;
            let node = with_room(&mut server.nodes, |nodes| nodes.pin(parent, name))?;
            rustix::fs::unlinkat(&*dir, name.as_c_str(), flags)?;
            if let Some(node) = node {
                server.nodes.lost_name(node, parent, name);
            }
            Ok(Answer::Out)
        })
    }

    pub(super) fn rename(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let rename: RenameIn = request.body.read_object()?;
        self.rename_to(request, rename.newdir, RenameFlags::empty())
    }

    pub(super) fn rename2(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let rename: Rename2In = request.body.read_object()?;
        let flags = RenameFlags::from_bits_retain(rename.flags);
        if !RENAME_FLAGS.contains(flags) {
            return Err(Errno::INVAL);
        }
        self.rename_to(request, rename.newdir, flags)
    }

    fn rename_to(
        &mut self,
        request: &mut Request<'_>,
        new_parent: NodeId,
        flags: RenameFlags,
    ) -> Result<Answer, Errno> {
        self.with_arguments(request, |server, header, arguments| {
            let old_parent = header.nodeid;
            let old_name = Name::take(arguments)?;
            let new_name = Name::take(arguments)?;
            let old_dir = server.changeable(old_parent)?;
            let new_dir = server.changeable(new_parent)?;
            let nodes = &mut server.nodes;
            let moved = with_room(nodes, |nodes| nodes.find_entry(old_parent, old_name))?;
            let replaced = with_room(nodes, |nodes| nodes.pin(new_parent, new_name))?;
            rustix::fs::renameat_with(
                &*old_dir,
                old_name.as_c_str(),
                &*new_dir,
                new_name.as_c_str(),
                flags,
            )?;
            if moved == replaced && moved.is_some() {
                // Two names of one file: nothing has happened.
                return Ok(Answer::Out);
            }
            if let Some(replaced) = replaced {
                if flags.contains(RenameFlags::EXCHANGE) {
                    nodes.set_place(replaced, old_parent, old_name)?;
                } else {
                    nodes.lost_name(replaced, new_parent, new_name);
                }
            }
            if let Some(moved) = moved {
                nodes.set_place(moved, new_parent, new_name)?;
            }
            Ok(Answer::Out)
        })
    }

    pub(super) fn link(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let link: LinkIn = request.body.read_object()?;
        self.with_arguments(request, |server, header, arguments| {
            let name = Name::take(arguments)?;
            let file = server.reference(link.oldnodeid)?;
            let dir = server.changeable(header.nodeid)?;
            server.proc_self_fd.link(file.as_fd(), dir.as_fd(), name)?;
            let entry = server.entry(header.nodeid, name)?;
            server.answer(&entry)
        })
    }
}

/// Tells the guest of a directory's entry.
pub(super) fn entry(
    nodes: &mut NodeTable,
    submounts: bool,
    parent: NodeId,
    name: Name<'_>,
) -> Result<EntryOut, Errno> {
    let found = with_room(nodes, |nodes| {
        let dir = nodes.reference(parent)?;
        host::open_reference(dir.as_fd(), name)
    })?;
    let stat = host::stat(found.as_fd())?;
    let is_directory = host::kind(&stat) == FileType::Directory;
    if !is_directory && nodes.get(parent)?.area == Area::Layers {
        return Err(Errno::NOENT);
    }
    let is_submount = submounts && is_directory && nodes.get(parent)?.is_mount_of(&stat);
    let id = nodes.remember(parent, name, found, &stat)?;
    let mut entry = entry_out(nodes, id, &stat)?;
    if is_submount {
        entry.attr.flags |= abi::ATTR_SUBMOUNT;
    }
    Ok(entry)
}

/// What the guest is told of a node.
pub(super) fn entry_out(
    nodes: &NodeTable,
    id: NodeId,
    stat: &rustix::fs::Statx,
) -> Result<EntryOut, Errno> {
    let (valid, valid_nsec) = seconds(nodes.get(id)?.area.lifetime());
    Ok(EntryOut {
        nodeid: id,
        // Numbers of nodes are never used again.
        generation: 0,
        entry_valid: valid,
        attr_valid: valid,
        entry_valid_nsec: valid_nsec,
        attr_valid_nsec: valid_nsec,
        attr: host::attr(stat),
    })
}
