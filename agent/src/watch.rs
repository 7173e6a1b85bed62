//! Waits for the kernel to say that a file has changed, and for devices to
//! appear. Nothing here polls: the watch is set first, then the state is read.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;

use crate::socket::registered;

/// Changes of one file, such as `cgroup.events`.
#[derive(Debug)]
pub struct FileWatch(AsyncFd<OwnedFd>);

impl FileWatch {
    /// From now on.
    pub fn new(path: &Path) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        inotify::add_watch(&fd, path, WatchFlags::MODIFY)?;
        Ok(Self(registered(fd)?))
    }

    /// Returns after at least one change since the last call.
    pub async fn changed(&self) -> io::Result<()> {
        drain(&self.0, |fd, buf| rustix::io::read(fd, buf)).await
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
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            Some(KOBJECT_UEVENT),
        )?;
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
