//! Host ports of a guest's vsock: each is handed out once in a pod's life.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use husk_protocol::port;

/// The ports of one pod.
#[derive(Clone, Debug)]
pub struct Ports(Arc<AtomicU32>);

impl Default for Ports {
    fn default() -> Self {
        Self(Arc::new(AtomicU32::new(port::FIRST_STREAM)))
    }
}

impl Ports {
    /// The first of `count` ports in a row.
    pub fn take(&self, count: u32) -> u32 {
        self.0.fetch_add(count, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_each_once() {
        let ports = Ports::default();
        let first = ports.take(3);
        assert_eq!(first, port::FIRST_STREAM);
        assert_eq!(ports.clone().take(1), first + 3);
        assert_eq!(ports.take(1), first + 4);
    }
}
