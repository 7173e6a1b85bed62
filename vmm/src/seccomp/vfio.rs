//! What the threads of a machine that may get PCI devices of the node do besides.
//! The calls reach only what such a device's descriptors lead to.

use super::{Allowed, any, only};

// linux/vfio.h: `_IO(';', 100 + n)`.
const BASE: u64 = 0x3b64;
/// `VFIO_DEVICE_GET_INFO`.
pub(crate) const DEVICE_GET_INFO: u64 = BASE + 7;
/// `VFIO_DEVICE_GET_REGION_INFO`.
pub(crate) const DEVICE_GET_REGION_INFO: u64 = BASE + 8;
/// `VFIO_DEVICE_GET_IRQ_INFO`.
pub(crate) const DEVICE_GET_IRQ_INFO: u64 = BASE + 9;
/// `VFIO_DEVICE_SET_IRQS`.
pub(crate) const DEVICE_SET_IRQS: u64 = BASE + 10;
/// `VFIO_DEVICE_RESET`.
pub(crate) const DEVICE_RESET: u64 = BASE + 11;
/// `VFIO_IOMMU_MAP_DMA`.
pub(crate) const IOMMU_MAP_DMA: u64 = BASE + 13;
/// `VFIO_IOMMU_UNMAP_DMA`.
pub(crate) const IOMMU_UNMAP_DMA: u64 = BASE + 14;

// linux/kvm.h.
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const KVM_CREATE_DEVICE: u64 = 0xc00c_aee0;
const KVM_SET_DEVICE_ATTR: u64 = 0x4018_aee1;

pub(super) const MAIN: &[Allowed] = &[
    // A device that comes: what it is, and the memory that it reaches.
    only(
        libc::SYS_ioctl,
        1,
        &[
            DEVICE_GET_INFO,
            DEVICE_GET_REGION_INFO,
            DEVICE_GET_IRQ_INFO,
            IOMMU_MAP_DMA,
            KVM_CREATE_DEVICE,
            KVM_SET_DEVICE_ATTR,
        ],
    ),
    // One that goes.
    only(
        libc::SYS_ioctl,
        1,
        &[DEVICE_SET_IRQS, DEVICE_RESET, KVM_SET_USER_MEMORY_REGION],
    ),
    // Its configuration space.
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
];

pub(super) const VCPU: &[Allowed] = &[
    // The guest moves its registers, or switches its interrupts.
    only(
        libc::SYS_ioctl,
        1,
        &[KVM_SET_USER_MEMORY_REGION, DEVICE_SET_IRQS],
    ),
    // Registers that are not mapped.
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
];

pub(super) const DEVICES: &[Allowed] = &[
    // Memory is plugged and unplugged, which devices then reach or not.
    only(libc::SYS_ioctl, 1, &[IOMMU_MAP_DMA, IOMMU_UNMAP_DMA]),
];
