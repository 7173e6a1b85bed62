//! virtio-net on a real tap, in a network namespace of its own, with frames from
//! the host's side, and with limits.
#![no_main]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use husk_fuzz::driver::{Act, drive};
use husk_fuzz::skip;
use husk_virtio::net::Net;
use husk_virtio::rate::{Limits, Rate};
use libfuzzer_sys::fuzz_target;

/// A tap that is up, and a packet socket on its interface: frames sent there
/// come out of the tap.
struct Link {
    tap: File,
    socket: OwnedFd,
    index: i32,
}

/// `struct ifreq`: a name, then flags or an index.
fn ifreq() -> [u8; 40] {
    let mut request = [0; 40];
    request[..4].copy_from_slice(b"tap0");
    request
}

fn link() -> Result<Link, &'static str> {
    // SAFETY: the process has only one thread so far, and no sockets.
    let left = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0
        // SAFETY: as above.
        || unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) } == 0;
    if !left {
        return Err("no network namespace to be had");
    }
    let tap = File::options().read(true).write(true).open("/dev/net/tun");
    let tap = tap.map_err(|_| "no /dev/net/tun")?;
    let mut request = ifreq();
    // IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    request[16..18].copy_from_slice(&0x5002_u16.to_le_bytes());
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`.
    if unsafe { libc::ioctl(tap.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) } != 0 {
        return Err("no tap to be had");
    }
    // ETH_P_ALL would bring back what the guest sends.
    // SAFETY: makes a descriptor.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, 0) };
    if socket < 0 {
        return Err("no packet socket to be had");
    }
    // SAFETY: just made, and owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut request = ifreq();
    request[16..18].copy_from_slice(&(libc::IFF_UP as u16).to_le_bytes());
    // SAFETY: reads a `struct ifreq`.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, request.as_mut_ptr()) } != 0 {
        return Err("the tap does not come up");
    }
    let mut request = ifreq();
    // SAFETY: writes a `struct ifreq`.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, request.as_mut_ptr()) } != 0 {
        return Err("the tap has no index");
    }
    let index = i32::from_le_bytes(request[16..20].try_into().expect("four bytes"));
    Ok(Link { tap, socket, index })
}

fn send(link: &Link, frame: &[u8]) {
    // SAFETY: all zeroes is such an address.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_ifindex = link.index;
    let len = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: reads frame and address.
    unsafe {
        let to = (&raw const to).cast();
        libc::sendto(
            link.socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            to,
            len,
        );
    }
}

static LINK: LazyLock<Link> = LazyLock::new(|| link().unwrap_or_else(|why| skip(why)));

#[derive(Arbitrary, Debug)]
struct Input {
    /// Bits, from the lowest: bytes are limited, frames are.
    limited: u8,
    acts: Vec<Act<Vec<u8>>>,
}

/// One frame, and the next ones within the same input: a larger burst is never used
/// up, since the driver waits for most of what it asks.
fn limits(limited: u8) -> Limits {
    let rate = |bit, per_second, burst| (limited & bit != 0).then(|| Rate::new(per_second, burst));
    Limits {
        bytes: rate(1, 1 << 20, 64).transpose().expect("a rate"),
        operations: rate(2, 10_000, 1).transpose().expect("a rate"),
    }
}

fuzz_target!(init: husk_fuzz::start(), |input: Input| {
    let tap = LINK.tap.try_clone().expect("a descriptor");
    let mut device = Net::new(tap.into(), [2, 0, 0, 0, 0, 1], 1500).expect("it is a tap");
    device.limit(limits(input.limited)).expect("a timer");
    drive(device, input.acts, |_, frame| send(&LINK, &frame));
});
