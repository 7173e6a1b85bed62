//! Spans on their way to a collector, on a thread of its own: it may be slow, or away.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::endpoint::Endpoint;
use super::otlp;
use super::span::Span;
use crate::text;

/// Most spans that wait.
const WAITING: usize = 8192;

/// Most that are sent at once.
const AT_ONCE: usize = 512;

/// How long a connection, and then question and answer, may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Pauses before another try: the first, each twice as long as the one before, and
/// the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Most that is read of an answer, bytes.
const ANSWER: usize = 8 << 10;

/// The way to a collector.
pub struct Exporter(Arc<Queue>);

/// What waits.
#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    has_come: Condvar,
}

#[derive(Default)]
struct Waiting {
    spans: VecDeque<Span>,
    /// How many had no room since that was told.
    lost: u64,
}

/// What a collector has made of spans.
#[derive(Debug)]
enum Sent {
    Taken,
    /// It will not take them at another time either.
    Refused(String),
    /// It may.
    NotNow(String),
}

impl Exporter {
    /// Begins.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(to: Endpoint) -> io::Result<Self> {
        let queue = Arc::<Queue>::default();
        let sent = Arc::clone(&queue);
        let thread = thread::Builder::new().name("spans".into());
        thread.spawn(move || send_all(&to, &sent))?;
        Ok(Self(queue))
    }

    /// Takes spans; those that have no room are lost.
    pub fn take(&self, spans: Vec<Span>) {
        let mut waiting = self.0.lock();
        let room = WAITING - waiting.spans.len().min(WAITING);
        waiting.lost += spans.len().saturating_sub(room) as u64;
        waiting.spans.extend(spans.into_iter().take(room));
        self.0.has_come.notify_one();
    }
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next ones; waits for one.
    fn next(&self) -> Vec<Span> {
        let mut waiting = self.lock();
        while waiting.spans.is_empty() {
            let woken = self.has_come.wait(waiting);
            waiting = woken.unwrap_or_else(PoisonError::into_inner);
        }
        let count = waiting.spans.len().min(AT_ONCE);
        waiting.spans.drain(..count).collect()
    }
}

fn send_all(to: &Endpoint, queue: &Queue) {
    // Told once, and not at each try.
    let mut is_away = false;
    loop {
        let spans = queue.next();
        let mut pause = FIRST_PAUSE;
        loop {
            match send(to, &spans) {
                Sent::Taken => {
                    if is_away {
                        let lost = std::mem::take(&mut queue.lock().lost);
                        tell(&format!(
                            "{to} takes spans again; {lost} were lost meanwhile"
                        ));
                        is_away = false;
                    }
                    break;
                }
                Sent::Refused(why) => {
                    tell(&format!("{to} refuses {} spans: {why}", spans.len()));
                    break;
                }
                Sent::NotNow(why) => {
                    if !std::mem::replace(&mut is_away, true) {
                        tell(&format!(
                            "{to} takes no spans: {why}; up to {WAITING} wait until it does"
                        ));
                    }
                    thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }
}

fn tell(what: &str) {
    eprintln!("husk: {}", text::plain(what));
}

fn send(to: &Endpoint, spans: &[Span]) -> Sent {
    let body = match otlp::text(spans) {
        Ok(body) => body,
        Err(error) => return Sent::Refused(error.to_string()),
    };
    let head = format!(
        "POST {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: husk/{}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        to.path,
        to.address,
        env!("CARGO_PKG_VERSION"),
        body.len()
    );
    match ask(to, &(head + &body)) {
        Ok(answer) => verdict(&answer),
        Err(error) => Sent::NotNow(error.to_string()),
    }
}

/// Which answers are worth another try is the specification's to say (OTLP,
/// "Failures" of OTLP/HTTP).
fn verdict(answer: &[u8]) -> Sent {
    let answer = String::from_utf8_lossy(answer);
    let line: String = answer
        .lines()
        .next()
        .unwrap_or_default()
        .chars()
        .take(100)
        .collect();
    let code = line
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1));
    match code.and_then(|code| code.parse::<u16>().ok()) {
        Some(200..=299) => Sent::Taken,
        Some(429 | 502..=504) => Sent::NotNow(line),
        Some(_) => Sent::Refused(line),
        None => Sent::NotNow("its answer is not HTTP".into()),
    }
}

/// The beginning of the answer to a question.
fn ask(to: &Endpoint, question: &str) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&to.address, PATIENCE)?;
    let began = Instant::now();
    let left = || match PATIENCE.saturating_sub(began.elapsed()) {
        Duration::ZERO => Err(io::Error::from(ErrorKind::TimedOut)),
        left => Ok(Some(left)),
    };
    let mut rest = question.as_bytes();
    while !rest.is_empty() {
        stream.set_write_timeout(left()?)?;
        match stream.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(late(error)),
        }
    }
    let mut answer = Vec::new();
    let mut block = [0; 1024];
    // Its first line is enough.
    while !answer.contains(&b'\n') && answer.len() < ANSWER {
        stream.set_read_timeout(left()?)?;
        match stream.read(&mut block) {
            Ok(0) => break,
            Ok(length) => answer.extend_from_slice(&block[..length]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(late(error)),
        }
    }
    Ok(answer)
}

/// A time-out of a socket is told as if it did not block.
fn late(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_apart() {
        for (answer, expected) in [
            ("HTTP/1.1 200 OK\r\n", "Taken"),
            ("HTTP/1.0 202 Accepted\r\n", "Taken"),
            ("HTTP/1.1 400 Bad Request\r\n", "Refused"),
            ("HTTP/1.1 404 Not Found\r\n", "Refused"),
            ("HTTP/1.1 429 Too Many Requests\r\n", "NotNow"),
            ("HTTP/1.1 503 Service Unavailable\r\n", "NotNow"),
            ("SSH-2.0-x\r\n", "NotNow"),
            ("", "NotNow"),
        ] {
            let told = format!("{:?}", verdict(answer.as_bytes()));
            assert!(told.starts_with(expected), "{answer:?}: {told}");
        }
    }

    #[test]
    fn what_has_no_room_is_counted() {
        let queue = Arc::<Queue>::default();
        let exporter = Exporter(Arc::clone(&queue));
        let span = Span {
            trace: 1,
            id: 1,
            parent: 0,
            is_remote: false,
            name: "a".into(),
            begin_ns: 1,
            end_ns: 2,
            error: None,
            attributes: Vec::new(),
        };
        exporter.take(vec![span.clone(); WAITING - 1]);
        exporter.take(vec![span.clone(); 5]);
        assert_eq!(queue.lock().lost, 4);
        assert_eq!(queue.next().len(), AT_ONCE);
        exporter.take(vec![span; 5]);
        let waiting = queue.lock();
        assert_eq!(
            (waiting.lost, waiting.spans.len()),
            (4, WAITING - AT_ONCE + 5)
        );
    }
}
