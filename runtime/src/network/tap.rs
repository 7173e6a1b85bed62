//! A tap interface for the machine.

use std::ffi::{c_int, c_ulong};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::NetworkError;
use super::inspect::FoundLink;

/// `virtio_net_hdr_v1` (virtio 1.2, 5.1.6), the header before each frame.
const VNET_HEADER_BYTES: c_int = 12;

/// A tap and the name it was made under.
pub(super) struct Tap {
    pub(super) fd: OwnedFd,
    pub(super) name: String,
}

/// Makes the tap for `link` in the namespace of the calling thread. It lives as
/// long as its descriptor.
///
/// # Errors
/// Which step the kernel refused.
pub(super) fn create(link: &FoundLink) -> Result<Tap, NetworkError> {
    // Unique in its namespace, and well below IFNAMSIZ.
    let name = format!("husk{}", link.id.index);
    let fail = |what| {
        let name = name.clone();
        let interface = link.id.name.clone();
        move |source| NetworkError::Tap {
            name,
            interface,
            what,
            source,
        }
    };

    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(fail("open /dev/net/tun"))?;

    // SAFETY: ifreq is plain old data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    ioctl(&tun, libc::TUNSETIFF as c_ulong, &request).map_err(fail("TUNSETIFF"))?;
    ioctl(&tun, libc::TUNSETVNETHDRSZ as c_ulong, &VNET_HEADER_BYTES)
        .map_err(fail("TUNSETVNETHDRSZ"))?;

    // The namespace's stack must not speak to the guest through it.
    let switch = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    match std::fs::write(&switch, "1") {
        // A kernel without IPv6 has nothing to switch off.
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(fail("disable IPv6")(error));
        }
        _ => {}
    }
    Ok(Tap {
        fd: tun.into(),
        name,
    })
}

fn ioctl<T>(tun: &File, request: c_ulong, argument: &T) -> io::Result<()> {
    // SAFETY: both requests only read their argument, which is a live reference
    // to the type that linux/if_tun.h names for them.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), request, argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
