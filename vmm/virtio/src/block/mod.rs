//! Block device (virtio 1.2, 5.2) on a raw file or a block device of the host.

mod disk;
mod engine;
mod request;
mod worker;

use std::any::Any;
use std::fs::File;
use std::io;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::queue::FEATURES;
use crate::rate::{Limiter, Limits};
use crate::{ActivateError, Activation, DeviceType, VirtioDevice, Worker, config};

pub use disk::DiskError;
pub use engine::{Engine, Spares};

use disk::{Disk, SECTOR_BYTES};
use worker::BlockWorker;

const QUEUE_SIZE: u16 = 128;
/// Data buffers of a request: the ring without header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most sectors that one request may discard or zero. One segment of 1 GiB
/// keeps what a single request can occupy the host with within bounds.
const RANGE_SECTORS_MAX: u32 = 1 << 21;
/// Bytes of the configuration space up to the fields for write zeroes (5.2.4).
const CONFIG_BYTES: usize = 0x3c;

/// A disk.
pub struct Block {
    disk: Disk,
    config: [u8; CONFIG_BYTES],
    /// With the worker while the device is active.
    engine: Option<Engine>,
    /// Likewise.
    limiter: Limiter,
}

impl Block {
    /// A disk on `file`, which is a regular file or a block device, with the
    /// `serial` that the guest sees. Requests are carried out by `engine`.
    ///
    /// # Errors
    /// `file` is something else, or not writable though it should be.
    pub fn new(
        file: File,
        read_only: bool,
        serial: &str,
        engine: Engine,
    ) -> Result<Self, DiskError> {
        let disk = match Disk::new(file, read_only, serial) {
            Ok(disk) => disk,
            Err(error) => {
                engine.give_back();
                return Err(error);
            }
        };
        let config = config_space(&disk);
        Ok(Self {
            disk,
            config,
            engine: Some(engine),
            limiter: Limiter::default(),
        })
    }

    /// Limits what is read from and written to it, both together.
    ///
    /// # Errors
    /// There is no timer to be had.
    pub fn limit(&mut self, limits: Limits) -> io::Result<()> {
        self.limiter = Limiter::new(limits)?;
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.take() {
            engine.give_back();
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn offered_features(&self) -> u64 {
        let common = [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
        ];
        let more: &[u32] = match self.disk.read_only {
            true => &[VIRTIO_BLK_F_RO],
            false => &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES],
        };
        let bits = common.iter().chain(more);
        bits.fold(FEATURES, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&self.config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let write_back = activation.negotiated_features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        let queue = activation.take_queue(0)?;
        let disk = self.disk.share();
        let engine = self.engine.take().ok_or_else(|| ActivateError::Host {
            what: "the engine was lost",
            source: io::ErrorKind::NotFound.into(),
        })?;
        let limiter = std::mem::take(&mut self.limiter);
        let worker = BlockWorker::new(queue, disk, engine, limiter, write_back);
        Ok(Box::new(worker))
    }

    fn reset(&mut self, worker: Box<dyn Worker>) {
        let worker: Box<dyn Any> = worker;
        if let Ok(worker) = worker.downcast::<BlockWorker>() {
            (self.engine, self.limiter) = worker.into_parts();
        }
    }
}

fn config_space(disk: &Disk) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, value: &[u8]| config[at..at + value.len()].copy_from_slice(value);
    put(0x00, &disk.sectors.to_le_bytes());
    put(0x0c, &SEGMENTS_MAX.to_le_bytes());
    put(0x14, &disk.logical_bytes.to_le_bytes());
    let exponent = (disk.physical_bytes / disk.logical_bytes).ilog2();
    put(0x18, &[exponent as u8]);
    let blocks_per_physical = (disk.physical_bytes / disk.logical_bytes) as u16;
    put(0x1a, &blocks_per_physical.to_le_bytes());
    put(0x22, &1_u16.to_le_bytes());
    let alignment = disk.physical_bytes / SECTOR_BYTES as u32;
    for (at, value) in [
        (0x24, RANGE_SECTORS_MAX),
        (0x28, 1),
        (0x2c, alignment),
        (0x30, RANGE_SECTORS_MAX),
        (0x34, 1),
        (0x38, 1),
    ] {
        put(at, &value.to_le_bytes());
    }
    config
}

#[cfg(test)]
mod tests;
