//! The guest's console: each line goes to the shim's log, the last of it is kept
//! for the error that may come.

use std::collections::VecDeque;
use std::io;

use tokio::net::unix::pipe;

/// How much is kept, bytes.
const KEPT: usize = 64 << 10;

/// Longest line in the log; a longer one is cut in pieces.
const LINE: usize = 1024;

/// How many lines an error shows.
const SHOWN: usize = 5;

/// Reads the console's pipe.
#[derive(Debug)]
pub struct Console {
    pipe: Option<pipe::Receiver>,
    kept: VecDeque<u8>,
    line: Vec<u8>,
}

impl Console {
    /// Reads from `pipe`.
    pub fn new(pipe: pipe::Receiver) -> Self {
        Self {
            pipe: Some(pipe),
            kept: VecDeque::new(),
            line: Vec::new(),
        }
    }

    /// Waits for output and takes it. Never returns once nobody can write any
    /// more. Nothing is lost when the future is dropped.
    pub async fn read(&mut self) {
        match &self.pipe {
            Some(pipe) if pipe.readable().await.is_ok() => self.drain(),
            _ => std::future::pending().await,
        }
    }

    /// Takes what is there.
    pub fn drain(&mut self) {
        let mut buffer = [0; 4096];
        while let Some(pipe) = &self.pipe {
            match pipe.try_read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(count) => self.take(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.pipe = None,
            }
        }
    }

    /// All that is kept.
    pub fn tail(&mut self) -> String {
        let rest = std::mem::take(&mut self.line);
        log(&rest);
        String::from_utf8_lossy(self.kept.make_contiguous()).into_owned()
    }

    fn take(&mut self, bytes: &[u8]) {
        let excess = (self.kept.len() + bytes.len()).saturating_sub(KEPT);
        self.kept.drain(..excess.min(self.kept.len()));
        self.kept.extend(bytes);
        for byte in bytes {
            if *byte == b'\n' || self.line.len() == LINE {
                log(&self.line);
                self.line.clear();
            }
            if *byte != b'\n' && *byte != b'\r' {
                self.line.push(*byte);
            }
        }
    }
}

fn log(line: &[u8]) {
    if !line.is_empty() {
        tracing::info!(console = printable(line), "guest");
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

    #[test]
    fn keeps_the_last_part() {
        let mut console = Console {
            pipe: None,
            kept: VecDeque::new(),
            line: Vec::new(),
        };
        console.take(&vec![b'a'; KEPT - 1]);
        console.take(b"bc");
        assert_eq!(console.kept.len(), KEPT);
        assert!(console.tail().ends_with("abc"));
    }
}
