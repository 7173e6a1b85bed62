//! The guest's open files and directories, each by a number (`fh`).

use std::collections::{HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::io::Errno;

use crate::directory::Listing;
use crate::node::NodeId;

/// Listings that keep what they have read ahead. There may be as many open ones as
/// descriptors, each with 16 KiB.
const READING: usize = 256;

/// What was opened.
#[derive(Debug)]
pub enum Opened {
    /// A regular file.
    File(Rc<OwnedFd>),
    /// A directory.
    Directory(Box<Listing>),
}

#[derive(Debug)]
struct Handle {
    node: NodeId,
    opened: Opened,
}

/// All open files and directories.
#[derive(Debug, Default)]
pub struct HandleTable {
    handles: Vec<Option<Handle>>,
    free: Vec<usize>,
    /// Where listings are that may have read ahead, longest unused first.
    reading: VecDeque<usize>,
}

impl HandleTable {
    /// Closes everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Number of open files and directories.
    pub fn count(&self) -> usize {
        self.handles.len() - self.free.len()
    }

    /// Gives out a number.
    pub fn add(&mut self, node: NodeId, opened: Opened) -> u64 {
        let handle = Some(Handle { node, opened });
        let index = if let Some(index) = self.free.pop() {
            if let Some(slot) = self.handles.get_mut(index) {
                *slot = handle;
            }
            index
        } else {
            self.handles.push(handle);
            self.handles.len() - 1
        };
        index as u64
    }

    /// Closes.
    pub fn remove(&mut self, node: NodeId, fh: u64) -> Result<(), Errno> {
        let slot = self.slot(node, fh)?;
        *slot = None;
        self.free
            .push(usize::try_from(fh).map_err(|_| Errno::BADF)?);
        Ok(())
    }

    /// Closes everything that was opened from these nodes.
    pub fn revoke(&mut self, nodes: &HashSet<NodeId>) {
        for (index, slot) in self.handles.iter_mut().enumerate() {
            if slot
                .as_ref()
                .is_some_and(|handle| nodes.contains(&handle.node))
            {
                *slot = None;
                self.free.push(index);
            }
        }
    }

    /// The regular file that was opened as this number from this node.
    pub fn file(&mut self, node: NodeId, fh: u64) -> Result<Rc<OwnedFd>, Errno> {
        match self.slot(node, fh)? {
            Some(Handle {
                opened: Opened::File(file),
                ..
            }) => Ok(file.clone()),
            _ => Err(Errno::BADF),
        }
    }

    /// The directory that was opened as this number from this node.
    pub fn directory(&mut self, node: NodeId, fh: u64) -> Result<&mut Listing, Errno> {
        self.slot(node, fh)?;
        self.reads(usize::try_from(fh).map_err(|_| Errno::BADF)?);
        match self.slot(node, fh)? {
            Some(Handle {
                opened: Opened::Directory(listing),
                ..
            }) => Ok(listing),
            _ => Err(Errno::BADF),
        }
    }

    /// Has the listing that was longest unused rest for one that reads now.
    fn reads(&mut self, index: usize) {
        self.reading.retain(|other| *other != index);
        self.reading.push_back(index);
        if self.reading.len() > READING
            && let Some(oldest) = self.reading.pop_front()
            && let Some(Some(Handle {
                opened: Opened::Directory(listing),
                ..
            })) = self.handles.get_mut(oldest)
        {
            listing.rest();
        }
    }

    fn slot(&mut self, node: NodeId, fh: u64) -> Result<&mut Option<Handle>, Errno> {
        let index = usize::try_from(fh).map_err(|_| Errno::BADF)?;
        self.handles
            .get_mut(index)
            .filter(|slot| slot.as_ref().is_some_and(|handle| handle.node == node))
            .ok_or(Errno::BADF)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Opened {
        Opened::File(Rc::new(std::fs::File::open("/dev/null").unwrap().into()))
    }

    #[test]
    fn numbers_belong_to_their_node() {
        let mut table = HandleTable::default();
        let first = table.add(7, file());
        let second = table.add(8, file());
        assert_ne!(first, second);
        assert!(table.file(7, first).is_ok());
        assert!(table.file(8, first).is_err());
        assert!(table.directory(7, first).is_err());
        assert!(table.file(7, u64::MAX).is_err());
        assert_eq!(table.remove(8, first), Err(Errno::BADF));
        table.remove(7, first).unwrap();
        assert_eq!(table.remove(7, first), Err(Errno::BADF));
        assert!(table.file(7, first).is_err());
        assert_eq!(table.count(), 1);
        assert_eq!(table.add(9, file()), first);
    }
}
