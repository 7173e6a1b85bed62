//! Shared file systems (virtio 1.2, 5.11), served by another process.
//!
//! This is the front end of vhost-user: it tells the file server where guest
//! memory and the queues are. From then on driver and server are among
//! themselves; this process only watches for the server's end.
//!
//! Where guest memory cannot be given to another process, requests are copied
//! through a [`Shadow`] instead.

mod back_end;
mod message;
mod shadow;
mod worker;

use std::any::Any;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::{ActivateError, Activation, DeviceType, VirtioDevice, Worker, queue};
use back_end::BackEnd;
pub use back_end::{BackEndError, PATIENCE};
pub use shadow::Shadow;
use shadow::ShadowWorker;
use worker::FsWorker;

/// High priority (FORGET and its like), and one for requests.
const QUEUE_SIZES: [u16; 2] = [128, 128];

/// Bytes of the tag (virtio 1.2, 5.11.4).
const TAG_BYTES: usize = 36;

/// Longest wait for the first answer of a server that is started together with
/// the machine. Nothing else runs by then, and the shim ends a machine that does
/// not start in the time it may take, so this only has to end.
pub const START_PATIENCE: Duration = Duration::from_secs(600);

/// A shared file system at rest.
#[derive(Debug)]
pub struct Fs {
    /// Absent while the working half has it.
    back_end: Option<BackEnd>,
    tag: [u8; TAG_BYTES],
    /// Of rings, as the server can have them.
    features: u64,
    path: Path,
}

/// How requests get to the server.
#[derive(Debug)]
enum Path {
    /// It works on the guest's memory.
    Direct,
    /// It works on the shadow, which is absent while the working half has it.
    Shadow(Option<Shadow>),
}

impl Fs {
    /// A file system that the server at the other end of `socket`, a connected
    /// unix stream socket, serves. The guest mounts it by `tag`, of which the
    /// first 36 bytes count. Waits for the server's first answer: [`PATIENCE`]
    /// where a machine runs meanwhile, [`START_PATIENCE`] before.
    ///
    /// # Errors
    /// The server does not answer, or it cannot do what is needed of it.
    pub fn new(socket: OwnedFd, tag: &str, patience: Duration) -> Result<Self, BackEndError> {
        let mut back_end = BackEnd::new(socket);
        let features = back_end.negotiate(QUEUE_SIZES.len(), patience)?;
        let mut space = [0; TAG_BYTES];
        for (to, from) in space.iter_mut().zip(tag.bytes()) {
            *to = from;
        }
        Ok(Self {
            back_end: Some(back_end),
            tag: space,
            features: features & queue::FEATURES,
            path: Path::Direct,
        })
    }

    /// The same for a guest whose memory the server cannot map.
    #[must_use]
    pub fn through(mut self, shadow: Shadow) -> Self {
        self.path = Path::Shadow(Some(shadow));
        self
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn offered_features(&self) -> u64 {
        match self.path {
            Path::Direct => self.features,
            // The guest's rings are worked on here.
            Path::Shadow(_) => queue::FEATURES,
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; TAG_BYTES + 4];
        space[..TAG_BYTES].copy_from_slice(&self.tag);
        let request_queues = QUEUE_SIZES.len() as u32 - 1;
        space[TAG_BYTES..].copy_from_slice(&request_queues.to_le_bytes());
        crate::config::read(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let back_end = &mut self.back_end;
        Ok(match &mut self.path {
            Path::Direct => Box::new(FsWorker::new(back_end, activation)?),
            Path::Shadow(shadow) => {
                let features = self.features;
                Box::new(ShadowWorker::new(back_end, shadow, features, activation)?)
            }
        })
    }

    fn reset(&mut self, worker: Box<dyn Worker>) {
        let worker: Box<dyn Any> = worker;
        match worker.downcast::<FsWorker>() {
            Ok(worker) => self.back_end = Some(worker.into_back_end()),
            Err(worker) => {
                if let Ok(worker) = worker.downcast::<ShadowWorker>() {
                    let (back_end, shadow) = worker.into_parts();
                    self.back_end = Some(back_end);
                    self.path = Path::Shadow(Some(shadow));
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
