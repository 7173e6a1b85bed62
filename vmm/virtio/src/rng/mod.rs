//! Entropy device (virtio 1.2, 5.4): the host kernel's random numbers.

mod worker;

use crate::queue::FEATURES;
use crate::{ActivateError, Activation, DeviceType, VirtioDevice, Worker};

use worker::RngWorker;

const QUEUE_SIZES: [u16; 1] = [16];

/// An entropy device.
#[derive(Debug, Default)]
pub struct Rng;

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn offered_features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        Ok(Box::new(RngWorker {
            requests: activation.take_queue(0)?,
        }))
    }

    fn reset(&mut self, _worker: Box<dyn Worker>) {}
}
