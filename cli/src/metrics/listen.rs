//! An endpoint that Prometheus asks. It watches the pods all the time, so that no
//! start is missed between two questions.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::PollFlags;

use super::page;
use super::starts::Starts;
use crate::events::watch::Watch;
use crate::events::{self, Known};
use crate::memory::Memory;
use crate::pods;

/// Most that ask at once; whoever comes then is sent away.
const AT_ONCE: usize = 16;

/// Largest question, bytes.
const LONGEST: usize = 8 << 10;

/// How long a question, and then its answer, may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a page is given to whoever asks: it takes a look at every process of
/// every pod, and anybody may ask.
const FRESH: Duration = Duration::from_secs(1);

/// How long nobody is let in after that has failed: for want of descriptors, say.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers until it is interrupted.
///
/// # Errors
/// The address cannot be listened at, or the pods cannot be watched.
pub fn serve(address: SocketAddr) -> anyhow::Result<()> {
    let state_dir = pods::state_dir()?;
    let listener = TcpListener::bind(address).with_context(|| format!("listen at {address}"))?;
    listener.set_nonblocking(true)?;
    let mut watch = Watch::new(state_dir.clone())?;
    let mut starts = Starts::default();
    let mut known: Option<Known> = None;
    let guests = Arc::new(());
    let mut page = Page::default();
    let mut output = io::stdout().lock();
    loop {
        watch.arm()?;
        let now = events::look(&state_dir, known.as_ref())?;
        starts.note(known.as_ref(), &now);
        if known.is_none() {
            writeln!(output, "http://{}/metrics", listener.local_addr()?)?;
            output.flush()?;
        }
        let ready = watch.wait(now.values(), Some((listener.as_fd(), PollFlags::IN)))?;
        if ready.contains(PollFlags::IN) {
            let text = page.of(Instant::now(), || text(&now, &starts))?;
            let_in(&listener, &text, &guests);
        }
        known = Some(now);
    }
}

/// Those who wait, but not for ever.
fn let_in(listener: &TcpListener, page: &Arc<str>, guests: &Arc<()>) {
    for _ in 0..AT_ONCE {
        match listener.accept() {
            Ok((guest, _)) if Arc::strong_count(guests) <= AT_ONCE => {
                // For want of threads: the next one may find some.
                if answer(guest, Arc::clone(page), Arc::clone(guests)).is_err() {
                    thread::sleep(PAUSE);
                }
            }
            // It is closed.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(_) => return thread::sleep(PAUSE),
        }
    }
}

/// What was told last, and when it was made.
#[derive(Default)]
struct Page(Option<(Instant, Arc<str>)>);

impl Page {
    /// What to tell now, made anew if it is not [`FRESH`].
    fn of(
        &mut self,
        now: Instant,
        make: impl FnOnce() -> Result<String, std::fmt::Error>,
    ) -> Result<Arc<str>, std::fmt::Error> {
        match &self.0 {
            Some((made, text)) if now.duration_since(*made) < FRESH => Ok(Arc::clone(text)),
            _ => {
                let text: Arc<str> = make()?.into();
                self.0 = Some((now, Arc::clone(&text)));
                Ok(text)
            }
        }
    }
}

fn text(now: &Known, starts: &Starts) -> Result<String, std::fmt::Error> {
    let pods = now.values().cloned();
    let pods: Vec<_> = pods
        .map(|pod| (pod.clone(), Memory::of(&pod.state)))
        .collect();
    Ok(page(&pods)? + &starts.page()?)
}

/// On a thread, since nobody has to read fast.
fn answer(guest: TcpStream, page: Arc<str>, one: Arc<()>) -> io::Result<()> {
    let thread = thread::Builder::new().name("metrics".into());
    thread.spawn(move || {
        // A guest that does not ask, or listen, has its own loss.
        let _ = speak(guest, &page);
        drop(one);
    })?;
    Ok(())
}

fn speak(mut guest: TcpStream, page: &str) -> io::Result<()> {
    guest.set_nonblocking(false)?;
    let question = question(&mut guest)?;
    let (status, body) = match &question.split(' ').collect::<Vec<_>>()[..] {
        ["GET", path, _] if path.split('?').next() == Some("/metrics") => ("200 OK", page),
        ["GET", ..] => ("404 Not Found", "There is only /metrics.\n"),
        _ => ("405 Method Not Allowed", "Only GET is answered.\n"),
    };
    // The format's version, by which Prometheus knows it.
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    write(&mut guest, &(head + body))
}

/// All of it in time, however little is taken at once.
fn write(guest: &mut TcpStream, text: &str) -> io::Result<()> {
    let began = Instant::now();
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let left = PATIENCE.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        guest.set_write_timeout(Some(left))?;
        match guest.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The first line of a question, all of which has come.
fn question(guest: &mut TcpStream) -> io::Result<String> {
    let began = Instant::now();
    let mut text = Vec::new();
    while !text.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = PATIENCE.saturating_sub(began.elapsed());
        if left.is_zero() || text.len() >= LONGEST {
            return Err(ErrorKind::InvalidInput.into());
        }
        guest.set_read_timeout(Some(left))?;
        let mut block = [0; 1024];
        match guest.read(&mut block)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            length => text.extend_from_slice(&block[..length]),
        }
    }
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn whoever_reads_slowly_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut guest = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (host, _) = listener.accept().unwrap();
        write!(guest, "GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        // More than sockets hold.
        let page = "x".repeat(64 << 20);
        let (tell, told) = channel();
        let began = Instant::now();
        thread::spawn(move || tell.send(speak(host, &page)).unwrap());
        let mut block = vec![0; 16 << 10];
        let ended = loop {
            guest.read_exact(&mut block).unwrap();
            thread::sleep(Duration::from_millis(50));
            if let Ok(ended) = told.try_recv() {
                break ended;
            }
            assert!(began.elapsed() < 3 * PATIENCE, "it is still told");
        };
        assert!(ended.is_err() && began.elapsed() >= PATIENCE);
    }

    #[test]
    fn a_page_is_told_to_all_who_ask_in_a_second() {
        let mut page = Page::default();
        let now = Instant::now();
        let mut at = |after, text: &str| page.of(now + after, || Ok(text.into())).unwrap();
        assert_eq!(&*at(Duration::ZERO, "a"), "a");
        assert_eq!(&*at(FRESH / 2, "b"), "a");
        assert_eq!(&*at(FRESH, "c"), "c");
        assert_eq!(&*at(FRESH + FRESH / 2, "d"), "c");
    }
}
