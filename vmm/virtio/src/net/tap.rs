//! A tap: frames with virtio's header in front, and what its reader can take.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::HEADER_BYTES;
use crate::rate::{Allowance, Rate};

// linux/if_tun.h
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;
/// `_IOW('T', 208, unsigned int)`
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0_u32 as _;
/// `_IOW('T', 216, int)`
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8_u32 as _;

/// An open tap.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    /// Those that the kernel has been told.
    flags: u32,
    /// Each takes the lock of all of the node's networks, and is told to whoever
    /// watches the pod's.
    changes: Allowance,
    /// A socket that stands in for a tap knows none of its calls.
    #[cfg(test)]
    pub stand_in: Option<std::sync::Arc<std::sync::atomic::AtomicU32>>,
}

impl Tap {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let size = HEADER_BYTES as libc::c_int;
        // SAFETY: the call reads an int from the address, which is that of one.
        if unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) } < 0 {
            return Err(io::Error::last_os_error());
        }
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        let tap = Self {
            fd,
            flags: 0,
            changes: Allowance::new(Rate::SELDOM),
            #[cfg(test)]
            stand_in: None,
        };
        tap.set_flags(0)?;
        Ok(tap)
    }

    #[cfg(test)]
    pub(super) fn stand_in(socket: OwnedFd) -> Self {
        Self {
            fd: socket,
            flags: 0,
            changes: Allowance::new(Rate::SELDOM),
            stand_in: Some(Default::default()),
        }
    }

    /// The kernel knows segmentation of UDP.
    pub(super) fn segments_udp(&self) -> bool {
        let known = self.set_flags(TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6).is_ok();
        known && self.set_flags(0).is_ok()
    }

    /// Tells the kernel which of [`super::GUEST_OFFLOADS`] the reader takes.
    ///
    /// # Errors
    /// The kernel refuses, or was told something else too often lately.
    pub(super) fn set_offloads(&mut self, offloads: u64) -> io::Result<()> {
        let flags = tun_flags(offloads);
        if flags == self.flags {
            return Ok(());
        }
        if !self.changes.spend() {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        self.set_flags(flags)?;
        self.flags = flags;
        Ok(())
    }

    pub(super) fn set_flags(&self, flags: u32) -> io::Result<()> {
        #[cfg(test)]
        if let Some(last) = &self.stand_in {
            last.store(flags, std::sync::atomic::Ordering::Relaxed);
            return Ok(());
        }
        // SAFETY: the argument of this call is a number.
        match unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A tap refuses offloads whose foundation is missing: any without checksums, ECN
/// without TCP segmentation, and UDP segmentation of one IP version alone.
pub(super) fn tun_flags(offloads: u64) -> u32 {
    let has = |feature: u32| offloads & 1 << feature != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = TUN_F_CSUM;
    if has(VIRTIO_NET_F_GUEST_TSO4) {
        flags |= TUN_F_TSO4;
    }
    if has(VIRTIO_NET_F_GUEST_TSO6) {
        flags |= TUN_F_TSO6;
    }
    if has(VIRTIO_NET_F_GUEST_ECN) && flags != TUN_F_CSUM {
        flags |= TUN_F_TSO_ECN;
    }
    if has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6) {
        flags |= TUN_F_USO4 | TUN_F_USO6;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::super::GUEST_OFFLOADS;
    use super::*;

    #[test]
    fn offloads_become_flags_of_the_tap() {
        let all = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_USO4 | TUN_F_USO6;
        assert_eq!(tun_flags(GUEST_OFFLOADS), all);
        let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
        assert_eq!(tun_flags(GUEST_OFFLOADS & !csum), 0);
        assert_eq!(
            tun_flags(csum | 1 << VIRTIO_NET_F_GUEST_TSO6),
            TUN_F_CSUM | TUN_F_TSO6
        );
        let tso = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        assert_eq!(tun_flags(GUEST_OFFLOADS & !tso), all & !0xe);
        let uso6 = 1 << VIRTIO_NET_F_GUEST_USO6;
        assert_eq!(tun_flags(GUEST_OFFLOADS & !uso6), all & !0x60);
    }
}
