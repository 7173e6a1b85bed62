//! Word of changes in a network namespace.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use super::NetworkError;
use super::inspect;
use super::netns::Netns;

/// `RTMGRP_*` and `RTNLGRP_*` of linux/rtnetlink.h: of interfaces, addresses, routes
/// and rules.
const GROUPS: u32 =
    LINK | IPV4_ADDRESS | IPV4_ROUTE | IPV4_RULE | IPV6_ADDRESS | IPV6_ROUTE | IPV6_RULE;
const LINK: u32 = 1;
const IPV4_ADDRESS: u32 = 0x10;
const IPV4_ROUTE: u32 = 0x40;
const IPV4_RULE: u32 = 0x80;
const IPV6_ADDRESS: u32 = 0x100;
const IPV6_ROUTE: u32 = 0x400;
const IPV6_RULE: u32 = 1 << 18;

/// Words that are read in one go. What becomes of our taps is the guest's to change: who
/// serves its pod does other work too.
const AT_ONCE: usize = 64;

/// Until more is read after as many words of our own taps.
const PAUSE: Duration = Duration::from_millis(100);

/// Hears of them from when it is opened on.
#[derive(Debug)]
pub struct NetworkWatch(AsyncFd<OwnedFd>);

impl NetworkWatch {
    /// Of the namespace. Blocks for a moment.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the kernel refuses.
    pub fn open(netns: &Netns) -> Result<OwnedFd, NetworkError> {
        netns.enter(|| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            // NETLINK_ROUTE is protocol 0.
            socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)
                .and_then(|socket| {
                    bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
                    Ok(socket)
                })
                .map_err(|errno| NetworkError::Watch(errno.into()))
        })
    }

    /// Listens on what was opened.
    ///
    /// # Errors
    /// It cannot be polled.
    pub fn new(socket: OwnedFd) -> Result<Self, NetworkError> {
        // SAFETY: an OwnedFd is the same open descriptor until it is dropped.
        let socket = unsafe { AsyncFd::register(socket) };
        socket
            .map(Self)
            .map_err(|error| NetworkError::Watch(error.into()))
    }

    /// Returns when something has changed since the last time; what becomes of our
    /// own taps is none of it.
    ///
    /// # Errors
    /// The kernel tells no more.
    pub async fn changed(&self) -> io::Result<()> {
        let mut word = [0; 16 << 10];
        let mut listen = |socket: &OwnedFd| {
            let mut is_changed = false;
            for _ in 0..AT_ONCE {
                // What is said is looked up: it may not be all.
                match recv(socket, &mut word[..], RecvFlags::empty()) {
                    Ok((length, _)) if is_of_our_tap(&word[..length]) => {}
                    Ok(_) | Err(Errno::NOBUFS) => is_changed = true,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) if is_changed => return Ok(true),
                    Err(errno) => return Err(errno.into()),
                }
            }
            Ok(is_changed)
        };
        while !self.0.async_io(Interest::READABLE, &mut listen).await? {
            sleep(PAUSE).await;
        }
        Ok(())
    }
}

fn is_of_our_tap(word: &[u8]) -> bool {
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(word);
    match message.map(|message| message.payload) {
        Ok(NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link),
        )) => inspect::is_tap(&link),
        // What is not understood may be anything.
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use std::path::Path;
    use std::process::Command;
    use tokio::time::timeout;

    #[tokio::test]
    async fn hears_of_interfaces_and_routes() {
        let (ready, wait) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let holder = std::thread::spawn(move || {
            let made = unshare(CloneFlags::CLONE_NEWNET).is_ok();
            let thread = rustix::thread::gettid().as_raw_nonzero();
            ready
                .send(made.then(|| format!("/proc/self/task/{thread}/ns/net")))
                .unwrap();
            let _ = ended.recv();
        });
        let Some(netns) = wait.recv().unwrap() else {
            return println!("SKIPPED: no network namespace can be made");
        };
        let opened = Netns::open(Path::new(&netns)).unwrap();
        let watch = NetworkWatch::new(NetworkWatch::open(&opened).unwrap()).unwrap();
        let path = format!(
            "--net=/proc/{}{}",
            std::process::id(),
            &netns["/proc/self".len()..]
        );
        for line in [
            "link set lo up",
            "route add 10.9.0.0/16 dev lo",
            "rule add from 10.9.0.1 table 100",
        ] {
            while timeout(Duration::from_millis(50), watch.changed())
                .await
                .is_ok()
            {}
            let mut command = Command::new("nsenter");
            let done = command.arg(&path).arg("ip").args(line.split(' ')).status();
            if !done.is_ok_and(|status| status.success()) {
                return println!("SKIPPED: ip {line}");
            }
            let heard = timeout(Duration::from_secs(5), watch.changed()).await;
            heard
                .unwrap_or_else(|_| panic!("not told of {line}"))
                .unwrap();
        }
        for line in [
            "link add husk7 type veth peer name husk8",
            "link delete husk7",
        ] {
            while timeout(Duration::from_millis(50), watch.changed())
                .await
                .is_ok()
            {}
            let mut command = Command::new("nsenter");
            let command = command.arg(&path).arg("ip").args(line.split(' '));
            assert!(command.status().unwrap().success(), "ip {line}");
            let heard = timeout(Duration::from_millis(200), watch.changed()).await;
            assert!(heard.is_err(), "told of {line}");
        }
        drop(end);
        holder.join().unwrap();
    }
}
