//! Sockets between guest and host (virtio 1.2, 5.10).
//!
//! Only the guest dials, and only what the host holds ready: the device has a
//! table of host ports, each with a connected unix stream socket that the first
//! connection to the port is joined to. It listens on nothing and connects to
//! nothing.

mod connection;
mod packet;
mod socket;
mod worker;

use std::any::Any;
use std::collections::BTreeMap;
use std::mem;
use std::os::fd::OwnedFd;

use crate::{ActivateError, Activation, DeviceType, VirtioDevice, Worker, queue};
use worker::VsockWorker;

/// `VIRTIO_VSOCK_F_STREAM` (virtio 1.2, 5.10.3).
const F_STREAM: u32 = 0;

/// Guest memory behind the receive queue is its size times 4 KiB with Linux.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;

/// A message for [`VirtioDevice::control`] and [`Worker::control`]: the guest may
/// dial these ports, each one time. The socket takes the place of one that still
/// waits at the same port.
#[derive(Debug)]
pub struct AddHostPorts(pub Vec<(u32, OwnedFd)>);

/// A message likewise: where the guest has not dialled these ports yet, it may
/// not any more, and their sockets are closed.
#[derive(Debug)]
pub struct RemoveHostPorts(pub Vec<u32>);

/// Applies what a message says of the ports that wait.
fn change_host_ports(host_ports: &mut HostPorts, message: Box<dyn Any + Send>) {
    match message.downcast::<AddHostPorts>() {
        Ok(added) => host_ports.extend(added.0),
        Err(message) => {
            if let Ok(removed) = message.downcast::<RemoveHostPorts>() {
                host_ports.retain(|port, _| !removed.0.contains(port));
            }
        }
    }
}

/// Host ports that wait to be dialled.
type HostPorts = BTreeMap<u32, OwnedFd>;

/// The vsock device at rest.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    host_ports: HostPorts,
    /// The driver knows connections of a device that is gone.
    restored: bool,
}

impl Vsock {
    /// A device for the guest with context id `cid`, and the host ports that it
    /// may dial from the start: connected unix stream sockets.
    pub fn new(cid: u32, host_ports: Vec<(u32, OwnedFd)>) -> Self {
        Self {
            cid: cid.into(),
            host_ports: host_ports.into_iter().collect(),
            restored: false,
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn offered_features(&self) -> u64 {
        1 << F_STREAM | queue::FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::config::read(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let restored = mem::take(&mut self.restored);
        let worker = VsockWorker::new(self.cid, activation, &mut self.host_ports, restored)?;
        Ok(Box::new(worker))
    }

    fn restored(&mut self) {
        self.restored = true;
    }

    fn reset(&mut self, worker: Box<dyn Worker>) {
        let worker: Box<dyn Any> = worker;
        if let Ok(worker) = worker.downcast::<VsockWorker>() {
            self.host_ports = worker.into_host_ports();
        }
    }

    fn control(&mut self, message: Box<dyn Any + Send>) {
        change_host_ports(&mut self.host_ports, message);
    }
}

#[cfg(test)]
mod tests;
