//! A driver's request (virtio 1.2, 5.2.6), checked against the disk.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::RANGE_SECTORS_MAX;
use super::disk::{Disk, SECTOR_BYTES};
use crate::queue::Chain;

/// Type, a reserved word, sector.
pub(super) const HEADER_BYTES: usize = 16;
/// The status is the last byte that the device may write.
pub(super) const STATUS_BYTES: usize = 1;

/// How a request ended (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    Error = 1,
    Unsupported = 2,
}

/// What is asked for; positions and lengths in bytes, and on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read {
        position: u64,
        len: usize,
    },
    Write {
        position: u64,
        len: usize,
    },
    Flush,
    Discard {
        position: u64,
        len: u64,
    },
    WriteZeroes {
        position: u64,
        len: u64,
        unmap: bool,
    },
    GetId,
}

impl Request {
    /// What it moves. Zeroes count, since a disk that has none at hand is written
    /// to; what is discarded does not.
    pub(super) fn moved_bytes(&self) -> u64 {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } => *len as u64,
            Self::WriteZeroes { len, .. } => *len,
            Self::Flush | Self::Discard { .. } | Self::GetId => 0,
        }
    }

    /// Reads the request out of `chain`, which has room for the status.
    pub(super) fn parse(chain: &Chain, disk: &Disk) -> Result<Self, Status> {
        let [kind, _, low, high] = chain
            .read_object::<[u32; 4]>(0)
            .ok_or(Status::Error)?
            .map(u32::from_le);
        let sector = u64::from(low) | u64::from(high) << 32;
        if disk.read_only && is_write(kind) {
            return Err(Status::Error);
        }
        match kind {
            VIRTIO_BLK_T_IN => {
                let len = chain.writable_len() - STATUS_BYTES;
                let position = transfer(disk, sector, len)?;
                Ok(Self::Read { position, len })
            }
            VIRTIO_BLK_T_OUT => {
                let len = chain.readable_len() - HEADER_BYTES;
                let position = transfer(disk, sector, len)?;
                Ok(Self::Write { position, len })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_DISCARD => {
                let (position, len, flags) = range(chain, disk)?;
                match flags {
                    0 => Ok(Self::Discard { position, len }),
                    _ => Err(Status::Unsupported),
                }
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let (position, len, flags) = range(chain, disk)?;
                match flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP {
                    0 => Ok(Self::WriteZeroes {
                        position,
                        len,
                        unmap: flags != 0,
                    }),
                    _ => Err(Status::Unsupported),
                }
            }
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            _ => Err(Status::Unsupported),
        }
    }
}

fn is_write(kind: u32) -> bool {
    matches!(
        kind,
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
    )
}

/// The position of whole sectors on the disk.
fn transfer(disk: &Disk, sector: u64, len: usize) -> Result<u64, Status> {
    let len = len as u64;
    if !len.is_multiple_of(SECTOR_BYTES) {
        return Err(Status::Error);
    }
    disk.position(sector, len).ok_or(Status::Error)
}

/// Position, length and flags of the one segment that a request to discard or
/// zero has.
fn range(chain: &Chain, disk: &Disk) -> Result<(u64, u64, u32), Status> {
    let [low, high, sectors, flags] = chain
        .read_object::<[u32; 4]>(HEADER_BYTES)
        .ok_or(Status::Error)?
        .map(u32::from_le);
    if chain.readable_len() != HEADER_BYTES + 16 || sectors > RANGE_SECTORS_MAX {
        return Err(Status::Error);
    }
    let sector = u64::from(low) | u64::from(high) << 32;
    let len = u64::from(sectors) * SECTOR_BYTES;
    let position = disk.position(sector, len).ok_or(Status::Error)?;
    Ok((position, len, flags))
}
