//! Memory balloon (virtio 1.2, 5.5) of which only free page reporting is there: the
//! driver names memory that it does not use, and the host takes it back until it is
//! touched again. The balloon itself stays empty.

mod worker;

use crate::queue::FEATURES;
use crate::{ActivateError, Activation, DeviceType, Pins, VirtioDevice, Worker};

use worker::BalloonWorker;

/// `VIRTIO_BALLOON_F_REPORTING` (5.5.3).
const REPORTING: u64 = 1 << 5;

/// Inflate, deflate, reporting. Linux numbers the queues that there are, whatever
/// 5.5.2 says of those that are left out, and reports 32 pieces at once or nothing
/// (`PAGE_REPORTING_CAPACITY`).
const QUEUE_SIZES: [u16; 3] = [16, 16, 32];

/// A balloon that nobody inflates.
#[derive(Debug, Default)]
pub struct Balloon {
    pins: Pins,
}

impl Balloon {
    /// One that takes nothing while memory is pinned.
    pub fn new(pins: Pins) -> Self {
        Self { pins }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn offered_features(&self) -> u64 {
        FEATURES | REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// No page is wanted, and none is in it.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let reports = match activation.negotiated_features & REPORTING {
            0 => None,
            _ => Some(activation.take_queue(2)?),
        };
        Ok(Box::new(BalloonWorker {
            unwanted: [activation.take_queue(0)?, activation.take_queue(1)?],
            reports,
            memory: activation.memory,
            pins: self.pins.clone(),
        }))
    }

    fn reset(&mut self, _worker: Box<dyn Worker>) {}
}
