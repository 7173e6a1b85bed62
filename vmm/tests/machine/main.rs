//! Machines with tiny kernels on the real `/dev/kvm`.

mod harness;
mod jail;
mod lifecycle;
mod payload;
