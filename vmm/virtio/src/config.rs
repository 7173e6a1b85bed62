//! Reads of a device's configuration space.

/// Fills `data` from `space` at `offset`; zeroes past the end.
pub(crate) fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Ok(offset) = usize::try_from(offset) else {
        return;
    };
    let from = space.get(offset..).unwrap_or_default();
    let count = from.len().min(data.len());
    data[..count].copy_from_slice(&from[..count]);
}
