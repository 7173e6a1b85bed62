//! What has come of a process's output, and when that is all of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::agent_client::Written;

/// Output counts as complete, though somebody holds it open, when nothing came
/// for so long after the process ended.
const QUIET: Duration = Duration::from_millis(500);

/// How far the copy of one stream is.
#[derive(Debug, Default)]
pub struct Progress {
    taken: AtomicU64,
    passed_on: AtomicU64,
    ended: AtomicBool,
}

/// The outputs of one process; none: it does not have that one.
#[derive(Debug, Default)]
pub struct Outputs {
    pub stdout: Option<Arc<Progress>>,
    pub stderr: Option<Arc<Progress>>,
    /// So much is to come; none: nobody told.
    written: Option<Written>,
    /// That is exact.
    is_counted: bool,
}

/// How long the end of output may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Until somebody reads what is there.
    pub slow_reader: Duration,
    /// Until the guest has sent what it says it has, the time apart for which
    /// nobody reads.
    pub stalled: Duration,
    /// Until others have written what they want, when all is there that the
    /// process wrote.
    pub others: Duration,
}

/// Decides when waiting has an end.
#[derive(Debug)]
pub struct Wait {
    limits: Limits,
    began: Instant,
    moved: u64,
    /// When it moved last.
    since: Instant,
    looked: Instant,
    /// How long the guest could have sent something.
    guest_had: Duration,
    /// When all was there that the process wrote.
    complete: Option<Instant>,
}

impl Progress {
    /// Bytes came from the guest.
    pub fn take(&self, count: usize) {
        self.taken.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// They were passed on.
    pub fn pass_on(&self, count: usize) {
        self.passed_on.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// There will be no more.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    fn moved(&self) -> (u64, u64) {
        let taken = self.taken.load(Ordering::Relaxed);
        (taken, self.passed_on.load(Ordering::Relaxed))
    }

    /// Whoever reads is slow.
    fn is_blocked(&self) -> bool {
        let (taken, passed_on) = self.moved();
        passed_on < taken && !self.has_ended()
    }

    fn misses(&self, written: u64) -> bool {
        self.moved().0 < written && !self.has_ended()
    }

    fn is_complete(&self, written: u64) -> bool {
        self.moved().1 >= written || self.has_ended()
    }
}

impl Outputs {
    /// None yet; with `is_counted` what is told of them is exact.
    pub fn new(is_counted: bool) -> Self {
        Self {
            is_counted,
            ..Self::default()
        }
    }

    /// The process has ended and wrote so much.
    pub fn expect(&mut self, written: Written) {
        self.written = Some(written);
    }

    /// Nothing is waited for any more that is only said to be there.
    fn forget(&mut self) {
        self.written = None;
    }

    fn all(&self) -> impl Iterator<Item = &Progress> {
        [&self.stdout, &self.stderr]
            .into_iter()
            .filter_map(|progress| progress.as_deref())
    }

    fn moved(&self) -> u64 {
        let sums = self.all().map(|progress| {
            let (taken, passed_on) = progress.moved();
            taken.wrapping_add(passed_on)
        });
        sums.fold(0, u64::wrapping_add)
    }

    /// Each output and how much was written to it, if that was told.
    fn told(&self) -> Option<impl Iterator<Item = (&Progress, u64)>> {
        let Written { stdout, stderr } = self.written?;
        let outputs = [(&self.stdout, stdout), (&self.stderr, stderr)];
        let there = outputs.into_iter();
        Some(there.filter_map(|(progress, written)| Some((progress.as_deref()?, written))))
    }

    fn misses(&self) -> bool {
        self.told()
            .is_some_and(|mut told| told.any(|(progress, written)| progress.misses(written)))
    }

    /// All is passed on that the process wrote.
    fn is_complete(&self) -> bool {
        let told = self.told().filter(|_| self.is_counted);
        told.is_some_and(|mut told| told.all(|(progress, written)| progress.is_complete(written)))
    }
}

impl Wait {
    /// Begins to wait.
    pub fn new(outputs: &Outputs, limits: Limits) -> Self {
        let now = Instant::now();
        Self {
            limits,
            began: now,
            moved: outputs.moved(),
            since: now,
            looked: now,
            guest_had: Duration::ZERO,
            complete: None,
        }
    }

    /// It is time to stop; to be asked again and again.
    pub fn is_over(&mut self, outputs: &mut Outputs) -> bool {
        let now = Instant::now();
        let passed = now - self.looked;
        self.looked = now;
        let moved = outputs.moved();
        if moved != self.moved {
            (self.moved, self.since) = (moved, now);
        }
        if now - self.began >= self.limits.slow_reader + self.limits.stalled {
            // Somebody writes without end to somebody who reads.
            return true;
        }
        if outputs.is_complete() {
            let complete = *self.complete.get_or_insert(now);
            if now - complete >= self.limits.others {
                return true;
            }
        }
        let still = now - self.since;
        if outputs.all().any(Progress::is_blocked) {
            return still >= self.limits.slow_reader;
        }
        self.guest_had += passed;
        if self.guest_had >= self.limits.stalled {
            // A guest may say anything. It is believed for so long, once.
            outputs.forget();
            return true;
        }
        !outputs.misses() && still >= QUIET
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    const LIMITS: Limits = Limits {
        slow_reader: Duration::from_secs(2),
        stalled: Duration::from_secs(10),
        others: Duration::from_secs(3),
    };

    fn outputs(written: u64) -> (Outputs, Arc<Progress>) {
        let progress = Arc::new(Progress::default());
        let mut outputs = Outputs::new(true);
        outputs.stdout = Some(Arc::clone(&progress));
        outputs.expect(Written {
            stdout: written,
            // Of a stream that is not there.
            stderr: 7,
        });
        (outputs, progress)
    }

    async fn over_after(outputs: &mut Outputs, mut each_tick: impl FnMut()) -> Duration {
        let began = Instant::now();
        let mut wait = Wait::new(outputs, LIMITS);
        while !wait.is_over(outputs) {
            advance(Duration::from_millis(50)).await;
            each_tick();
        }
        began.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_what_was_written() {
        let (mut outputs, progress) = outputs(3);
        let mut tick = 0;
        let took = over_after(&mut outputs, || {
            tick += 1;
            if tick == 100 {
                progress.take(3);
                progress.pass_on(3);
            }
        });
        assert_eq!(took.await, Duration::from_millis(5500));
    }

    #[tokio::test(start_paused = true)]
    async fn believes_a_guest_once_and_not_for_long() {
        let (mut outputs, progress) = outputs(u64::MAX);
        // However little and however often it sends.
        let trickle = || {
            progress.take(1);
            progress.pass_on(1);
        };
        assert_eq!(over_after(&mut outputs, trickle).await, LIMITS.stalled);
        assert_eq!(over_after(&mut outputs, || {}).await, QUIET);
    }

    #[tokio::test(start_paused = true)]
    async fn does_not_blame_the_guest_for_a_slow_reader() {
        let (mut outputs, progress) = outputs(4);
        progress.take(2);
        assert_eq!(over_after(&mut outputs, || {}).await, LIMITS.slow_reader);
        // What is missing is still waited for.
        progress.pass_on(2);
        assert_eq!(over_after(&mut outputs, || {}).await, LIMITS.stalled);
    }

    #[tokio::test(start_paused = true)]
    async fn does_not_wait_for_two_that_go_on_for_ever() {
        let (mut outputs, progress) = outputs(u64::MAX);
        progress.take(1);
        let slow = || {
            progress.take(1);
            progress.pass_on(1);
        };
        let longest = LIMITS.slow_reader + LIMITS.stalled;
        assert_eq!(over_after(&mut outputs, slow).await, longest);
    }

    #[tokio::test(start_paused = true)]
    async fn does_not_wait_for_children_that_go_on_writing() {
        let (mut outputs, progress) = outputs(4);
        let children = || {
            progress.take(1);
            progress.pass_on(1);
        };
        let fourth = Duration::from_millis(4 * 50);
        assert_eq!(
            over_after(&mut outputs, children).await,
            fourth + LIMITS.others
        );
        // Of a terminal nobody knows whose output it was.
        outputs.is_counted = false;
        assert_eq!(over_after(&mut outputs, children).await, LIMITS.stalled);
    }

    #[tokio::test(start_paused = true)]
    async fn expects_nothing_of_a_stream_that_has_ended() {
        let (mut outputs, progress) = outputs(4);
        progress.end();
        assert_eq!(over_after(&mut outputs, || {}).await, QUIET);
    }
}
