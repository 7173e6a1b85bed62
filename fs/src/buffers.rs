//! The scattered memory of one message, which the guest may change at any time.

use rustix::io::Errno;
use vm_memory::{ByteValued, VolatileSlice};

/// Most pieces of one message: what `preadv` takes (`UIO_MAXIOV`).
pub const MOST_PIECES: usize = 1024;

/// A run of bytes in pieces. Reading and writing consume it from the front.
#[derive(Clone, Default)]
pub struct Buffers<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    /// Pieces before this one are used up.
    first: usize,
    bytes: usize,
}

impl<'m> Buffers<'m> {
    /// Adds a piece at the end.
    pub fn push(&mut self, piece: VolatileSlice<'m>) -> Result<(), Errno> {
        if self.pieces.len() - self.first == MOST_PIECES {
            return Err(Errno::TOOBIG);
        }
        if !piece.is_empty() {
            self.bytes = self.bytes.checked_add(piece.len()).ok_or(Errno::TOOBIG)?;
            self.pieces.push(piece);
        }
        Ok(())
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Cuts what lies beyond the first `bytes`.
    pub fn truncate(&mut self, bytes: usize) {
        if bytes >= self.bytes {
            return;
        }
        let mut left = bytes;
        for index in self.first..self.pieces.len() {
            let Some(piece) = self.pieces.get_mut(index) else {
                break;
            };
            if left < piece.len() {
                if let Ok(front) = piece.subslice(0, left) {
                    *piece = front;
                }
                self.pieces.truncate(index + 1);
                break;
            }
            left -= piece.len();
        }
        self.bytes = bytes;
    }

    /// Drops the first `bytes`, or all there are.
    pub fn skip(&mut self, bytes: usize) {
        self.each_piece(bytes, |_, _| ());
    }

    /// Copies out the first bytes; fails without effect when there are fewer.
    pub fn read(&mut self, to: &mut [u8]) -> Result<(), Errno> {
        if to.len() > self.bytes {
            return Err(Errno::INVAL);
        }
        let mut to = to;
        self.each_piece(to.len(), |piece, count| {
            let (now, later) = std::mem::take(&mut to).split_at_mut(count);
            piece.copy_to(now);
            to = later;
        });
        Ok(())
    }

    /// Copies out a structure.
    pub fn read_object<T: ByteValued + Default>(&mut self) -> Result<T, Errno> {
        let mut object = T::default();
        self.read(object.as_mut_slice())?;
        Ok(object)
    }

    /// Copies in; fails without effect when there is too little room.
    pub fn write(&mut self, from: &[u8]) -> Result<(), Errno> {
        if from.len() > self.bytes {
            return Err(Errno::RANGE);
        }
        let mut from = from;
        self.each_piece(from.len(), |piece, count| {
            let (now, later) = from.split_at(count);
            piece.copy_from(now);
            from = later;
        });
        Ok(())
    }

    /// Calls `use_piece` for the pieces of the first `bytes` and drops these.
    fn each_piece(&mut self, bytes: usize, mut use_piece: impl FnMut(&VolatileSlice<'m>, usize)) {
        let mut left = bytes.min(self.bytes);
        self.bytes -= left;
        while left > 0 {
            let Some(piece) = self.pieces.get_mut(self.first) else {
                return;
            };
            let count = left.min(piece.len());
            use_piece(piece, count);
            left -= count;
            match piece.offset(count) {
                Ok(rest) if !rest.is_empty() => *piece = rest,
                _ => self.first += 1,
            }
        }
    }

    /// What the kernel needs to fill or drain these bytes. The result holds
    /// raw pointers into the pieces.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        self.pieces
            .iter()
            .skip(self.first)
            .map(|piece| libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces<'m>(memory: &'m mut [u8], sizes: &[usize]) -> Buffers<'m> {
        let mut buffers = Buffers::default();
        let mut rest = memory;
        for size in sizes {
            let (piece, later) = rest.split_at_mut(*size);
            buffers.push(VolatileSlice::from(piece)).unwrap();
            rest = later;
        }
        buffers
    }

    #[test]
    fn reads_across_pieces() {
        let mut memory = *b"abcdefghij";
        let mut buffers = pieces(&mut memory, &[1, 0, 4, 5]);
        let mut out = [0; 3];
        buffers.read(&mut out).unwrap();
        assert_eq!(&out, b"abc");
        assert_eq!(buffers.len(), 7);
        buffers.skip(3);
        buffers.truncate(2);
        assert_eq!(buffers.read(&mut out), Err(Errno::INVAL));
        assert_eq!(buffers.len(), 2);
        buffers.read(&mut out[..2]).unwrap();
        assert_eq!(&out[..2], b"gh");
        assert!(buffers.is_empty());
        assert!(buffers.iovecs().is_empty());
    }

    #[test]
    fn writes_across_pieces() {
        let mut memory = [0; 6];
        let mut buffers = pieces(&mut memory, &[2, 2, 2]);
        buffers.write(b"xyz").unwrap();
        assert_eq!(buffers.write(b"toolong"), Err(Errno::RANGE));
        let lengths: Vec<_> = buffers.iovecs().iter().map(|v| v.iov_len).collect();
        assert_eq!(lengths, [1, 2]);
        buffers.write(b"end").unwrap();
        assert_eq!(&memory, b"xyzend");
    }

    #[test]
    fn truncates_at_the_edges() {
        for keep in 0..=6 {
            let mut memory = [7; 6];
            let mut buffers = pieces(&mut memory, &[2, 2, 2]);
            buffers.truncate(keep);
            let total: usize = buffers.iovecs().iter().map(|v| v.iov_len).sum();
            assert_eq!((buffers.len(), total), (keep, keep));
        }
    }

    #[test]
    fn bounds_the_number_of_pieces() {
        let mut memory = vec![0; MOST_PIECES + 1];
        let mut buffers = Buffers::default();
        for (index, byte) in memory.chunks_mut(1).enumerate() {
            let pushed = buffers.push(VolatileSlice::from(byte));
            assert_eq!(pushed.is_ok(), index < MOST_PIECES);
        }
    }
}
