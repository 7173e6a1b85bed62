//! A processor's thread: the guest, and what the guest's accesses to devices
//! cause at once.

use super::{Allowed, any, only};

// Numbers of the ioctls of linux/kvm.h.
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_GET_MP_STATE: u64 = 0x8004_ae98;
const KVM_GET_XSAVE: u64 = 0x9000_aea4;
const KVM_GET_XCRS: u64 = 0x8188_aea6;
const KVM_GET_DEBUGREGS: u64 = 0x8080_aea1;
const KVM_GET_LAPIC: u64 = 0x8400_ae8e;
const KVM_GET_MSRS: u64 = 0xc008_ae88;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
const KVM_GET_TSC_KHZ: u64 = 0xaea3;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
const KVM_SET_GSI_ROUTING: u64 = 0x4008_ae6a;
const KVM_IRQFD: u64 = 0x4020_ae76;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;

/// linux/if_tun.h.
const TUNSETOFFLOAD: u64 = 0x4004_54d0;

pub(super) const ALLOWED: &[Allowed] = &[
    only(
        libc::SYS_ioctl,
        1,
        &[
            // The guest.
            KVM_RUN,
            // Where it was when it crashed or KVM gave up, for the log.
            KVM_GET_REGS,
            KVM_GET_SREGS,
            // The rest of its state, when it is saved.
            KVM_GET_MP_STATE,
            KVM_GET_XSAVE,
            KVM_GET_XCRS,
            KVM_GET_DEBUGREGS,
            KVM_GET_LAPIC,
            KVM_GET_MSRS,
            KVM_GET_VCPU_EVENTS,
            KVM_GET_TSC_KHZ,
            // Tells it that it was paused.
            KVM_KVMCLOCK_CTRL,
            // It masks or moves an interrupt vector.
            KVM_SET_GSI_ROUTING,
            KVM_IRQFD,
            // It moves a device's registers.
            KVM_IOEVENTFD,
        ],
    ),
    // The driver chooses a tap's offloads as the device starts to work.
    only(libc::SYS_ioctl, 1, &[TUNSETOFFLOAD]),
    // Whether an interrupt vector has one pending.
    any(libc::SYS_ppoll),
    // A shared file system starts to work: its server gets memory and queues.
    any(libc::SYS_sendmsg),
    any(libc::SYS_recvfrom),
    any(libc::SYS_shutdown),
    only(libc::SYS_fcntl, 1, &[libc::F_DUPFD_CLOEXEC as u64]),
];
