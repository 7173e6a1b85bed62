//! Port forwarding: connections to localhost in the pod's network namespace on
//! the node are carried to localhost in the guest.

use std::ffi::c_int;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{io, mem};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{set_socket_keepalive, set_socket_linger, set_tcp_keepidle};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream, tcp, unix};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::agent_client::Agent;
use crate::blocking;
use crate::error::Error;
use crate::network::{Netns, PortForward};
use crate::ports;
use crate::stdio::StdioError;
use crate::vm_process::Vm;

/// Most connections at a time.
const CONNECTIONS: usize = 256;

/// How often it is looked whether anything moves that waits, once the client has hung
/// up. What has not moved in between ends: a guest that says nothing more keeps no
/// place for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes read at a time.
const PIECE: usize = 8 << 10;

/// Forwards until the machine has ended. A node whose kernel cannot do this has
/// pods all the same.
pub async fn serve(netns: Netns, vm: Vm, agent: Agent) {
    let opened = blocking::run(move || PortForward::open(&netns)).await;
    let (listener, _attachment) = match opened {
        Ok(Ok(forward)) => forward.into_parts(),
        Ok(Err(error)) => {
            tracing::warn!("no port forwarding: {}", crate::error::chain(&error));
            return;
        }
        Err(error) => {
            tracing::warn!(%error, "no port forwarding");
            return;
        }
    };
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(%error, "no port forwarding");
            return;
        }
    };
    let end_vm = vm.clone();
    tokio::select! {
        () = accept(listener, vm, agent) => {}
        _ = end_vm.ended() => {}
    }
}

async fn accept(listener: TcpListener, vm: Vm, agent: Agent) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "port forwarding");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (vm, agent) = (vm.clone(), agent.clone());
        tokio::spawn(async move {
            if let Err(error) = carry(stream, &vm, &agent).await {
                tracing::debug!("port forwarding: {}", crate::error::chain(&error));
            }
            drop(place);
        });
    }
}

async fn carry(stream: TcpStream, vm: &Vm, agent: &Agent) -> Result<(), Error> {
    let fail = |source: io::Error| StdioError::Socket {
        stream: "forwarded port",
        source,
    };
    let wanted = stream.local_addr().map_err(fail)?.port();
    // The end of a client whose last bytes find no room is not sent: who is gone is
    // found by asking.
    set_socket_keepalive(&stream, true).map_err(|errno| fail(errno.into()))?;
    set_tcp_keepidle(&stream, PATIENCE).map_err(|errno| fail(errno.into()))?;
    let (near, far) = std::os::unix::net::UnixStream::pair().map_err(fail)?;
    near.set_nonblocking(true).map_err(fail)?;
    far.set_nonblocking(true).map_err(fail)?;
    let port = ports::random().map_err(fail)?;
    vm.add_host_ports(vec![(port, far.into())]).await?;
    // Mostly it is refused because nobody listens there, and then nobody dials
    // either. An agent answers when it has dialled: one that says so and has not
    // finds the port closed, and this the end of the stream.
    let dialled = agent.dial(wanted, port).await;
    vm.remove_host_ports(vec![port]).await;
    dialled?;
    let guest = UnixStream::from_std(near).map_err(fail)?;
    Ok(exchange(stream, guest, PATIENCE).await.map_err(fail)?)
}

/// Carries both ways, until both have ended or one is gone. A client that does not
/// get everything gets a reset: an end would look like the end of the answer.
async fn exchange(
    mut client: TcpStream,
    mut guest: UnixStream,
    patience: Duration,
) -> io::Result<()> {
    let carried = {
        let (from_client, to_client) = client.split();
        let (from_guest, to_guest) = guest.split();
        let moves = Moves {
            asked: AtomicBool::new(false),
            patience,
        };
        let inwards = carry_in(from_client, to_guest, &moves);
        let outwards = carry_out(from_guest, to_client, &moves);
        tokio::try_join!(inwards, outwards)
    };
    if carried.is_err() {
        // Only a socket that is gone refuses.
        let _ = set_socket_linger(&client, Some(Duration::ZERO));
    }
    carried.map(|_| ())
}

/// What both ways know.
struct Moves {
    /// The client's half has ended, and the guest has all of it that it takes.
    asked: AtomicBool,
    patience: Duration,
}

async fn carry_in(
    mut client: tcp::ReadHalf<'_>,
    mut guest: unix::WriteHalf<'_>,
    moves: &Moves,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let count = client.read(&mut piece).await?;
        let mut rest = &piece[..count];
        if rest.is_empty() {
            moves.asked.store(true, Ordering::Relaxed);
            return guest.shutdown().await;
        }
        let mut stall = Stall::default();
        while !rest.is_empty() {
            match timeout(moves.patience, guest.write(rest)).await {
                // It may have answered before it closed.
                Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                    moves.asked.store(true, Ordering::Relaxed);
                    return Ok(());
                }
                Ok(written) => {
                    rest = &rest[written?..];
                    stall = Stall::default();
                }
                // It waits as long as its client does.
                Err(_) => {
                    let (client, guest) = (client.as_ref(), guest.as_ref());
                    stall.check(has_hung_up(client)?, client, guest)?;
                }
            }
        }
    }
}

async fn carry_out(
    mut guest: unix::ReadHalf<'_>,
    mut client: tcp::WriteHalf<'_>,
    moves: &Moves,
) -> io::Result<()> {
    let asked = || moves.asked.load(Ordering::Relaxed);
    let mut piece = vec![0; PIECE];
    loop {
        let mut stall = Stall::default();
        let count = loop {
            match timeout(moves.patience, guest.read(&mut piece)).await {
                Ok(count) => break count?,
                // What it was asked may still be on its way, and what it answered.
                Err(_) => stall.check(asked(), client.as_ref(), guest.as_ref())?,
            }
        };
        let mut rest = &piece[..count];
        if rest.is_empty() {
            return client.shutdown().await;
        }
        let mut stall = Stall::default();
        while !rest.is_empty() {
            match timeout(moves.patience, client.write(rest)).await {
                Ok(written) => {
                    rest = &rest[written?..];
                    stall = Stall::default();
                }
                Err(_) => stall.check(asked(), client.as_ref(), guest.as_ref())?,
            }
        }
    }
}

/// A half that waits.
#[derive(Default)]
struct Stall {
    /// What neither reader had taken yet when it was looked at last.
    waiting: Option<[c_int; 2]>,
}

impl Stall {
    /// Looks whether a reader has taken something since the last look. A stream becomes
    /// writable only once much of it has been taken, so that it is not says nothing.
    ///
    /// # Errors
    /// None has, and the client had hung up (`gone`) both times.
    fn check(&mut self, gone: bool, client: &TcpStream, guest: &UnixStream) -> io::Result<()> {
        let now = match gone {
            true => Some([untaken(client)?, untaken(guest)?]),
            false => None,
        };
        let before = mem::replace(&mut self.waiting, now);
        match now.is_some() && now == before {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(()),
        }
    }
}

/// Bytes (of a Unix socket: with the kernel's own for each piece) that were written
/// to `stream` and not yet taken by its reader.
fn untaken(stream: &impl AsRawFd) -> io::Result<c_int> {
    let mut bytes: c_int = 0;
    // SAFETY: SIOCOUTQ, which is TIOCOUTQ (Linux's include/uapi/linux/sockios.h),
    // writes one int.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    match result {
        0 => Ok(bytes),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the client sends no more, though what it sent has not been read.
fn has_hung_up(client: &TcpStream) -> io::Result<bool> {
    let mut polled = [PollFd::new(client, PollFlags::RDHUP)];
    poll(&mut polled, Some(&Timespec::default()))?;
    Ok(!polled[0].revents().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    use rustix::net::sockopt::set_socket_send_buffer_size;
    use tokio::net::TcpSocket;

    const SHORT: Duration = Duration::from_millis(100);
    const LONG: Duration = Duration::from_secs(20);

    type Carried = tokio::task::JoinHandle<io::Result<()>>;

    /// The client's end, the guest's end, and what is between them.
    async fn ends(patience: Duration) -> (TcpStream, UnixStream, Carried) {
        // It holds little, so that the rest fits in the window of the client, whose end
        // would not be told else.
        ends_with(patience, 4 << 10).await
    }

    /// With a socket to the guest that holds twice `bytes`.
    async fn ends_with(patience: Duration, bytes: usize) -> (TcpStream, UnixStream, Carried) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // So that what is on its way lies in sockets that are looked at.
        let client = TcpSocket::new_v4().unwrap();
        client.set_recv_buffer_size(16 << 10).unwrap();
        let client = client.connect(listener.local_addr().unwrap()).await;
        let (accepted, _) = listener.accept().await.unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        set_socket_send_buffer_size(&near, bytes).unwrap();
        let carried = tokio::spawn(exchange(accepted, near, patience));
        (client.unwrap(), far, carried)
    }

    #[tokio::test]
    async fn all_is_carried_after_a_half_has_ended() {
        let (mut client, mut guest, carried) = ends(4 * SHORT).await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        guest.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        // It takes longer than any silence may.
        for _ in 0..12 {
            guest.write_all(b"answer").await.unwrap();
            tokio::time::sleep(SHORT).await;
        }
        drop(guest);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer".repeat(12));
        carried.await.unwrap().unwrap();

        let (mut client, mut guest, carried) = ends(SHORT).await;
        guest.write_all(b"greeting").await.unwrap();
        guest.shutdown().await.unwrap();
        let mut greeting = String::new();
        client.read_to_string(&mut greeting).await.unwrap();
        assert_eq!(greeting, "greeting");
        // The client may think as long as it likes.
        tokio::time::sleep(SHORT * 3).await;
        client.write_all(b"thanks").await.unwrap();
        drop(client);
        let mut thanks = String::new();
        guest.read_to_string(&mut thanks).await.unwrap();
        assert_eq!(thanks, "thanks");
        carried.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_is_silent_is_left_with_its_client() {
        let (client, guest, carried) = ends(SHORT).await;
        tokio::time::sleep(SHORT * 3).await;
        assert!(!carried.is_finished(), "while there is one");
        drop(client);
        let ended = timeout(LONG, carried).await.unwrap().unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(guest);
    }

    #[tokio::test]
    async fn a_guest_that_takes_nothing_is_left_with_its_client() {
        let (mut client, guest, carried) = ends(SHORT).await;
        // More than the socket to the guest holds.
        let much = vec![0; 48 << 10];
        client.write_all(&much).await.unwrap();
        tokio::time::sleep(SHORT * 3).await;
        assert!(!carried.is_finished(), "while there is one");
        drop(client);
        let ended = timeout(LONG, carried).await.unwrap().unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(guest);
    }

    #[tokio::test]
    async fn a_guest_that_is_slow_gets_everything() {
        let (mut client, mut guest, carried) = ends_with(10 * SHORT, 64 << 10).await;
        let much = vec![7; 160 << 10];
        client.write_all(&much).await.unwrap();
        drop(client);
        let mut taken = Vec::new();
        let mut piece = [0; 4 << 10];
        loop {
            let count = guest.read(&mut piece).await.unwrap();
            taken.extend_from_slice(&piece[..count]);
            if count == 0 {
                break;
            }
            tokio::time::sleep(SHORT).await;
        }
        assert_eq!(taken.len(), much.len());
        drop(guest);
        carried.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_answer_that_is_cut_does_not_look_whole() {
        let (mut client, mut guest, carried) = ends(SHORT).await;
        client.shutdown().await.unwrap();
        let answer = tokio::spawn(async move {
            let _ = guest.write_all(&vec![0; 64 << 20]).await;
        });
        let ended = timeout(LONG, carried).await.unwrap().unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let mut taken = Vec::new();
        let error = client.read_to_end(&mut taken).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        answer.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_is_slow_gets_everything() {
        let (mut client, mut guest, carried) = ends(10 * SHORT).await;
        client.shutdown().await.unwrap();
        let answer = vec![7; 160 << 10];
        guest.write_all(&answer).await.unwrap();
        // The guest says nothing more, and leaves the connection open.
        let mut taken = 0;
        let mut piece = [0; 4 << 10];
        while taken < answer.len() {
            taken += client.read(&mut piece).await.unwrap();
            tokio::time::sleep(SHORT).await;
        }
        assert_eq!(taken, answer.len());
        let ended = timeout(LONG, carried).await.unwrap().unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(guest);
    }

    #[tokio::test]
    async fn a_guest_that_answers_and_closes_is_heard() {
        let (mut client, mut guest, carried) = ends(SHORT).await;
        guest.write_all(b"answer").await.unwrap();
        drop(guest);
        // It doesn't take this any more.
        let _ = client.write_all(b"question").await;
        let mut answer = [0; 6];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"answer");
        drop(client);
        carried.await.unwrap().unwrap();
    }
}
