//! A processor's thread: the guest, and what the guest's accesses to devices
//! cause at once.

use super::{Allowed, any, only};

// Numbers of the ioctls of linux/kvm.h.
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
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
            // Where it was when KVM gave up, for the error message.
            KVM_GET_REGS,
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
];
