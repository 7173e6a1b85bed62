//! When a process says something, with a deadline: a guest that does not come up
//! must not hold up the run.

use std::io::Read;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// A process whose standard output is read as it comes.
pub struct Speaker {
    child: Child,
    begun: Instant,
    limit: Duration,
    blocks: Receiver<(Instant, Vec<u8>)>,
}

impl Speaker {
    /// Starts it; it may take `limit` in all.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(command: &mut Command, limit: Duration) -> Result<Self> {
        let begun = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let output = child.stdout.take().context("piped")?;
        Ok(Self {
            child,
            begun,
            limit,
            blocks: read(output),
        })
    }

    /// Its process id.
    pub fn pid(&self) -> Result<i32> {
        Ok(i32::try_from(self.child.id())?)
    }

    /// When `wanted` has come, from the start.
    ///
    /// # Errors
    /// It ended before, or the time is up.
    pub fn until(&mut self, wanted: &str) -> Result<Duration> {
        let mut seen = Vec::new();
        while let Some((at, block)) = self.next()? {
            seen.extend_from_slice(&block);
            if String::from_utf8_lossy(&seen).contains(wanted) {
                return Ok(at.duration_since(self.begun));
            }
        }
        let said = String::from_utf8_lossy(&seen).into_owned();
        bail!("ended without {wanted:?}: {said}{}", self.errors()?);
    }

    /// When it has ended well, from the start.
    ///
    /// # Errors
    /// It failed, or the time is up.
    pub fn end(mut self) -> Result<Duration> {
        while self.next()?.is_some() {}
        let status = self.child.wait()?;
        let took = self.begun.elapsed();
        ensure!(status.success(), "{status}: {}", self.errors()?);
        Ok(took)
    }

    /// The next block; none at the end.
    fn next(&mut self) -> Result<Option<(Instant, Vec<u8>)>> {
        let left = self.limit.saturating_sub(self.begun.elapsed());
        match self.blocks.recv_timeout(left) {
            Ok(block) => Ok(Some(block)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                self.child.kill()?;
                let limit = self.limit.as_secs_f64();
                bail!("not done within {limit} s: {}", self.errors()?);
            }
        }
    }

    /// What it said on standard error, to its end.
    fn errors(&mut self) -> Result<String> {
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut said)?;
        }
        Ok(said)
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        // Both do nothing where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads on a thread of its own, which looks at the clock when a block has come.
fn read(mut output: ChildStdout) -> Receiver<(Instant, Vec<u8>)> {
    let (sender, blocks) = mpsc::channel();
    thread::spawn(move || {
        let mut block = vec![0; 4096];
        // A stream that breaks has given all it will give.
        while let Ok(length @ 1..) = output.read(&mut block) {
            let said = (
                Instant::now(),
                block.get(..length).unwrap_or_default().to_vec(),
            );
            if sender.send(said).is_err() {
                return;
            }
        }
    });
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Speaker {
        Speaker::start(Command::new("sh").args(["-c", script]), limit).expect("sh starts")
    }

    #[test]
    fn the_first_output_and_the_end_are_told_apart() {
        let mut speaker = shell("echo here; sleep 0.3", Duration::from_secs(60));
        let first = speaker.until("here").expect("it comes");
        let end = speaker.end().expect("it ends");
        assert!(
            end >= first + Duration::from_millis(200),
            "{first:?} {end:?}"
        );
    }

    #[test]
    fn who_says_nothing_is_waited_for_no_longer_than_said() {
        let begun = Instant::now();
        let mut speaker = shell("exec sleep 1000", Duration::from_millis(100));
        let error = speaker
            .until("here")
            .expect_err("nothing comes")
            .to_string();
        assert!(error.starts_with("not done within 0.1 s"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(100));
    }

    #[test]
    fn who_fails_is_an_error_with_what_it_said() {
        let mut speaker = shell("echo no >&2; exit 3", Duration::from_secs(60));
        let error = speaker.until("here").expect_err("it fails").to_string();
        assert_eq!(error, "ended without \"here\": no\n");
        let error = shell("echo no >&2; exit 3", Duration::from_secs(60)).end();
        let error = error.expect_err("it fails").to_string();
        assert_eq!(error, "exit status: 3: no\n");
    }
}
