//! What a disk stands on.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use rustix::fs::{OFlags, SeekFrom, fcntl_getfl, ioctl_blkpbszget, ioctl_blksszget, seek};

/// Unit of positions and lengths, whatever the disk's blocks (5.2.4).
pub(super) const SECTOR_BYTES: u64 = 512;
/// Bytes of a serial (5.2.6).
pub(super) const SERIAL_BYTES: usize = 20;

/// A file system's blocks; what is smaller costs it reading before writing.
const FILE_PHYSICAL_BYTES: u32 = 4096;

/// A file that cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It could not be asked for its properties.
    #[error("{what}")]
    Query {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("neither a regular file nor a block device")]
    Kind,
    /// Opened without the right to write, for a disk that is to be writable.
    #[error("opened read-only, but the disk is not to be read-only")]
    ReadOnly,
}

/// A raw file or block device, and its properties at the device's creation.
pub(super) struct Disk {
    pub(super) file: Arc<File>,
    pub(super) read_only: bool,
    pub(super) is_block_device: bool,
    pub(super) sectors: u64,
    pub(super) logical_bytes: u32,
    pub(super) physical_bytes: u32,
    pub(super) serial: [u8; SERIAL_BYTES],
}

impl Disk {
    pub(super) fn new(file: File, read_only: bool, serial: &str) -> Result<Self, DiskError> {
        let query = |what| move |source: io::Error| DiskError::Query { what, source };
        let kind = file.metadata().map_err(query("fstat"))?.file_type();
        let is_block_device = kind.is_block_device();
        if !is_block_device && !kind.is_file() {
            return Err(DiskError::Kind);
        }
        let flags = fcntl_getfl(&file).map_err(|e| query("fcntl F_GETFL")(e.into()))?;
        if !read_only && flags & OFlags::ACCMODE != OFlags::RDWR {
            return Err(DiskError::ReadOnly);
        }
        // The same for files and block devices.
        let bytes =
            seek(&file, SeekFrom::End(0)).map_err(|e| query("seek to the end")(e.into()))?;
        let (logical_bytes, physical_bytes) = match is_block_device {
            true => (
                ioctl_blksszget(&file).map_err(|e| query("ioctl BLKSSZGET")(e.into()))?,
                ioctl_blkpbszget(&file).map_err(|e| query("ioctl BLKPBSZGET")(e.into()))?,
            ),
            false => (SECTOR_BYTES as u32, FILE_PHYSICAL_BYTES),
        };
        let mut serial_bytes = [0; SERIAL_BYTES];
        for (to, from) in serial_bytes.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            file: Arc::new(file),
            read_only,
            is_block_device,
            sectors: bytes / SECTOR_BYTES,
            logical_bytes: logical_bytes.max(SECTOR_BYTES as u32),
            physical_bytes: physical_bytes.max(logical_bytes).max(SECTOR_BYTES as u32),
            serial: serial_bytes,
        })
    }

    /// The same disk for the device's other half.
    pub(super) fn share(&self) -> Self {
        Self {
            file: Arc::clone(&self.file),
            ..*self
        }
    }

    /// Position of `sector`, if `len` bytes from there on are on the disk.
    pub(super) fn position(&self, sector: u64, len: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR_BYTES)?;
        let end = start.checked_add(len)?;
        (end <= self.sectors * SECTOR_BYTES).then_some(start)
    }
}
