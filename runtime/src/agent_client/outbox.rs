//! The agent's stream, as ttrpc gets it. ttrpc ends a connection when whoever
//! asked something gives up while the question is half written, and with the
//! agent's connection the pod ends. An agent may not read for a while: its guest
//! is short of processors. So here a question is written at once, whatever the
//! agent does; what it has not read yet waits in memory, up to a bound. And what it
//! answers is read no faster than an honest agent speaks: the rest waits with it.

use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use husk_protocol::limit;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep};

use crate::pace::{Pace, Rate};

/// Most that waits, bytes. An agent that lets more come together is none.
const WAITING: usize = 8 * limit::MESSAGE_BYTES;

/// What of its answers is read, bytes: two of the largest at once.
const ANSWERS: Rate = Rate {
    burst: 2 * limit::MESSAGE_BYTES as u32,
    per_second: 256 << 10,
};

/// What a read costs at least, as bytes: an answer may be tiny.
const READ_COST: usize = 64;

/// The stream.
#[derive(Debug)]
pub struct Outbox {
    answers: OwnedReadHalf,
    questions: mpsc::UnboundedSender<Vec<u8>>,
    waiting: Arc<AtomicUsize>,
    pace: Pace,
    /// Too much was read.
    pause: Option<Pin<Box<Sleep>>>,
}

impl Outbox {
    /// Of a connection.
    ///
    /// # Errors
    /// It cannot be polled.
    pub fn new(stream: StdUnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (answers, far) = UnixStream::from_std(stream)?.into_split();
        let (questions, receiver) = mpsc::unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        tokio::spawn(write(receiver, far, Arc::clone(&waiting)));
        Ok(Self {
            answers,
            questions,
            waiting,
            pace: Pace::new(ANSWERS),
            pause: None,
        })
    }
}

/// Until nobody asks any more, or nobody is there who could be asked.
async fn write(
    mut questions: mpsc::UnboundedReceiver<Vec<u8>>,
    mut far: OwnedWriteHalf,
    waiting: Arc<AtomicUsize>,
) {
    while let Some(bytes) = questions.recv().await {
        if far.write_all(&bytes).await.is_err() {
            return;
        }
        waiting.fetch_sub(bytes.len(), Ordering::Relaxed);
    }
}

impl AsyncRead for Outbox {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(context));
                this.pause = None;
            }
            match this.pace.wait() {
                Some(wait) => this.pause = Some(Box::pin(sleep(wait))),
                None => break,
            }
        }
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut this.answers).poll_read(context, buffer));
        let bytes = buffer.filled().len() - before;
        this.pace.take(bytes.max(READ_COST));
        Poll::Ready(read)
    }
}

impl AsyncWrite for Outbox {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let before = self.waiting.fetch_add(bytes.len(), Ordering::Relaxed);
        if before + bytes.len() > WAITING {
            let error = "the agent does not take what it is asked";
            return Poll::Ready(Err(io::Error::other(error)));
        }
        let sent = self.questions.send(bytes.to_vec());
        let sent = sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe));
        Poll::Ready(sent.map(|()| bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::time::Duration;

    use husk_protocol::agent::CreateSandboxRequest;

    use super::super::{Agent, AgentError};
    use super::*;
    use crate::config::Config;

    const SOON: Duration = Duration::from_millis(100);
    const LONG: Duration = Duration::from_secs(20);

    fn large() -> CreateSandboxRequest {
        CreateSandboxRequest {
            hostname: "x".repeat(limit::MESSAGE_BYTES * 3 / 4),
            ..CreateSandboxRequest::default()
        }
    }

    fn agent(near: StdUnixStream) -> Agent {
        Agent::new(near, Config::default().patience()).unwrap()
    }

    /// Answers everything with nothing.
    fn answer(mut far: StdUnixStream) {
        const RESPONSE: u8 = 2;
        let mut header = [0; 10];
        while far.read_exact(&mut header).is_ok() {
            let [l0, l1, l2, l3, s0, s1, s2, s3, ..] = header;
            let length = u32::from_be_bytes([l0, l1, l2, l3]);
            far.read_exact(&mut vec![0; length as usize]).unwrap();
            let response = [0, 0, 0, 0, s0, s1, s2, s3, RESPONSE, 0];
            let _ = far.write_all(&response);
        }
    }

    #[tokio::test]
    async fn who_gives_up_takes_nobody_with_them() {
        let (near, far) = StdUnixStream::pair().unwrap();
        let agent = agent(near);
        // More than the socket holds, so half of it is written.
        let late = agent.create_sandbox(&large(), SOON).await;
        assert!(matches!(late, Err(AgentError::Deadline { .. })), "{late:?}");
        let gone = tokio::time::timeout(SOON, agent.create_sandbox(&large(), LONG)).await;
        assert!(gone.is_err());
        std::thread::spawn(|| answer(far));
        agent.create_sandbox(&large(), LONG).await.unwrap();
        agent.pause("c").await.unwrap();
    }

    #[tokio::test]
    async fn what_is_answered_is_read_no_faster_than_that() {
        for frame in [vec![0; 64 << 10], vec![0; 10]] {
            let (near, mut far) = StdUnixStream::pair().unwrap();
            let _agent = agent(near);
            far.set_write_timeout(Some(LONG)).unwrap();
            let mut response = frame;
            let [l0, l1, l2, l3] = (response.len() as u32 - 10).to_be_bytes();
            // Of a question that nobody asked.
            response[..10].copy_from_slice(&[l0, l1, l2, l3, 0, 9, 9, 9, 2, 0]);
            let unit = response.len().max(READ_COST);
            let burst = ANSWERS.burst as usize / unit;
            let more = 2 * ANSWERS.per_second as usize / unit;
            // What the socket holds at most.
            let ahead = 212_992 / response.len().max(500) + 1;
            let began = std::time::Instant::now();
            let flood = tokio::task::spawn_blocking(move || {
                for _ in 0..burst + more + ahead {
                    far.write_all(&response).unwrap();
                }
            });
            flood.await.unwrap();
            assert!(began.elapsed() >= Duration::from_secs(2), "{unit}");
        }
    }

    #[tokio::test]
    async fn what_waits_is_bounded() {
        let (near, _far) = StdUnixStream::pair().unwrap();
        let agent = agent(near);
        let mut asked = 0;
        loop {
            match agent.create_sandbox(&large(), SOON).await {
                Err(AgentError::Deadline { .. }) => asked += 1,
                answer => {
                    assert!(matches!(answer, Err(AgentError::Gone)), "{answer:?}");
                    break;
                }
            }
            assert!(asked < 20);
        }
        assert!(asked >= 8, "{asked}");
    }
}
