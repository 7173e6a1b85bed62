//! The main thread: control socket, pausing, plugging.

use super::{Allowed, any, only};

// linux/kvm.h.
const KVM_IRQFD: u64 = 0x4020_ae76;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;
const KVM_GET_MSR_INDEX_LIST: u64 = 0xc004_ae02;
const KVM_GET_CLOCK: u64 = 0x8030_ae7c;

// linux/fs.h.
const BLKSSZGET: u64 = 0x1268;
const BLKPBSZGET: u64 = 0x127b;

// linux/if_tun.h.
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;

pub(super) const ALLOWED: &[Allowed] = &[
    // Waits for requests and the machine's end.
    any(libc::SYS_ppoll),
    // Control packets.
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    // Kicks processors out of the guest.
    any(libc::SYS_tgkill),
    any(libc::SYS_getpid),
    // A plugged device's notifications and interrupt vectors.
    any(libc::SYS_eventfd2),
    // The timer of a plugged device's limit.
    only(libc::SYS_timerfd_create, 0, &[libc::CLOCK_MONOTONIC as u64]),
    // An unplugged device's.
    only(libc::SYS_ioctl, 1, &[KVM_IRQFD, KVM_IOEVENTFD]),
    // A plugged disk: what it is and how large.
    only(libc::SYS_ioctl, 1, &[BLKSSZGET, BLKPBSZGET]),
    only(libc::SYS_fcntl, 1, &[libc::F_GETFL as u64]),
    any(libc::SYS_statx),
    any(libc::SYS_lseek),
    // A machine that is saved: what KVM would have saved, and the guest's clock.
    only(libc::SYS_ioctl, 1, &[KVM_GET_MSR_INDEX_LIST, KVM_GET_CLOCK]),
    // A plugged interface: its tap's header and offloads.
    only(libc::SYS_ioctl, 1, &[TUNSETOFFLOAD, TUNSETVNETHDRSZ]),
    only(libc::SYS_fcntl, 1, &[libc::F_SETFL as u64]),
    // A plugged file system: the first talk with its server.
    any(libc::SYS_recvfrom),
    any(libc::SYS_shutdown),
];
