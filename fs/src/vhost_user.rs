//! The transport: a virtio-fs device whose front end, the VMM, is at the other
//! end of a vhost-user connection.
//!
//! One thread does everything: it waits for the front end and for kicks of the
//! queues, and serves each request where it stands. Requests are mostly system
//! calls on the page cache; a thread per queue costs more than it brings.

mod device;
mod vring;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vhost::vhost_user::{BackendReqHandler, Error as VhostUserError};

use crate::server::Server;
use device::Device;

/// Requests of one queue served before others get their turn.
const TURN: usize = 64;

/// Why serving ended, other than by the front end's leaving.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ServeError {
    #[error("cannot use the front end's socket")]
    Socket(#[source] io::Error),
    #[error("cannot wait for the front end")]
    Poll(#[source] Errno),
    #[error("the front end sent what cannot be served")]
    FrontEnd(#[source] VhostUserError),
}

/// Serves the front end until it closes the connection.
pub fn serve(socket: UnixStream, server: &mut Server) -> Result<(), ServeError> {
    let device = Arc::new(Mutex::new(Device::default()));
    let watched = socket.try_clone().map_err(ServeError::Socket)?;
    let mut front_end = BackendReqHandler::from_stream(socket, device.clone());
    loop {
        if wait(&watched, &mut lock(&device)).map_err(ServeError::Poll)? {
            match front_end.handle_request() {
                Ok(()) => (),
                Err(
                    VhostUserError::Disconnected
                    | VhostUserError::PartialMessage
                    | VhostUserError::SocketBroken(_),
                ) => return Ok(()),
                Err(error) => return Err(ServeError::FrontEnd(error)),
            }
        }
        lock(&device).serve_queues(server);
    }
}

fn lock(device: &Mutex<Device>) -> MutexGuard<'_, Device> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for something to do; takes note of kicked queues. Whether there is a
/// message of the front end.
fn wait(front_end: &UnixStream, device: &mut Device) -> Result<bool, Errno> {
    const NO_TIME: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let timeout = device.has_work().then_some(&NO_TIME);
    let mut watched = vec![PollFd::new(front_end, PollFlags::IN)];
    let kicks: Vec<(usize, &OwnedFd)> = device.kicks().collect();
    watched.extend(
        (kicks.iter()).map(|(_, kick)| PollFd::from_borrowed_fd(kick.as_fd(), PollFlags::IN)),
    );
    match poll(&mut watched, timeout) {
        Ok(_) | Err(Errno::INTR) => (),
        Err(error) => return Err(error),
    }
    let mut ready = watched.iter().map(|fd| !fd.revents().is_empty());
    let message = ready.next().unwrap_or_default();
    let kicked: Vec<usize> = (kicks.iter().zip(ready))
        .filter_map(|((queue, _), ready)| ready.then_some(*queue))
        .collect();
    for queue in kicked {
        device.kicked(queue);
    }
    Ok(message)
}
