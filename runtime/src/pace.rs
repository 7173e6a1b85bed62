//! How fast something that the guest decides may cost the shim work. Whoever does
//! the work takes for it what it turned out to be, and waits while more was taken
//! than there was.

use std::time::Duration;

use tokio::time::{Instant, sleep};

const SECOND_NS: i128 = 1_000_000_000;

/// Shortest wait: to wake for every little bit would be work as well.
const SHORTEST: Duration = Duration::from_millis(10);

/// So much at once, and so much a second.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// At once.
    pub burst: u32,
    /// In a second.
    pub per_second: u32,
}

/// What is left of a rate.
#[derive(Debug)]
pub struct Pace {
    rate: Rate,
    /// Each is worth [`SECOND_NS`]: what comes in a nanosecond is whole then.
    left: i128,
    counted: Instant,
}

impl Pace {
    /// All of the burst.
    pub fn new(rate: Rate) -> Self {
        Self {
            rate,
            left: i128::from(rate.burst) * SECOND_NS,
            counted: Instant::now(),
        }
    }

    /// So much work was done.
    pub fn take(&mut self, work: usize) {
        // More than any message has.
        let work = u32::try_from(work).unwrap_or(u32::MAX);
        self.left -= i128::from(work) * SECOND_NS;
    }

    /// How long to wait before more is done; none: not at all.
    pub fn wait(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let passed = now.duration_since(self.counted).as_nanos();
        self.counted = now;
        let passed = i128::try_from(passed).unwrap_or(SECOND_NS);
        let come = passed.saturating_mul(self.rate.per_second.into());
        let most = i128::from(self.rate.burst) * SECOND_NS;
        self.left = self.left.saturating_add(come).min(most);
        if self.left > 0 {
            return None;
        }
        let wait = -self.left / i128::from(self.rate.per_second.max(1));
        let wait = Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX));
        Some(wait.max(SHORTEST))
    }

    /// Waits until more may be done.
    pub async fn ready(&mut self) {
        while let Some(wait) = self.wait() {
            sleep(wait).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_and_then_the_rate() {
        let mut pace = Pace::new(Rate {
            burst: 100,
            per_second: 10,
        });
        let began = Instant::now();
        for _ in 0..10 {
            pace.ready().await;
            pace.take(10);
        }
        assert_eq!(began.elapsed(), Duration::ZERO);
        for _ in 0..10 {
            pace.ready().await;
            pace.take(10);
        }
        let elapsed = began.elapsed();
        assert!(elapsed >= Duration::from_secs(9), "{elapsed:?}");
        assert!(elapsed <= Duration::from_secs(10), "{elapsed:?}");
        // What nobody does is not saved up.
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(pace.wait(), None);
        pace.take(101);
        assert!(pace.wait().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn whatever_is_taken_fits() {
        let mut pace = Pace::new(Rate {
            burst: u32::MAX,
            per_second: 0,
        });
        for _ in 0..1000 {
            pace.take(usize::MAX);
        }
        assert!(pace.wait() > Some(Duration::from_secs(1000)));
    }
}
