//! Memory that the shim plugs once it knows the guest: a copy of a template begins
//! with less than its pod needs.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::lock::lock;

/// How long it is waited for; what comes later still comes.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often is looked. The kernel says nothing of it.
const PAUSE: Duration = Duration::from_millis(2);

/// The kernel plugs whole pieces of at most 4 MiB, and none that is asked for in part;
/// so much more may be missing, bytes.
const PIECES: u64 = 8 << 20;

/// What the machine is to have before a program runs.
#[derive(Debug, Default)]
pub struct Expected(Mutex<Option<u64>>);

impl Expected {
    /// So many MiB more than now.
    pub fn more(&self, mib: u32) {
        if mib > 0 {
            let bytes = total().saturating_add(u64::from(mib) << 20);
            *lock(&self.0) = Some(bytes.saturating_sub(PIECES));
        }
    }

    /// Waits until it is there, or for long enough.
    pub async fn wait(&self) {
        self.wait_for(PATIENCE).await;
    }

    async fn wait_for(&self, patience: Duration) {
        let Some(bytes) = *lock(&self.0) else { return };
        let come = async {
            while total() < bytes {
                sleep(PAUSE).await;
            }
        };
        if timeout(patience, come).await.is_err() {
            let (is, wanted) = (total() >> 20, bytes >> 20);
            log::warn!("the machine has {is} MiB of memory, and should have {wanted}");
        }
        *lock(&self.0) = None;
    }
}

/// What the guest has, bytes.
fn total() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[tokio::test]
    async fn a_program_waits_for_memory_but_not_for_ever() {
        let expected = Expected::default();
        let began = Instant::now();
        expected.more(0);
        expected.wait().await;
        // No more than may be missing.
        expected.more(8);
        expected.wait().await;
        assert!(began.elapsed() < PATIENCE);
        // More than there is.
        expected.more(u32::MAX);
        let (began, patience) = (Instant::now(), Duration::from_millis(300));
        expected.wait_for(patience).await;
        assert!(began.elapsed() >= patience);
        // The next program does not wait again.
        expected.wait().await;
        assert!(began.elapsed() < PATIENCE);
    }
}
