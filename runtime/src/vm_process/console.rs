//! The guest's console: each line goes to the shim's log, the last of it is kept
//! for the error that may come.

use std::collections::VecDeque;
use std::io;

use tokio::net::unix::pipe;
use tokio::task::yield_now;
use tokio::time::Instant;

use crate::pace::{Pace, Rate};

/// How much is kept, bytes.
const KEPT: usize = 64 << 10;

/// How much is read at a time, bytes.
const READ: usize = 4096;

/// Longest line in the log; a longer one is cut in pieces.
const LINE: usize = 1024;

/// Lines that go to the log at once at most, and each second after that: a
/// guest must not fill the node's journal.
const BURST: u32 = 1000;
const EACH_SECOND: u32 = 50;

/// What is read, bytes: the rest waits in the pipe, and the VMM drops what does
/// not fit.
const OUTPUT: Rate = Rate {
    burst: 1 << 20,
    per_second: 256 << 10,
};

/// What a read costs at least, as bytes: a guest may write them one by one.
const READ_COST: usize = 64;

/// How many lines an error shows.
const SHOWN: usize = 5;

/// Reads the console's pipe.
#[derive(Debug)]
pub struct Console {
    pipe: Option<pipe::Receiver>,
    kept: VecDeque<u8>,
    line: Vec<u8>,
    budget: Budget,
    pace: Pace,
}

/// How much may be logged.
#[derive(Debug)]
struct Budget {
    lines: u32,
    since: Instant,
    dropped: u64,
}

impl Console {
    /// Reads from `pipe`.
    pub fn new(pipe: pipe::Receiver) -> Self {
        Self {
            pipe: Some(pipe),
            kept: VecDeque::new(),
            line: Vec::new(),
            budget: Budget::new(),
            pace: Pace::new(OUTPUT),
        }
    }

    /// Waits for output and takes it. Never returns once nobody can write any
    /// more. Nothing is lost when the future is dropped.
    pub async fn read(&mut self) {
        self.pace.ready().await;
        let read = match &self.pipe {
            Some(pipe) if pipe.readable().await.is_ok() => self.read_once(),
            _ => std::future::pending().await,
        };
        self.pace.take(read.max(READ_COST));
        // A guest may write for ever, and the runtime does not count this as work.
        yield_now().await;
    }

    /// Takes what is there, as much as is kept.
    pub fn drain(&mut self) {
        for _ in 0..KEPT / READ {
            if self.read_once() == 0 {
                return;
            }
        }
    }

    fn read_once(&mut self) -> usize {
        let Some(pipe) = &self.pipe else { return 0 };
        let mut buffer = [0; READ];
        match pipe.try_read(&mut buffer) {
            Ok(count @ 1..) => {
                self.take(&buffer[..count]);
                return count;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(_) | Err(_) => self.pipe = None,
        }
        0
    }

    /// All that is kept.
    pub fn tail(&mut self) -> String {
        let rest = std::mem::take(&mut self.line);
        self.budget.log(&rest);
        self.budget.report();
        String::from_utf8_lossy(self.kept.make_contiguous()).into_owned()
    }

    fn take(&mut self, bytes: &[u8]) {
        let excess = (self.kept.len() + bytes.len()).saturating_sub(KEPT);
        self.kept.drain(..excess.min(self.kept.len()));
        self.kept.extend(bytes);
        for byte in bytes {
            if *byte == b'\n' || self.line.len() == LINE {
                self.budget.log(&self.line);
                self.line.clear();
            }
            if *byte != b'\n' && *byte != b'\r' {
                self.line.push(*byte);
            }
        }
    }
}

impl Budget {
    fn new() -> Self {
        Self {
            lines: BURST,
            since: Instant::now(),
            dropped: 0,
        }
    }

    fn log(&mut self, line: &[u8]) {
        if line.is_empty() {
            return;
        }
        if !self.take() {
            self.dropped += 1;
            return;
        }
        self.report();
        tracing::info!(console = printable(line), "guest");
    }

    fn take(&mut self) -> bool {
        let seconds = self.since.elapsed().as_secs();
        if seconds > 0 {
            self.since = Instant::now();
            let more = u32::try_from(seconds).unwrap_or(BURST);
            let more = more.saturating_mul(EACH_SECOND);
            self.lines = self.lines.saturating_add(more).min(BURST);
        }
        let taken = self.lines > 0;
        self.lines -= u32::from(taken);
        taken
    }

    fn report(&mut self) {
        if self.dropped > 0 {
            tracing::warn!(
                lines = self.dropped,
                "the guest's console is not logged whole"
            );
            self.dropped = 0;
        }
    }
}

/// The guest chooses these bytes: nothing of them may act on a terminal.
fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// The end of a console's output, for an error's one line.
pub fn last_lines(console: &str) -> String {
    let lines: Vec<String> = console
        .lines()
        .rev()
        .map(|line| printable(line.as_bytes()))
        .map(|line| line.trim().chars().take(200).collect::<String>())
        .filter(|line| !line.is_empty())
        .take(SHOWN)
        .collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_the_end_alone() {
        let text = "one\r\ntwo\n\nthree\x1b[31m\nfour\nfive\nsix\n";
        assert_eq!(last_lines(text), "two | three [31m | four | five | six");
    }

    #[tokio::test]
    async fn leaves_the_others_their_turn() {
        let (sender, receiver) = pipe::pipe().unwrap();
        let flood = tokio::spawn(async move {
            while sender.writable().await.is_ok() {
                // As a device does it that does not wait.
                while sender.try_write(&[b'\n'; 1 << 16]).is_ok() {}
            }
        });
        let mut console = Console::new(receiver);
        let others = async {
            for _ in 0..100 {
                yield_now().await;
            }
        };
        tokio::select! {
            () = async { loop { console.read().await } } => {}
            () = others => {}
        }
        flood.abort();
    }

    #[tokio::test]
    async fn reads_a_flood_in_part() {
        let (sender, receiver) = pipe::pipe().unwrap();
        let mut console = Console::new(receiver);
        let mut read = 0;
        let began = std::time::Instant::now();
        // Before each read there is something, until all is read that may be.
        let flood = async {
            while read < OUTPUT.burst as usize + OUTPUT.per_second as usize {
                sender.writable().await.unwrap();
                let _ = sender.try_write(&[b'x'; READ]);
                console.read().await;
                read += READ;
            }
        };
        flood.await;
        assert!(began.elapsed() >= std::time::Duration::from_millis(900));
    }

    #[tokio::test(start_paused = true)]
    async fn logs_a_flood_in_part() {
        let mut budget = Budget::new();
        let mut logged = |count| (0..count).filter(|_| budget.take()).count();
        assert_eq!(logged(10_000), BURST as usize);
        tokio::time::advance(std::time::Duration::from_secs(2)).await;
        assert_eq!(logged(10_000), 2 * EACH_SECOND as usize);
        tokio::time::advance(std::time::Duration::from_secs(3600)).await;
        assert_eq!(logged(10_000), BURST as usize);
    }

    #[tokio::test]
    async fn keeps_the_last_part() {
        let mut console = Console {
            pipe: None,
            kept: VecDeque::new(),
            line: Vec::new(),
            budget: Budget::new(),
            pace: Pace::new(OUTPUT),
        };
        console.take(&vec![b'a'; KEPT - 1]);
        console.take(b"bc");
        assert_eq!(console.kept.len(), KEPT);
        assert!(console.tail().ends_with("abc"));
    }
}
