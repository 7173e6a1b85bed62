//! Collects every child that ends, ours or an orphan, and hands exit statuses
//! to those who wait for them.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use rustix::io::Errno;
use rustix::process::WaitOptions;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::lock::lock;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 128 + signal when a signal ended it.
    pub code: u32,
    /// When it was collected.
    pub at: SystemTime,
}

/// Everybody who waits for a child.
#[derive(Debug, Default)]
pub struct Reaper {
    waiting: Mutex<HashMap<i32, oneshot::Sender<Exit>>>,
}

impl Reaper {
    /// Starts to collect children; needs the runtime.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut child_ended = signal(SignalKind::child())?;
        let collector = Arc::clone(&reaper);
        tokio::spawn(async move {
            loop {
                collector.collect();
                if child_ended.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// The future exit of this process. It must not be ours to collect yet:
    /// an exit that nobody waits for is forgotten, and its pid may come again.
    pub fn claim(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(pid, sender);
        receiver
    }

    fn collect(&self) {
        loop {
            let (pid, status) = match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => (pid.as_raw_nonzero().get(), status),
                Ok(None) | Err(Errno::CHILD) => return,
                Err(Errno::INTR) => continue,
                Err(errno) => {
                    log::warn!("cannot collect a child: {errno}");
                    return;
                }
            };
            let code = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code.cast_unsigned(),
                (None, Some(signal)) => 128 + signal.cast_unsigned(),
                (None, None) => continue,
            };
            let exit = Exit {
                code,
                at: SystemTime::now(),
            };
            if let Some(waiter) = lock(&self.waiting).remove(&pid) {
                // A waiter that is gone no longer cares.
                let _ = waiter.send(exit);
            }
        }
    }
}
