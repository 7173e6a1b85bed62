//! A process of the node, told from a later one with the same number.

use std::fs;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process and when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// As the node numbers it.
    pub pid: u32,
    /// Clock ticks from the node's boot to its start.
    pub start_ticks: u64,
}

impl Process {
    /// The process `pid`, if there is one; it may have ended and wait for its
    /// parent.
    pub fn find(pid: u32) -> Option<Self> {
        Self::look_up(pid).map(|(process, _)| process)
    }

    /// It and whether it has ended.
    fn look_up(pid: u32) -> Option<(Self, bool)> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold anything; what follows its parenthesis does not.
        let (_, fields) = stat.rsplit_once(')')?;
        // proc_pid_stat(5): fields 3, 20 and 22; the third follows the name.
        let mut fields = fields.split_ascii_whitespace();
        let state = fields.next()?;
        let threads: u32 = fields.nth(20 - 4)?.parse().ok()?;
        let start_ticks = fields.nth(22 - 21)?.parse().ok()?;
        // The first thread may have ended before others.
        let has_ended = matches!(state, "Z" | "X") && threads <= 1;
        Some((Self { pid, start_ticks }, has_ended))
    }

    /// It has not ended.
    pub fn is_alive(self) -> bool {
        let found = Self::look_up(self.pid);
        found.is_some_and(|(process, has_ended)| process == self && !has_ended)
    }

    /// Ends it, if it still is the same, and waits for that.
    pub fn kill(self, patience: Duration) {
        Self::kill_all([self], patience);
    }

    /// Ends all of these that still are the same, and waits for that.
    pub fn kill_all(processes: impl IntoIterator<Item = Self>, patience: Duration) {
        let began = Instant::now();
        let pidfds: Vec<_> = processes.into_iter().filter_map(Self::open).collect();
        for pidfd in &pidfds {
            // It may end on its own in between.
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
        for pidfd in &pidfds {
            let timeout = Timespec::try_from(patience.saturating_sub(began.elapsed())).ok();
            let _ = poll(&mut [PollFd::new(pidfd, PollFlags::IN)], timeout.as_ref());
        }
    }

    /// What it was started with.
    pub fn arguments(self) -> Vec<String> {
        let text = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        text.split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect()
    }

    /// How soon it ends when the node runs out of memory; where that may be said.
    pub fn set_oom_score_adj(self, score: i32) {
        let path = format!("/proc/{}/oom_score_adj", self.pid);
        if let Err(error) = fs::write(path, score.to_string()) {
            tracing::debug!(pid = self.pid, %error, "oom_score_adj");
        }
    }

    /// A descriptor of it, if it still is the same.
    pub fn open(self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Looked at after opening: what is open now cannot be another.
        self.is_alive().then_some(pidfd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn kills_only_the_same_process() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let process = Process::find(child.id()).unwrap();
        let later = Process {
            start_ticks: process.start_ticks + 1,
            ..process
        };
        later.kill(Duration::from_millis(100));
        assert!(child.try_wait().unwrap().is_none());
        process.kill(Duration::from_secs(5));
        // Though nobody has waited for it yet.
        assert!(!process.is_alive());
        assert_eq!(Process::find(child.id()), Some(process));
        assert!(!child.wait().unwrap().success());
        assert_eq!(Process::find(child.id()), None);
    }
}
