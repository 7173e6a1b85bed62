//! Port forwarding: connections to localhost in the pod's network namespace on
//! the node are carried to localhost in the guest.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
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

/// How long nothing may come from the guest, or be taken by it, once the client has
/// hung up: a guest that says nothing more keeps no place for ever.
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

/// Carries both ways, until both have ended or one is gone.
async fn exchange(client: TcpStream, guest: UnixStream, patience: Duration) -> io::Result<()> {
    let (from_client, to_client) = client.into_split();
    let (from_guest, to_guest) = guest.into_split();
    let taken = AtomicU64::new(0);
    let mut inwards = pin!(carry_in(from_client, to_guest, patience));
    let mut outwards = pin!(carry_out(from_guest, to_client, &taken));
    tokio::select! {
        ended = &mut outwards => {
            ended?;
            return inwards.await;
        }
        ended = &mut inwards => ended?,
    }
    loop {
        let before = taken.load(Ordering::Relaxed);
        match timeout(patience, &mut outwards).await {
            Ok(ended) => return ended,
            Err(late) if taken.load(Ordering::Relaxed) == before => return Err(late.into()),
            Err(_) => {}
        }
    }
}

async fn carry_in(
    mut client: tcp::OwnedReadHalf,
    mut guest: unix::OwnedWriteHalf,
    patience: Duration,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let count = client.read(&mut piece).await?;
        let mut rest = &piece[..count];
        if rest.is_empty() {
            return guest.shutdown().await;
        }
        while !rest.is_empty() {
            match timeout(patience, guest.write(rest)).await {
                Ok(written) => rest = &rest[written?..],
                Err(late) if has_hung_up(&client)? => return Err(late.into()),
                // It waits as long as its client does.
                Err(_) => {}
            }
        }
    }
}

async fn carry_out(
    mut guest: unix::OwnedReadHalf,
    mut client: tcp::OwnedWriteHalf,
    taken: &AtomicU64,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let count = guest.read(&mut piece).await?;
        if count == 0 {
            return client.shutdown().await;
        }
        client.write_all(&piece[..count]).await?;
        taken.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whether the client sends no more, though what it sent has not been read.
fn has_hung_up(client: &tcp::OwnedReadHalf) -> io::Result<bool> {
    let stream: &TcpStream = client.as_ref();
    let mut polled = [PollFd::new(stream, PollFlags::RDHUP)];
    poll(&mut polled, Some(&Timespec::default()))?;
    Ok(!polled[0].revents().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    use rustix::net::sockopt::set_socket_send_buffer_size;

    const SHORT: Duration = Duration::from_millis(100);
    const LONG: Duration = Duration::from_secs(20);

    /// The client's end, the guest's end, and what is between them.
    async fn ends(
        patience: Duration,
    ) -> (
        TcpStream,
        UnixStream,
        tokio::task::JoinHandle<io::Result<()>>,
    ) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await;
        let (accepted, _) = listener.accept().await.unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        // It holds little, so that the rest fits in the window of the client, whose end
        // would not be told else.
        set_socket_send_buffer_size(&near, 4 << 10).unwrap();
        let carried = tokio::spawn(exchange(accepted, near, patience));
        (client.unwrap(), far, carried)
    }

    #[tokio::test]
    async fn all_is_carried_after_a_half_has_ended() {
        let (mut client, mut guest, carried) = ends(SHORT).await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        guest.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        // It takes longer than any silence may.
        for _ in 0..12 {
            guest.write_all(b"answer").await.unwrap();
            tokio::time::sleep(SHORT / 4).await;
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
}
