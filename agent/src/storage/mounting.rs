//! Storages, mounted one after another for somebody who does not wait for ever.

use std::io;
use std::time::Duration;

use husk_protocol::agent::Storage;
use husk_protocol::deadline;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Mounted, StorageError, begin_mount, unmount_all};
use crate::container::attempt::Attempt;
use crate::error::{Doing, Error};

/// How long the storages of a request may take altogether: a mount ends when disk or
/// server have answered, and it takes no signal before.
const PATIENCE: Duration = Duration::from_secs(50);

/// How much longer for the one that nobody wants any more.
const LAST_PATIENCE: Duration = Duration::from_secs(2);

// Who asks hears of it.
const _: () = assert!(PATIENCE.as_secs() + LAST_PATIENCE.as_secs() < deadline::MAKING.as_secs());

/// Storages on their way.
#[derive(Default)]
struct Mounting {
    mounted: Vec<Mounted>,
    underway: Option<JoinHandle<Result<Mounted, StorageError>>>,
}

impl Mounting {
    async fn add_all(&mut self, storages: Vec<Storage>) -> Result<(), StorageError> {
        let end = Instant::now() + PATIENCE;
        for storage in storages {
            let mount_point = storage.mount_point.clone();
            let underway = begin_mount(storage).await?;
            self.add(underway, mount_point, end).await?;
        }
        Ok(())
    }

    async fn add(
        &mut self,
        underway: JoinHandle<Result<Mounted, StorageError>>,
        mount_point: String,
        end: Instant,
    ) -> Result<(), StorageError> {
        let done = timeout_at(end, self.underway.insert(underway)).await;
        let done = done.map_err(|_| StorageError::Unanswered {
            mount_point,
            seconds: PATIENCE.as_secs(),
        })?;
        self.underway = None;
        let mounted = done.map_err(io::Error::other).doing("mount", "a storage")?;
        self.mounted.push(mounted?);
        Ok(())
    }

    /// All that are mounted; none when it has failed.
    async fn end<E>(self, done: Result<(), E>) -> Result<Vec<Mounted>, E> {
        match done {
            Ok(()) => Ok(self.mounted),
            Err(error) => {
                self.undo().await;
                Err(error)
            }
        }
    }

    /// Nothing stays. What hangs is undone when it no longer does.
    async fn undo(mut self) {
        if let Some(mut underway) = self.underway.take() {
            match timeout(LAST_PATIENCE, &mut underway).await {
                Ok(done) => self.mounted.extend(done.into_iter().flatten()),
                Err(_) => drop(tokio::spawn(async {
                    let done = underway.await;
                    unmount_all(done.into_iter().flatten().collect()).await;
                })),
            }
        }
        unmount_all(self.mounted).await;
    }
}

/// Mounts all, in order; none when one fails.
pub async fn mount_all(storages: Vec<Storage>) -> Result<Vec<Mounted>, StorageError> {
    let mut mounting = Mounting::default();
    let done = mounting.add_all(storages).await;
    mounting.end(done).await
}

/// The same for what may be given up meanwhile.
pub async fn mount_all_for(
    attempt: &Attempt,
    storages: Vec<Storage>,
) -> Result<Vec<Mounted>, Error> {
    let mut mounting = Mounting::default();
    let adding = async { Ok::<_, Error>(mounting.add_all(storages).await?) };
    let done = attempt.work(adding).await;
    mounting.end(done).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Kind;
    use std::fs;
    use std::sync::mpsc;

    #[tokio::test]
    async fn what_is_mounted_too_late_is_undone() {
        let directory = tempfile::tempdir().unwrap();
        let node = directory.path().join("node");
        fs::write(&node, "").unwrap();
        let mounted = Mounted {
            mount_point: node.clone(),
            kind: Kind::Node,
            directories: vec![],
        };
        let (answer, answered) = mpsc::channel();
        let hangs = tokio::task::spawn_blocking(move || {
            answered.recv().unwrap();
            Ok(mounted)
        });
        let mut mounting = Mounting::default();
        let soon = Instant::now() + Duration::from_millis(10);
        let added = mounting.add(hangs, "/x".to_owned(), soon).await;
        let error = mounting.end(added).await.unwrap_err().to_string();
        assert_eq!(error, "storage at \"/x\" was not mounted within 50 s");
        assert!(node.exists());
        answer.send(()).unwrap();
        let undone = async {
            while node.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(10), undone).await.unwrap();
    }
}
