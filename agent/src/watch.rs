//! Waits for the kernel to say that a file has changed, and for devices to
//! appear. Nothing here asks at intervals: the watch is set first, then the
//! state is read.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::pod_namespaces;
use crate::socket::registered;

/// A file of the kernel's that tells when it has changed, such as
/// `cgroup.events`. By poll(2), not by inotify(7): the instances of that are
/// counted by user, and the containers' root is the same user as we are.
#[derive(Debug)]
pub struct FileWatch(AsyncFd<OwnedFd>);

impl FileWatch {
    /// Opens the file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = OwnedFd::from(File::open(path)?);
        // SAFETY: an OwnedFd stays open, and the same, until it is dropped.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::PRIORITY) }?;
        Ok(Self(fd))
    }

    /// What it says now.
    pub fn read(&self) -> io::Result<String> {
        /// Twice what the longest of them has.
        const BYTES: usize = 4096;
        let mut buf = Vec::with_capacity(BYTES);
        rustix::io::pread(
            self.0.get_ref(),
            rustix::buffer::spare_capacity(&mut buf),
            0,
        )?;
        Ok(String::from_utf8_lossy(&buf).into_owned())
    }

    /// Returns when it may say something else than at the last reading.
    pub async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

/// Devices that come and go, of all subsystems.
#[derive(Debug)]
pub struct DeviceWatch(AsyncFd<OwnedFd>);

impl DeviceWatch {
    /// From now on.
    pub fn new() -> io::Result<Self> {
        /// The kernel's own messages; udev's are group 2.
        const KERNEL_GROUP: u32 = 1;
        // Elsewhere the kernel does not tell.
        let fd = pod_namespaces::in_first_network(|| {
            let fd = rustix::net::socket_with(
                AddressFamily::NETLINK,
                SocketType::RAW,
                SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
                Some(KOBJECT_UEVENT),
            )?;
            Ok(fd)
        })?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Self(registered(fd)?))
    }

    /// Returns after at least one event since the last call. What it was is
    /// for the caller to find in /sys, where it also finds what it missed.
    pub async fn changed(&self) -> io::Result<()> {
        drain(&self.0, |fd, buf| {
            let received = rustix::net::recv(fd, buf, RecvFlags::empty());
            match received {
                // Events were lost; there was one.
                Err(rustix::io::Errno::NOBUFS) => Ok(1),
                received => received.map(|(count, _)| count),
            }
        })
        .await
    }
}

async fn drain(
    fd: &AsyncFd<OwnedFd>,
    read: impl Fn(&OwnedFd, &mut [u8]) -> rustix::io::Result<usize>,
) -> io::Result<()> {
    let mut buf = [0; 4096];
    let mut any = false;
    loop {
        let mut guard = fd.readable().await?;
        loop {
            match guard.try_io(|fd| read(fd.get_ref(), &mut buf).map_err(Into::into)) {
                Ok(Ok(_)) => any = true,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => break,
            }
        }
        if any {
            return Ok(());
        }
    }
}
