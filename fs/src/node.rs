//! The files that the guest knows, each by a number (`nodeid`).
//!
//! A node is held open by a reference (`O_PATH`) while there is room for it.
//! Above a budget the longest unused references are closed; such a node is
//! found again by its directory and name, and only taken for itself if device
//! and inode number still fit. A node without a name (unlinked) stays open.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use crate::abi::ROOT_ID;
use crate::area::Area;
use crate::host::{self, Identity};
use crate::name::Name;

/// How many references are looked at for closing at a time.
const EVICTION_STEPS: usize = 256;

/// How many references are closed when the process runs out of descriptors.
const EVICTION_BATCH: usize = 64;

/// Nodes known at a time by any guest, which may be allowed fewer. Its kernel forgets
/// those that it needs no more, and keeps over 1 KiB for each of the others.
const NODES: usize = 1 << 24;

/// Number of a node.
pub type NodeId = u64;

/// A file that the guest knows.
#[derive(Debug)]
pub struct Node {
    identity: Identity,
    /// The type of the file; never changes.
    pub kind: FileType,
    /// The rule for caching.
    pub area: Area,
    /// How often the guest was told of it and has not forgotten.
    lookups: u64,
    /// Nodes whose `place` is in this one.
    children: u64,
    place: Option<Place>,
    reference: Option<Rc<OwnedFd>>,
    used_lately: bool,
}

impl Node {
    /// Whether a file of this identity lies in another mount than this one.
    pub fn is_mount_of(&self, stat: &Statx) -> bool {
        !self.identity.same_mount(&Identity::new(stat))
    }

    /// The device that holds the file.
    pub fn device(&self) -> (u32, u32) {
        self.identity.device()
    }
}

/// Where a node was seen last.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    parent: NodeId,
    name: CString,
}

impl Place {
    fn new(parent: NodeId, name: Name<'_>) -> Self {
        Self {
            parent,
            name: name.as_c_str().to_owned(),
        }
    }

    fn is(&self, parent: NodeId, name: Name<'_>) -> bool {
        self.parent == parent && self.name.as_c_str() == name.as_c_str()
    }
}

/// All nodes.
#[derive(Debug)]
pub struct NodeTable {
    nodes: HashMap<NodeId, Node>,
    by_identity: HashMap<Identity, NodeId>,
    next: NodeId,
    /// Nodes that hold a reference, longest unused first; may name others too.
    open: VecDeque<NodeId>,
    opened: usize,
    budget: usize,
    most: usize,
}

impl NodeTable {
    /// A table that knows the top directory and aims to hold at most `budget`
    /// references.
    pub fn new(top: OwnedFd, budget: usize) -> Result<Self, Errno> {
        let stat = host::stat(top.as_fd())?;
        if host::kind(&stat) != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let node = Node {
            identity: Identity::new(&stat),
            kind: FileType::Directory,
            area: Area::Top,
            lookups: 0,
            children: 0,
            place: None,
            reference: Some(Rc::new(top)),
            used_lately: true,
        };
        Ok(Self {
            by_identity: HashMap::from([(node.identity, ROOT_ID)]),
            nodes: HashMap::from([(ROOT_ID, node)]),
            next: ROOT_ID + 1,
            open: VecDeque::new(),
            opened: 0,
            budget,
            most: NODES,
        })
    }

    /// Lets so many be known and no more.
    pub fn know_at_most(&mut self, count: usize) {
        self.most = count.min(NODES);
    }

    /// Forgets everything but the top directory.
    pub fn clear(&mut self) {
        self.nodes.retain(|id, _| *id == ROOT_ID);
        self.by_identity.retain(|_, id| *id == ROOT_ID);
        self.open.clear();
        self.opened = 0;
        if let Some(top) = self.nodes.get_mut(&ROOT_ID) {
            top.children = 0;
        }
    }

    /// Lets go of everything in mounts that are no more, and returns it: the
    /// guest cannot hold what the shim has unmounted.
    pub fn revoke(&mut self, is_mounted: impl Fn(u64) -> bool) -> HashSet<NodeId> {
        let gone: HashSet<NodeId> = (self.nodes.iter())
            .filter(|(id, node)| **id != ROOT_ID && !is_mounted(node.identity.mount()))
            .map(|(id, _)| *id)
            .collect();
        for id in &gone {
            let Some(node) = self.nodes.get_mut(id) else {
                continue;
            };
            if node.reference.take().is_some() {
                self.opened = self.opened.saturating_sub(1);
            }
            if self.by_identity.get(&node.identity) == Some(id) {
                self.by_identity.remove(&node.identity);
            }
            if let Some(place) = node.place.take() {
                self.lost_child(place.parent);
            }
        }
        gone
    }

    /// Whether the node was last seen under this name.
    pub fn is_named(&self, id: NodeId, name: &CStr) -> bool {
        let place = self.nodes.get(&id).and_then(|node| node.place.as_ref());
        place.is_some_and(|place| place.name.as_c_str() == name)
    }

    /// Number of nodes known.
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// References held.
    pub fn opened(&self) -> usize {
        self.opened
    }

    /// The node of that number.
    pub fn get(&self, id: NodeId) -> Result<&Node, Errno> {
        self.nodes.get(&id).ok_or(Errno::STALE)
    }

    fn get_mut(&mut self, id: NodeId) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&id).ok_or(Errno::STALE)
    }

    /// A reference to the node, opened anew if it was closed.
    pub fn reference(&mut self, id: NodeId) -> Result<Rc<OwnedFd>, Errno> {
        let mut closed = Vec::new();
        let mut at = id;
        let mut reference = loop {
            let node = self.get_mut(at)?;
            if let Some(reference) = &node.reference {
                node.used_lately = true;
                break reference.clone();
            }
            closed.push(at);
            // Places form a tree (see `set_place`), so this ends at the top.
            at = node.place.as_ref().ok_or(Errno::STALE)?.parent;
        };
        for id in closed.into_iter().rev() {
            let node = self.get_mut(id)?;
            let place = node.place.as_ref().ok_or(Errno::STALE)?;
            let name = Name::new(&place.name)?;
            let found = host::open_reference(reference.as_fd(), name).map_err(|e| match e {
                Errno::NOENT | Errno::NOTDIR => Errno::STALE,
                other => other,
            })?;
            let stat = host::stat(found.as_fd())?;
            if Identity::new(&stat) != node.identity || host::kind(&stat) != node.kind {
                return Err(Errno::STALE);
            }
            reference = Rc::new(found);
            self.hold(id, reference.clone());
        }
        Ok(reference)
    }

    /// Tells the guest of an entry that was found: one more lookup.
    pub fn remember(
        &mut self,
        parent: NodeId,
        name: Name<'_>,
        reference: OwnedFd,
        stat: &Statx,
    ) -> Result<NodeId, Errno> {
        let area = self.get(parent)?.area.of_child(name);
        let id = self.find_or_add(reference, stat, area)?;
        self.set_place(id, parent, name)?;
        Ok(id)
    }

    /// Tells the guest of a file without a name: one more lookup.
    pub fn remember_unnamed(
        &mut self,
        reference: OwnedFd,
        stat: &Statx,
        area: Area,
    ) -> Result<NodeId, Errno> {
        self.find_or_add(reference, stat, area)
    }

    fn find_or_add(
        &mut self,
        reference: OwnedFd,
        stat: &Statx,
        area: Area,
    ) -> Result<NodeId, Errno> {
        let identity = Identity::new(stat);
        let kind = host::kind(stat);
        if let Some(&id) = self.by_identity.get(&identity)
            && let Some(node) = self.nodes.get_mut(&id)
            // Another type means that the inode number was given away again.
            && node.kind == kind
        {
            node.lookups = node.lookups.saturating_add(1);
            node.used_lately = true;
            if node.reference.is_none() {
                self.hold(id, Rc::new(reference));
            }
            return Ok(id);
        }
        if self.nodes.len() >= self.most {
            return Err(Errno::NFILE);
        }
        let id = self.next;
        self.next += 1;
        let node = Node {
            identity,
            kind,
            area,
            lookups: 1,
            children: 0,
            place: None,
            reference: None,
            used_lately: false,
        };
        self.nodes.insert(id, node);
        self.by_identity.insert(identity, id);
        self.hold(id, Rc::new(reference));
        Ok(id)
    }

    /// The guest forgets `count` lookups of the node.
    pub fn forget(&mut self, id: NodeId, count: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_sub(count);
            self.drop_unused(id);
        }
    }

    /// Prepares for the loss of a name, so that a node without another name
    /// can still be reached: call before removing it.
    pub fn pin(&mut self, parent: NodeId, name: Name<'_>) -> Result<Option<NodeId>, Errno> {
        let Some(id) = self.find_entry(parent, name)? else {
            return Ok(None);
        };
        if self
            .get(id)?
            .place
            .as_ref()
            .is_some_and(|p| p.is(parent, name))
        {
            match self.reference(id) {
                Ok(_) | Err(Errno::STALE) => (),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(id))
    }

    /// The node that has this name now.
    pub fn find_entry(&mut self, parent: NodeId, name: Name<'_>) -> Result<Option<NodeId>, Errno> {
        let dir = self.reference(parent)?;
        let Ok(stat) = host::stat_entry(dir.as_fd(), name) else {
            return Ok(None);
        };
        Ok(self.by_identity.get(&Identity::new(&stat)).copied())
    }

    /// A name was removed that `pin` was called for.
    pub fn lost_name(&mut self, id: NodeId, parent: NodeId, name: Name<'_>) {
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        if node.place.as_ref().is_some_and(|p| p.is(parent, name)) {
            node.place = None;
            self.lost_child(parent);
        }
    }

    /// The node has this name now.
    pub fn set_place(&mut self, id: NodeId, parent: NodeId, name: Name<'_>) -> Result<(), Errno> {
        if id == ROOT_ID {
            // The top directory mounted into itself: it needs no name.
            return Ok(());
        }
        let node = self.get(id)?;
        if node.place.as_ref().is_some_and(|p| p.is(parent, name)) {
            return Ok(());
        }
        self.cut_cycle(id, parent);
        self.get(id)?;
        self.get_mut(parent)?.children += 1;
        let node = self.get_mut(id)?;
        if let Some(old) = node.place.replace(Place::new(parent, name)) {
            self.lost_child(old.parent);
        }
        Ok(())
    }

    /// Keeps places a tree: when `id` is about to move below itself, one of
    /// the places in between has been overtaken by changes on the host.
    fn cut_cycle(&mut self, id: NodeId, parent: NodeId) {
        let mut at = parent;
        while let Some(above) = self.parent(at) {
            if above == id {
                if let Some(node) = self.nodes.get_mut(&at) {
                    node.place = None;
                }
                self.lost_child(id);
                return;
            }
            at = above;
        }
    }

    fn parent(&self, id: NodeId) -> Option<NodeId> {
        Some(self.nodes.get(&id)?.place.as_ref()?.parent)
    }

    fn lost_child(&mut self, parent: NodeId) {
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children = node.children.saturating_sub(1);
            self.drop_unused(parent);
        }
    }

    /// Removes the node and then the directories above that only it needed.
    fn drop_unused(&mut self, id: NodeId) {
        let mut at = Some(id);
        while let Some(id) = at {
            let unused = id != ROOT_ID
                && (self.nodes.get(&id)).is_some_and(|n| n.lookups == 0 && n.children == 0);
            if !unused {
                return;
            }
            let Some(node) = self.nodes.remove(&id) else {
                return;
            };
            if node.reference.is_some() {
                self.opened = self.opened.saturating_sub(1);
            }
            if self.by_identity.get(&node.identity) == Some(&id) {
                self.by_identity.remove(&node.identity);
            }
            at = node.place.map(|place| place.parent);
            if let Some(parent) = at.and_then(|at| self.nodes.get_mut(&at)) {
                parent.children = parent.children.saturating_sub(1);
            }
        }
    }

    fn hold(&mut self, id: NodeId, reference: Rc<OwnedFd>) {
        if let Some(node) = self.nodes.get_mut(&id) {
            // It is wanted now, and not to be closed for its own sake.
            node.used_lately = true;
            if node.reference.replace(reference).is_none() {
                self.opened += 1;
                self.open.push_back(id);
            }
        }
        if self.open.len() > 2 * self.opened + EVICTION_STEPS {
            let nodes = &self.nodes;
            self.open
                .retain(|id| nodes.get(id).is_some_and(|n| n.reference.is_some()));
        }
        let excess = self.opened.saturating_sub(self.budget);
        self.evict(excess);
    }

    /// Closes references to make room for other descriptors.
    pub fn make_room(&mut self) {
        let left = self.evict(self.opened.min(EVICTION_BATCH));
        // Those too that have just been given another chance.
        self.evict(left);
    }

    /// Closes up to `count` references that were not used since they were last
    /// looked at, and gives the used ones another chance. Returns how many are
    /// missing.
    fn evict(&mut self, count: usize) -> usize {
        let mut left = count;
        for _ in 0..EVICTION_STEPS.min(self.open.len()) {
            if left == 0 {
                break;
            }
            let Some(id) = self.open.pop_front() else {
                break;
            };
            let Some(node) = self.nodes.get_mut(&id) else {
                continue;
            };
            if node.reference.is_none() {
                continue;
            }
            if std::mem::take(&mut node.used_lately) || node.place.is_none() {
                self.open.push_back(id);
                continue;
            }
            node.reference = None;
            self.opened = self.opened.saturating_sub(1);
            left -= 1;
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{open_reference, stat};
    use std::fs;
    use std::path::Path;

    /// A table of a directory, and that directory.
    fn table(budget: usize) -> (NodeTable, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let top = fs::File::open(dir.path()).unwrap();
        (NodeTable::new(top.into(), budget).unwrap(), dir)
    }

    fn name(text: &std::ffi::CStr) -> Name<'_> {
        Name::new(text).unwrap()
    }

    fn look(table: &mut NodeTable, parent: NodeId, text: &std::ffi::CStr) -> NodeId {
        let dir = table.reference(parent).unwrap();
        let found = open_reference(dir.as_fd(), name(text)).unwrap();
        let stat = stat(found.as_fd()).unwrap();
        table.remember(parent, name(text), found, &stat).unwrap()
    }

    /// Closes every reference that can be closed.
    fn close_all(table: &mut NodeTable) {
        for _ in 0..3 {
            table.evict(usize::MAX);
        }
    }

    fn inode(table: &mut NodeTable, id: NodeId) -> Result<u64, Errno> {
        Ok(stat(table.reference(id)?.as_fd())?.stx_ino)
    }

    fn inode_of(path: &Path) -> u64 {
        std::os::unix::fs::MetadataExt::ino(&fs::symlink_metadata(path).unwrap())
    }

    #[test]
    fn closed_nodes_are_found_again_or_given_up() {
        let (mut table, dir) = table(1000);
        let at = |path: &str| dir.path().join(path);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/b/c"), "").unwrap();
        let a = look(&mut table, ROOT_ID, c"a");
        let b = look(&mut table, a, c"b");
        let c = look(&mut table, b, c"c");
        close_all(&mut table);
        assert_eq!(table.opened(), 0);
        assert_eq!(inode(&mut table, c), Ok(inode_of(&at("a/b/c"))));
        assert_eq!(table.opened(), 3);
        // Moved behind its back: another file has its name.
        close_all(&mut table);
        fs::rename(at("a/b/c"), at("elsewhere")).unwrap();
        assert_eq!(inode(&mut table, c), Err(Errno::STALE));
        fs::write(at("a/b/c"), "").unwrap();
        assert_eq!(inode(&mut table, c), Err(Errno::STALE));
        fs::rename(at("elsewhere"), at("a/b/c")).unwrap();
        assert_eq!(inode(&mut table, c), Ok(inode_of(&at("a/b/c"))));
        // A link in place of a directory is not followed.
        close_all(&mut table);
        fs::rename(at("a"), at("real")).unwrap();
        std::os::unix::fs::symlink("real", at("a")).unwrap();
        assert_eq!(inode(&mut table, c), Err(Errno::STALE));
        // Looked up at its new place, it is known under its old number.
        let moved = look(&mut table, ROOT_ID, c"real");
        assert_eq!(moved, a);
        assert_eq!(inode(&mut table, c), Ok(inode_of(&at("real/b/c"))));
    }

    /// A file that was known and removed: its node, and its inode's number.
    fn removed_file(table: &mut NodeTable, dir: &Path) -> (NodeId, u64) {
        let path = dir.join("file");
        fs::write(&path, "").unwrap();
        let id = look(table, ROOT_ID, c"file");
        let expected = inode_of(&path);
        close_all(table);
        assert_eq!(table.pin(ROOT_ID, name(c"file")), Ok(Some(id)));
        fs::remove_file(&path).unwrap();
        table.lost_name(id, ROOT_ID, name(c"file"));
        (id, expected)
    }

    #[test]
    fn removed_names_keep_their_node_open() {
        let (mut table, dir) = table(1000);
        let (id, expected) = removed_file(&mut table, dir.path());
        close_all(&mut table);
        assert_eq!(inode(&mut table, id), Ok(expected));
        table.forget(id, 1);
        assert_eq!(table.opened(), 0);
        assert_eq!(table.count(), 1);
    }

    #[test]
    fn removed_names_keep_their_node_open_beyond_the_budget() {
        let (mut table, dir) = table(2);
        for removed in 1..20 {
            let (id, expected) = removed_file(&mut table, dir.path());
            assert_eq!(inode(&mut table, id), Ok(expected));
            assert_eq!(table.opened(), removed);
        }
    }

    #[test]
    fn directories_stay_while_something_in_them_is_known() {
        let (mut table, dir) = table(1000);
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/c"), "").unwrap();
        let a = look(&mut table, ROOT_ID, c"a");
        let b = look(&mut table, a, c"b");
        let c = look(&mut table, b, c"c");
        table.forget(a, 1);
        table.forget(b, u64::MAX);
        assert_eq!(table.count(), 4);
        close_all(&mut table);
        assert!(table.reference(c).is_ok());
        look(&mut table, b, c"c");
        table.forget(c, 1);
        assert_eq!(table.count(), 4);
        table.forget(c, 1);
        assert_eq!(table.count(), 1);
        assert_eq!(table.opened(), 0);
        table.forget(c, 1);
        table.forget(ROOT_ID, 100);
        assert!(table.reference(ROOT_ID).is_ok());
    }

    #[test]
    fn places_never_form_a_ring() {
        let (mut table, dir) = table(1000);
        let at = |path: &str| dir.path().join(path);
        fs::create_dir_all(at("x/y")).unwrap();
        let x = look(&mut table, ROOT_ID, c"x");
        let y = look(&mut table, x, c"y");
        // The host turns them over: y/x instead of x/y.
        fs::rename(at("x/y"), at("y")).unwrap();
        fs::rename(at("x"), at("y/x")).unwrap();
        assert_eq!(look(&mut table, y, c"x"), x);
        close_all(&mut table);
        // y has no place until it is seen again, but x does not wait for ever.
        assert!(inode(&mut table, x).is_ok());
        assert_eq!(look(&mut table, ROOT_ID, c"y"), y);
        close_all(&mut table);
        assert_eq!(inode(&mut table, x), Ok(inode_of(&at("y/x"))));
        table.forget(x, 2);
        table.forget(y, 2);
        assert_eq!(table.count(), 1);
    }

    #[test]
    fn so_many_are_known_and_no_more() {
        let (mut table, dir) = table(1000);
        for text in ["a", "b", "c"] {
            fs::write(dir.path().join(text), "").unwrap();
        }
        // The top directory is one of them.
        table.know_at_most(3);
        let try_look = |table: &mut NodeTable, text: &CStr| {
            let top = table.reference(ROOT_ID)?;
            let found = open_reference(top.as_fd(), name(text))?;
            let stat = stat(found.as_fd())?;
            table.remember(ROOT_ID, name(text), found, &stat)
        };
        let a = try_look(&mut table, c"a").unwrap();
        let b = try_look(&mut table, c"b").unwrap();
        assert_eq!(try_look(&mut table, c"c"), Err(Errno::NFILE));
        // It holds no descriptor either, and what is known is found again.
        assert_eq!((table.count(), table.opened()), (3, 2));
        assert_eq!(try_look(&mut table, c"a"), Ok(a));
        table.forget(b, 1);
        assert!(try_look(&mut table, c"c").is_ok());
    }

    #[test]
    fn a_session_leaves_nothing_behind() {
        let (mut table, dir) = table(2);
        for index in 0..50 {
            fs::write(dir.path().join(format!("{index}")), "").unwrap();
            let text = std::ffi::CString::new(format!("{index}")).unwrap();
            look(&mut table, ROOT_ID, &text);
        }
        assert_eq!(table.count(), 51);
        assert!(table.opened() <= 3, "{}", table.opened());
        table.clear();
        assert_eq!((table.count(), table.opened()), (1, 0));
        assert!(table.reference(ROOT_ID).is_ok());
    }
}
