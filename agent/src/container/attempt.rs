//! The making of a process, which somebody may give up before it is done: who
//! has stopped waiting for it must not find it running later.

use tokio::sync::watch;

use super::launch::LaunchError;

/// Held by who makes the process.
#[derive(Debug)]
pub struct Attempt(watch::Receiver<bool>);

/// Held by whom others ask for the process.
#[derive(Debug, Clone)]
pub struct Underway(watch::Sender<bool>);

/// Both ends of one.
pub fn attempt() -> (Attempt, Underway) {
    let (given_up, attempt) = watch::channel(false);
    (Attempt(attempt), Underway(given_up))
}

impl Attempt {
    /// Works until that happens.
    pub async fn work<T, E: From<LaunchError>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let mut given_up = self.0.clone();
        tokio::select! {
            biased;
            Ok(_) = given_up.wait_for(|given_up| *given_up) => Err(LaunchError::GivenUp.into()),
            done = work => done,
        }
    }
}

impl Underway {
    /// Ends the attempt, soon.
    pub fn give_up(&self) {
        self.0.send_replace(true);
    }

    /// Returns when the attempt is over, whatever came of it.
    pub async fn over(&self) {
        self.0.closed().await;
    }
}
