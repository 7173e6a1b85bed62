//! How much a device may move: token buckets.
//!
//! A bucket fills at its rate up to its burst. Whoever moves something takes
//! tokens afterwards, since the length of a frame is not known before it is read;
//! so a bucket can owe, and nobody moves anything while one does. Nothing polls:
//! tokens are counted when somebody asks, and whoever has to wait for them is woken
//! by a timer.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

use crate::{DeviceError, Source};

/// Most tokens a second, and most in a bucket: so much for each nanosecond since
/// the host began is a number that fits.
pub const TOKENS_MAX: u64 = 1 << 44;

const SECOND_NS: u64 = 1_000_000_000;

/// What is slept for when the bucket holds as much: to wake for each token would
/// cost more than to move it.
const PAUSE_NS: u64 = 5_000_000;

/// Longest sleep: a bucket that owes more is asked again in between.
const SLEEP_MAX_NS: i128 = 3600 * SECOND_NS as i128;

/// How fast a bucket fills, and up to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    per_second: u64,
    burst: u64,
}

/// A rate or a burst that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{per_second} a second with a burst of {burst}; both must be from 1 to {TOKENS_MAX}")]
pub struct RateError {
    per_second: u64,
    burst: u64,
}

impl Rate {
    /// `per_second` tokens, of which `burst` can be there at once.
    ///
    /// # Errors
    /// One of them is 0 or above [`TOKENS_MAX`].
    pub fn new(per_second: u64, burst: u64) -> Result<Self, RateError> {
        let fits = |tokens| (1..=TOKENS_MAX).contains(&tokens);
        match fits(per_second) && fits(burst) {
            true => Ok(Self { per_second, burst }),
            false => Err(RateError { per_second, burst }),
        }
    }
}

impl Rate {
    /// For what a driver may have the host do now and then.
    pub(crate) const SELDOM: Self = Self {
        per_second: 1,
        burst: 16,
    };
}

/// What limits one direction of a device; nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes moved.
    pub bytes: Option<Rate>,
    /// Frames or requests.
    pub operations: Option<Rate>,
}

/// Tokens, in parts of which each is worth [`SECOND_NS`]: what comes in a
/// nanosecond is whole then.
#[derive(Debug)]
struct Bucket {
    rate: Rate,
    /// Below zero it owes.
    parts: i128,
    counted_ns: u64,
}

impl Bucket {
    fn full(rate: Rate, now_ns: u64) -> Self {
        Self {
            rate,
            parts: parts(rate.burst),
            counted_ns: now_ns,
        }
    }

    fn refill(&mut self, now_ns: u64) {
        let passed = now_ns.saturating_sub(self.counted_ns);
        self.counted_ns = self.counted_ns.max(now_ns);
        let come = i128::from(passed) * i128::from(self.rate.per_second);
        self.parts = (self.parts + come).min(parts(self.rate.burst));
    }

    fn take(&mut self, tokens: u64) {
        self.parts = self.parts.saturating_sub(parts(tokens));
    }

    /// Nanoseconds until it is worth looking again; none if there are tokens.
    fn wait_ns(&self) -> Option<u64> {
        if self.parts > 0 {
            return None;
        }
        let per_second = i128::from(self.rate.per_second);
        let wanted = parts(self.rate.burst).min(per_second * i128::from(PAUSE_NS));
        let wait = wanted.saturating_sub(self.parts) / per_second + 1;
        // Not above SLEEP_MAX_NS, and above zero.
        Some(wait.min(SLEEP_MAX_NS) as u64)
    }
}

fn parts(tokens: u64) -> i128 {
    i128::from(tokens) * i128::from(SECOND_NS)
}

/// The buckets of one direction of a device, and the timer that says when there
/// are tokens again. It outlives a reset: a driver gets no new burst by one.
#[derive(Debug, Default)]
pub(crate) struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    /// Only where there is a bucket.
    timer: Option<OwnedFd>,
    is_set: bool,
}

impl Limiter {
    /// Full buckets.
    ///
    /// # Errors
    /// There is no timer to be had.
    pub(crate) fn new(limits: Limits) -> io::Result<Self> {
        if limits == Limits::default() {
            return Ok(Self::default());
        }
        let now = now_ns();
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            bytes: limits.bytes.map(|rate| Bucket::full(rate, now)),
            operations: limits.operations.map(|rate| Bucket::full(rate, now)),
            timer: Some(timerfd_create(TimerfdClockId::Monotonic, flags)?),
            is_set: false,
        })
    }

    /// Whether one thing more may be moved. If not, [`Limiter::source`] becomes
    /// readable when it is worth asking again.
    ///
    /// # Errors
    /// The timer could not be set.
    pub(crate) fn allows(&mut self) -> Result<bool, DeviceError> {
        let Some(timer) = &self.timer else {
            return Ok(true);
        };
        let now = now_ns();
        let mut wait = None;
        for bucket in [&mut self.bytes, &mut self.operations]
            .into_iter()
            .flatten()
        {
            bucket.refill(now);
            wait = wait.max(bucket.wait_ns());
        }
        let Some(wait) = wait else {
            return Ok(true);
        };
        if !self.is_set {
            let value = Timespec {
                tv_sec: (wait / SECOND_NS) as i64,
                tv_nsec: (wait % SECOND_NS) as i64,
            };
            let once = Itimerspec {
                it_interval: Timespec::default(),
                it_value: value,
            };
            timerfd_settime(timer, TimerfdTimerFlags::empty(), &once).map_err(|error| {
                DeviceError::Host {
                    what: "setting the timer of a limit",
                    source: error.into(),
                }
            })?;
            self.is_set = true;
        }
        Ok(false)
    }

    /// One thing of `bytes` was moved.
    pub(crate) fn moved(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
    }

    /// What the worker waits for, besides its own.
    pub(crate) fn source(&self, token: u32) -> Option<Source<'_>> {
        self.timer.as_ref().map(|timer| Source {
            fd: timer.as_fd(),
            token,
            readable: true,
            writable: false,
        })
    }

    /// The timer has rung: [`Limiter::allows`] is to be asked again.
    pub(crate) fn woken(&mut self) {
        if let Some(timer) = &self.timer {
            // Empty when it rang for a driver that is gone.
            let _ = rustix::io::read(timer, &mut [0; 8]);
        }
        self.is_set = false;
    }
}

/// A few at once, and then so many a second; who wants more is refused.
#[derive(Debug)]
pub(crate) struct Allowance(Bucket);

impl Allowance {
    pub(crate) fn new(rate: Rate) -> Self {
        Self(Bucket::full(rate, now_ns()))
    }

    /// Whether one more may be, which it then counts as.
    pub(crate) fn spend(&mut self) -> bool {
        self.0.refill(now_ns());
        let may = self.0.wait_ns().is_none();
        if may {
            self.0.take(1);
        }
        may
    }
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // Neither is negative.
    now.tv_sec as u64 * SECOND_NS + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rate(per_second: u64, burst: u64) -> Rate {
        Rate::new(per_second, burst).unwrap()
    }

    #[test]
    fn refuses_nothing_at_all_and_what_does_not_fit() {
        for (per_second, burst) in [(0, 1), (1, 0), (TOKENS_MAX + 1, 1), (1, u64::MAX)] {
            let error = Rate::new(per_second, burst).unwrap_err().to_string();
            assert!(error.contains("both must be from 1 to"), "{error}");
        }
        assert!(Rate::new(TOKENS_MAX, TOKENS_MAX).is_ok());
    }

    #[test]
    fn gives_the_burst_and_then_the_rate() {
        let mut bucket = Bucket::full(rate(1000, 10), 0);
        for _ in 0..10 {
            assert_eq!(bucket.wait_ns(), None);
            bucket.take(1);
        }
        // Five of the ten are there after the pause.
        assert_eq!(bucket.wait_ns(), Some(PAUSE_NS + 1));
        bucket.refill(PAUSE_NS);
        assert_eq!(bucket.parts, parts(5));
        // It never holds more than its burst.
        bucket.refill(u64::MAX);
        assert_eq!(bucket.parts, parts(10));
        // A clock that goes back gives nothing twice.
        bucket.take(10);
        bucket.refill(0);
        bucket.refill(u64::MAX);
        assert_eq!(bucket.parts, 0);
    }

    #[test]
    fn what_was_more_than_the_burst_is_owed() {
        let mut bucket = Bucket::full(rate(100, 1), 0);
        bucket.take(201);
        assert_eq!(bucket.wait_ns(), Some(2 * SECOND_NS + PAUSE_NS + 1));
        bucket.refill(2 * SECOND_NS);
        assert!(bucket.wait_ns().is_some());
        bucket.refill(2 * SECOND_NS + 1);
        assert_eq!(bucket.wait_ns(), None);
        // However much it is, the sum holds and the sleep has an end.
        for _ in 0..1000 {
            bucket.take(u64::MAX);
        }
        assert_eq!(bucket.wait_ns(), Some(SLEEP_MAX_NS as u64));
    }

    proptest! {
        /// Whoever takes when it may, and sleeps when it may not, gets the rate.
        #[test]
        fn holds_the_rate(
            per_second in 1..=TOKENS_MAX,
            burst in 1..=TOKENS_MAX,
            sizes in prop::collection::vec(1..=1_u64 << 20, 1..50),
        ) {
            let mut bucket = Bucket::full(rate(per_second, burst), 7);
            let (mut now, mut moved) = (7_u64, 0_u128);
            for size in &sizes {
                let mut rounds = 0;
                while let Some(wait) = bucket.wait_ns() {
                    now += wait;
                    bucket.refill(now);
                    rounds += 1;
                    prop_assert!(rounds < 1000);
                }
                bucket.take(*size);
                moved += u128::from(*size);
            }
            let last = u128::from(*sizes.last().unwrap());
            let come = u128::from(now - 7) * u128::from(per_second) / u128::from(SECOND_NS);
            prop_assert!(moved - last <= u128::from(burst) + come + 1);
            // Nor less, but for what a nanosecond is worth at each wake-up.
            let lost = sizes.len() as u128 * (u128::from(per_second) / u128::from(SECOND_NS) + 2);
            prop_assert!(come <= moved + lost);
        }
    }
}
