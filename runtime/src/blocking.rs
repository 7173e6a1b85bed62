//! Work that may have to wait for a disk, beside the pod's tasks.
//!
//! Each piece has a thread of its own. tokio's pool would keep some, but it panics
//! where it cannot have the first, and a node that has no threads left is to be
//! told so.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// How many pieces are being done.
static RUNNING: Mutex<usize> = Mutex::new(0);

/// One has come to its end.
static ENDED: Condvar = Condvar::new();

/// Counts while it lives.
struct Place;

/// Does `work` in a thread, which belongs to the runtime: what is made or dropped
/// there may need its timers and its reactor.
///
/// # Errors
/// The node has no thread for it. The work is dropped by then, here.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (done, result) = oneshot::channel();
    let (place, runtime) = (Place::take(), Handle::current());
    thread::Builder::new().name("work".into()).spawn(move || {
        let _place = place;
        let _entered = runtime.enter();
        // Whoever asked may be gone.
        let _ = done.send(work());
    })?;
    // Without a result there was a panic, which ends a release's process at once.
    result.await.map_err(io::Error::other)
}

/// Drops what may have to wait for a disk when it goes; here, where there is no
/// thread for it: it has to go.
pub async fn discard<T: Send + 'static>(unused: T) {
    if let Err(error) = run(move || drop(unused)).await {
        tracing::debug!(%error, "thread");
    }
}

/// Waits for what is being done that nobody waits for, but not for long.
pub fn finish(patience: Duration) {
    let running = running();
    // Whatever is left ends with the process.
    drop(ENDED.wait_timeout_while(running, patience, |running| *running > 0));
}

fn running() -> MutexGuard<'static, usize> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Place {
    fn take() -> Self {
        *running() += 1;
        Self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *running() -= 1;
        ENDED.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[tokio::test]
    async fn the_result_comes_back() {
        let here = thread::current().id();
        let there = run(move || thread::current().id()).await.unwrap();
        assert_ne!(there, here);
    }

    #[tokio::test]
    async fn the_work_is_of_the_runtime() {
        let is_of_it = run(|| Handle::try_current().is_ok()).await;
        assert!(is_of_it.unwrap());
    }

    #[tokio::test]
    async fn the_end_waits_for_what_is_under_way_and_not_for_ever() {
        let (begun, has_begun) = std::sync::mpsc::channel();
        let (go_on, wait) = std::sync::mpsc::channel::<()>();
        let work = tokio::spawn(run(move || {
            begun.send(()).unwrap();
            let _ = wait.recv();
        }));
        tokio::task::yield_now().await;
        has_begun.recv().unwrap();
        let began = Instant::now();
        finish(Duration::from_millis(50));
        assert!(began.elapsed() >= Duration::from_millis(50));
        drop(go_on);
        work.await.unwrap().unwrap();
    }
}
