//! Machines with tiny kernels on the real `/dev/kvm`.

mod harness;
mod lifecycle;
mod payload;
