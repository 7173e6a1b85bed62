//! Collects every child that ends, ours or an orphan, and hands exit statuses
//! to those who wait for them.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
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
    children: Mutex<Children>,
}

#[derive(Debug, Default)]
struct Children {
    waiting: HashMap<i32, oneshot::Sender<Exit>>,
    /// Launches under way. A child may end before its launcher knows its pid,
    /// so statuses that nobody claims are kept while there are any.
    launches: usize,
    unclaimed: HashMap<i32, Exit>,
}

/// Held while children may appear whose pids are not known yet.
#[derive(Debug)]
pub struct Launching {
    reaper: Arc<Reaper>,
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

    /// Announces that children are about to be made.
    pub fn launching(self: &Arc<Self>) -> Launching {
        self.lock().launches += 1;
        Launching {
            reaper: Arc::clone(self),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Children> {
        lock(&self.children)
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
            let mut children = self.lock();
            if let Some(waiter) = children.waiting.remove(&pid) {
                // A waiter that is gone no longer cares.
                let _ = waiter.send(exit);
            } else if children.launches > 0 {
                children.unclaimed.insert(pid, exit);
            }
        }
    }
}

impl Launching {
    /// The future exit of this child, also when it has ended already.
    pub fn claim(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut children = self.reaper.lock();
        if let Some(exit) = children.unclaimed.remove(&pid) {
            let _ = sender.send(exit);
        } else {
            children.waiting.insert(pid, sender);
        }
        receiver
    }
}

impl Drop for Launching {
    fn drop(&mut self) {
        let mut children = self.reaper.lock();
        children.launches -= 1;
        if children.launches == 0 {
            children.unclaimed.clear();
        }
    }
}
