//! Machines with tiny kernels on the real `/dev/kvm`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a helper that fails is a test that fails"
)]

mod attack;
mod devices;
mod driver;
mod faults;
mod files;
mod hang;
mod harness;
mod hostile;
mod hotplug;
mod jail;
mod lifecycle;
mod payload;
mod saved;
