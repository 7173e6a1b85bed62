//! Which pages of an arena are taken.

use std::collections::BTreeMap;

pub(super) const PAGE_BYTES: u64 = 4096;

/// Pages that are lent in runs, the lowest first: what is used again and again is
/// in the caches, and the rest of a large arena costs nothing.
#[derive(Debug)]
pub(super) struct Arena {
    start: u64,
    end: u64,
    /// What is lent: where it starts and ends.
    taken: BTreeMap<u64, u64>,
}

impl Arena {
    /// Nothing of it is lent. Its bounds are those of pages.
    pub(super) fn new(start: u64, end: u64) -> Self {
        Self {
            start,
            end,
            taken: BTreeMap::new(),
        }
    }

    /// Lends a run of so many bytes or more; none if there is no such run now.
    pub(super) fn take(&mut self, bytes: u64) -> Option<u64> {
        let bytes = bytes.max(1).checked_next_multiple_of(PAGE_BYTES)?;
        let mut free_from = self.start;
        for (start, end) in &self.taken {
            if start - free_from >= bytes {
                break;
            }
            free_from = *end;
        }
        let end = free_from.checked_add(bytes)?;
        let next = self.taken.range(free_from..).next();
        let limit = next.map_or(self.end, |(start, _)| *start);
        if end > limit {
            return None;
        }
        self.taken.insert(free_from, end);
        Some(free_from)
    }

    /// Takes back the run that starts there.
    pub(super) fn give_back(&mut self, start: u64) {
        self.taken.remove(&start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lowest_first_and_whole_again() {
        let mut arena = Arena::new(0x10_000, 0x14_000);
        assert_eq!(arena.take(0), Some(0x10_000));
        assert_eq!(arena.take(4097), Some(0x11_000));
        assert_eq!(arena.take(4096), Some(0x13_000));
        assert_eq!(arena.take(1), None);
        arena.give_back(0x11_000);
        assert_eq!(arena.take(0x3000), None);
        assert_eq!(arena.take(0x1000), Some(0x11_000));
        for start in [0x10_000, 0x11_000, 0x13_000] {
            arena.give_back(start);
        }
        assert_eq!(arena.take(0x4001), None);
        assert_eq!(arena.take(u64::MAX), None);
        assert_eq!(arena.take(0x4000), Some(0x10_000));
    }

    proptest! {
        #[test]
        fn nothing_is_lent_twice(acts in prop::collection::vec((0..10_000_u64, any::<bool>()), 1..200)) {
            let mut arena = Arena::new(0, 0x20_000);
            let mut lent: Vec<(u64, u64)> = Vec::new();
            for (bytes, back) in acts {
                if back && !lent.is_empty() {
                    let (start, _) = lent.swap_remove(bytes as usize % lent.len());
                    arena.give_back(start);
                } else if let Some(start) = arena.take(bytes) {
                    let end = start + bytes;
                    prop_assert!(end <= 0x20_000);
                    for (other, other_end) in &lent {
                        prop_assert!(end <= *other || start >= *other_end);
                    }
                    lent.push((start, end.max(start + 1)));
                } else {
                    prop_assert!(!lent.is_empty());
                }
            }
        }
    }
}
