//! Husk's file server: shows a pod's root file systems and volumes to its VM
//! over virtio-fs (FUSE in a virtqueue, vhost-user to the VMM).
//!
//! [`server`] speaks FUSE and knows nothing of virtio; everything below it is
//! one noun each.

pub mod abi;
pub mod area;
pub mod buffers;
pub mod credentials;
pub mod directory;
pub mod handle;
pub mod host;
pub mod jail;
pub mod mount_table;
pub mod name;
pub mod node;
pub mod seccomp;
pub mod server;
pub mod vhost_user;
