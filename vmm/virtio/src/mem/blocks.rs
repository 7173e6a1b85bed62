//! Which blocks are plugged, and what a driver may ask.

use std::ops::Range;

use super::BLOCK_BYTES;

/// The region's blocks.
#[derive(Debug)]
pub(super) struct Blocks {
    start: u64,
    plugged: Vec<bool>,
    plugged_count: usize,
    /// Bytes that the driver should have.
    requested: u64,
}

/// Why a request is not done (virtio 1.2, 5.15.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// More than the driver should have.
    TooMuch,
    /// It cannot be.
    Wrong,
}

/// What `STATE` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

impl Blocks {
    pub(super) fn new(region: Range<u64>) -> Self {
        let start = region.start.next_multiple_of(BLOCK_BYTES);
        let count = region.end.saturating_sub(start) / BLOCK_BYTES;
        Self {
            start,
            plugged: vec![false; usize::try_from(count).unwrap_or(0)],
            plugged_count: 0,
            requested: 0,
        }
    }

    /// Notes how much the driver should have: whole blocks, and no more than
    /// there are.
    pub(super) fn request(&mut self, bytes: u64) {
        let blocks = bytes.div_ceil(BLOCK_BYTES).min(self.plugged.len() as u64);
        self.requested = blocks * BLOCK_BYTES;
    }

    /// `struct virtio_mem_config` (5.15.4).
    pub(super) fn config_space(&self) -> [u8; 56] {
        let region = self.plugged.len() as u64 * BLOCK_BYTES;
        let fields = [
            BLOCK_BYTES,
            // The one NUMA node.
            0,
            self.start,
            region,
            // All of it may be used, as far as `requested` allows.
            region,
            self.plugged_count as u64 * BLOCK_BYTES,
            self.requested,
        ];
        let mut space = [0; 56];
        for (to, field) in space.chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        space
    }

    /// Plugs `count` blocks from `address` on.
    pub(super) fn plug(&mut self, address: u64, count: u16) -> Result<(), Refusal> {
        let range = self.range(address, count)?;
        if self.state_of(&range) != State::Unplugged {
            return Err(Refusal::Wrong);
        }
        let plugged = (self.plugged_count + range.len()) as u64 * BLOCK_BYTES;
        if plugged > self.requested {
            return Err(Refusal::TooMuch);
        }
        self.plugged_count += range.len();
        self.plugged[range].fill(true);
        Ok(())
    }

    /// Checks that all of `count` blocks from `address` on are plugged; where
    /// they lie.
    pub(super) fn to_unplug(&self, address: u64, count: u16) -> Result<Range<u64>, Refusal> {
        let range = self.range(address, count)?;
        match self.state_of(&range) {
            State::Plugged => Ok(address..address + range.len() as u64 * BLOCK_BYTES),
            State::Unplugged | State::Mixed => Err(Refusal::Wrong),
        }
    }

    /// Where the region lies that `UNPLUG_ALL` empties.
    pub(super) fn all(&self) -> Range<u64> {
        self.start..self.start + self.plugged.len() as u64 * BLOCK_BYTES
    }

    /// What is plugged of `addresses`, which are those of blocks.
    pub(super) fn plugged_within(&self, addresses: &Range<u64>) -> Vec<Range<u64>> {
        let mut ranges = Vec::new();
        let mut start = addresses.start;
        for alike in self.plugged[self.indices(addresses)].chunk_by(PartialEq::eq) {
            let end = start + alike.len() as u64 * BLOCK_BYTES;
            if alike[0] {
                ranges.push(start..end);
            }
            start = end;
        }
        ranges
    }

    /// Notes that no block in `addresses`, which are those of blocks, is plugged
    /// any more.
    pub(super) fn unplugged(&mut self, addresses: &Range<u64>) {
        let range = self.indices(addresses);
        let plugged = &mut self.plugged[range];
        self.plugged_count -= plugged.iter().filter(|plugged| **plugged).count();
        plugged.fill(false);
    }

    /// Whether `count` blocks from `address` on are plugged.
    pub(super) fn state(&self, address: u64, count: u16) -> Result<State, Refusal> {
        Ok(self.state_of(&self.range(address, count)?))
    }

    fn state_of(&self, range: &Range<usize>) -> State {
        let blocks = &self.plugged[range.clone()];
        match blocks.iter().filter(|plugged| **plugged).count() {
            0 => State::Unplugged,
            count if count == blocks.len() => State::Plugged,
            _ => State::Mixed,
        }
    }

    /// Those of the blocks at these addresses, which are some.
    fn indices(&self, addresses: &Range<u64>) -> Range<usize> {
        let index = |address: u64| ((address - self.start) / BLOCK_BYTES) as usize;
        index(addresses.start)..index(addresses.end)
    }

    /// Indices of `count` blocks from `address` on: at least one, and all of
    /// them in the region.
    fn range(&self, address: u64, count: u16) -> Result<Range<usize>, Refusal> {
        let offset = address.checked_sub(self.start).ok_or(Refusal::Wrong)?;
        if offset % BLOCK_BYTES != 0 || count == 0 {
            return Err(Refusal::Wrong);
        }
        let first = usize::try_from(offset / BLOCK_BYTES).map_err(|_| Refusal::Wrong)?;
        let end = first
            .checked_add(usize::from(count))
            .ok_or(Refusal::Wrong)?;
        match end <= self.plugged.len() {
            true => Ok(first..end),
            false => Err(Refusal::Wrong),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 4 << 30;

    fn blocks() -> Blocks {
        let mut blocks = Blocks::new(START..START + 8 * BLOCK_BYTES);
        blocks.request(4 * BLOCK_BYTES);
        blocks
    }

    fn field(blocks: &Blocks, at: usize) -> u64 {
        let space = blocks.config_space();
        u64::from_le_bytes(space[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn plugs_no_more_than_is_asked_for() {
        let mut blocks = blocks();
        assert_eq!(blocks.plug(START + BLOCK_BYTES, 3), Ok(()));
        assert_eq!(
            blocks.plug(START + 5 * BLOCK_BYTES, 2),
            Err(Refusal::TooMuch)
        );
        assert_eq!(blocks.plug(START, 2), Err(Refusal::Wrong));
        assert_eq!(blocks.plug(START, 1), Ok(()));
        assert_eq!(field(&blocks, 40), 4 * BLOCK_BYTES);
        // The wish may fall below what is plugged.
        blocks.request(0);
        assert_eq!(field(&blocks, 48), 0);
        assert_eq!(
            blocks.plug(START + 6 * BLOCK_BYTES, 1),
            Err(Refusal::TooMuch)
        );
        assert_eq!(field(&blocks, 40), 4 * BLOCK_BYTES);
    }

    #[test]
    fn refuses_what_lies_outside() {
        let blocks = blocks();
        let at = |address, count| blocks.state(address, count);
        assert_eq!(at(START, 8), Ok(State::Unplugged));
        for (address, count) in [
            (START, 9),
            (START, 0),
            (START + 1, 1),
            (START - BLOCK_BYTES, 1),
            (START + 8 * BLOCK_BYTES, 1),
            (!(BLOCK_BYTES - 1), u16::MAX),
            (0, 1),
        ] {
            assert_eq!(
                at(address, count),
                Err(Refusal::Wrong),
                "{address:#x} {count}"
            );
        }
    }

    #[test]
    fn unplugs_what_is_plugged() {
        let mut blocks = blocks();
        blocks.plug(START, 3).unwrap();
        assert_eq!(blocks.state(START, 4), Ok(State::Mixed));
        assert_eq!(
            blocks.to_unplug(START + BLOCK_BYTES, 3),
            Err(Refusal::Wrong)
        );
        let range = blocks.to_unplug(START + BLOCK_BYTES, 2).unwrap();
        assert_eq!(range, START + BLOCK_BYTES..START + 3 * BLOCK_BYTES);
        blocks.unplugged(&range);
        assert_eq!(blocks.state(START, 1), Ok(State::Plugged));
        assert_eq!(blocks.state(START + BLOCK_BYTES, 7), Ok(State::Unplugged));
        blocks.unplugged(&blocks.all());
        assert_eq!(field(&blocks, 40), 0);
    }

    #[test]
    fn knows_what_is_plugged_within() {
        let mut blocks = blocks();
        blocks.plug(START + BLOCK_BYTES, 2).unwrap();
        blocks.plug(START + 7 * BLOCK_BYTES, 1).unwrap();
        let at = |from, to| START + from * BLOCK_BYTES..START + to * BLOCK_BYTES;
        let within = |from, to| blocks.plugged_within(&at(from, to));
        assert_eq!(blocks.plugged_within(&blocks.all()), [at(1, 3), at(7, 8)]);
        assert_eq!(within(2, 7), [at(2, 3)]);
        assert!(within(3, 7).is_empty() && within(8, 8).is_empty());
    }

    #[test]
    fn bounds_are_those_of_blocks() {
        let blocks = Blocks::new(START + 1..START + 2 * BLOCK_BYTES + 5);
        assert_eq!(blocks.all(), START + BLOCK_BYTES..START + 2 * BLOCK_BYTES);
        assert!(Blocks::new(START..START).all().is_empty());
    }
}
