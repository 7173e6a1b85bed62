//! The transport: a virtio-fs device whose front end, the VMM, is at the other
//! end of a vhost-user connection.
//!
//! One thread does everything: it waits for the front end and for kicks of the
//! queues, and serves each request where it stands. Requests are mostly system
//! calls on the page cache; a thread per queue costs more than it brings.

mod device;
mod vring;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vhost::vhost_user::{BackendReqHandler, Error as VhostUserError};

use crate::mount_table::MountTable;
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
        let ready = wait(&watched, &mut lock(&device), server.mount_table());
        let ready = ready.map_err(ServeError::Poll)?;
        if ready.mounts {
            server.mounts_changed();
        }
        if ready.front_end {
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

/// What there is to do, kicked queues apart.
struct Ready {
    front_end: bool,
    mounts: bool,
}

/// Waits for something to do; takes note of kicked queues.
fn wait(
    front_end: &UnixStream,
    device: &mut Device,
    mounts: Option<&MountTable>,
) -> Result<Ready, Errno> {
    const NO_TIME: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let timeout = device.has_work().then_some(&NO_TIME);
    let kicks: Vec<(usize, &OwnedFd)> = device.kicks().collect();
    let mut watched = vec![PollFd::new(front_end, PollFlags::IN)];
    watched.extend((kicks.iter()).map(|(_, kick)| PollFd::new(*kick, PollFlags::IN)));
    watched.extend(mounts.map(|table| PollFd::new(table, PollFlags::PRI)));
    match poll(&mut watched, timeout) {
        Ok(_) | Err(Errno::INTR) => (),
        Err(error) => return Err(error),
    }
    let mut ready = watched.iter().map(|fd| !fd.revents().is_empty());
    let message = ready.next().unwrap_or_default();
    let mut kicked = Vec::new();
    for (queue, _) in kicks {
        if ready.next().unwrap_or_default() {
            kicked.push(queue);
        }
    }
    let mounts = ready.next().unwrap_or_default();
    for queue in kicked {
        device.kicked(queue);
    }
    Ok(Ready {
        front_end: message,
        mounts,
    })
}
