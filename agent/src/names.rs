//! A server of names that listens on the node, on localhost of the network
//! namespace that the machine took over, as Docker's does. It is asked here, on
//! the guest's localhost, and the shim asks it there.

use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use crate::error::{Doing, Error};
use crate::lock::lock;
use crate::socket::Dialler;

const PORT: u16 = 53;

/// Most questions that wait for an answer.
const QUESTIONS: usize = 128;

/// Most clients by TCP.
const CLIENTS: usize = 64;

/// How long one waits; whoever asked has asked again by then.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a client may say nothing.
const IDLE: Duration = Duration::from_secs(30);

/// A question, and who waits for its answer.
struct Question {
    message: Vec<u8>,
    over_tcp: bool,
    answer: oneshot::Sender<Vec<u8>>,
}

type Questions = mpsc::Sender<Question>;
type Waiting = Mutex<HashMap<u32, oneshot::Sender<Vec<u8>>>>;

/// Listens until the connection to the host ends.
pub async fn serve(dialler: &Dialler, address: &str, host_port: u32) -> Result<(), Error> {
    let ip: Ipv4Addr = address
        .parse()
        .ok()
        .filter(Ipv4Addr::is_loopback)
        .ok_or_else(|| Error::Invalid {
            field: "address",
            reason: format!("{address:?} is no IPv4 address of localhost"),
        })?;
    let udp = UdpSocket::bind((ip, PORT)).await;
    let udp = Arc::new(udp.doing("listen for DNS on", ip)?);
    let tcp = TcpListener::bind((ip, PORT)).await;
    let tcp = tcp.doing("listen for DNS on", ip)?;
    let outside = dialler
        .dial(host_port)
        .await
        .doing("dial host port", host_port)?;
    tokio::spawn(async move {
        let (from_host, to_host) = tokio::io::split(outside);
        let (questions, asked) = mpsc::channel(1);
        let waiting = Waiting::default();
        let ended = tokio::select! {
            ended = send(to_host, asked, &waiting) => ended,
            ended = receive(from_host, &waiting) => ended,
            () = take_datagrams(&udp, &questions) => Ok(()),
            () = take_clients(tcp, &questions) => Ok(()),
        };
        log::debug!("names: {ended:?}");
    });
    Ok(())
}

async fn send(
    mut host: impl AsyncWrite + Unpin,
    mut asked: mpsc::Receiver<Question>,
    waiting: &Waiting,
) -> io::Result<()> {
    let mut number: u32 = 0;
    while let Some(question) = asked.recv().await {
        number = number.wrapping_add(1);
        {
            let mut waiting = lock(waiting);
            waiting.retain(|_, answer| !answer.is_closed());
            waiting.insert(number, question.answer);
        }
        let Ok(length) = u16::try_from(question.message.len()) else {
            continue;
        };
        let mut frame = length.to_be_bytes().to_vec();
        frame.extend(number.to_be_bytes());
        frame.push(u8::from(question.over_tcp));
        frame.extend(question.message);
        host.write_all(&frame).await?;
    }
    Ok(())
}

async fn receive(mut host: impl AsyncRead + Unpin, waiting: &Waiting) -> io::Result<()> {
    loop {
        let length = host.read_u16().await?;
        let number = host.read_u32().await?;
        host.read_u8().await?;
        let mut message = vec![0; length.into()];
        host.read_exact(&mut message).await?;
        if let Some(answer) = lock(waiting).remove(&number) {
            // It may have waited for too long.
            let _ = answer.send(message);
        }
    }
}

async fn ask(questions: &Questions, message: Vec<u8>, over_tcp: bool) -> Option<Vec<u8>> {
    let (answer, answered) = oneshot::channel();
    let question = Question {
        message,
        over_tcp,
        answer,
    };
    questions.send(question).await.ok()?;
    timeout(PATIENCE, answered).await.ok()?.ok()
}

async fn take_datagrams(socket: &Arc<UdpSocket>, questions: &Questions) {
    let places = Arc::new(Semaphore::new(QUESTIONS));
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let (length, asker) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // What came of an earlier answer.
            Err(error) => {
                log::debug!("names: {error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        // Whoever asks by datagram asks again.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            continue;
        };
        let message = buffer[..length].to_vec();
        let (socket, questions) = (Arc::clone(socket), questions.clone());
        tokio::spawn(async move {
            if let Some(answer) = ask(&questions, message, false).await {
                let _: io::Result<usize> = socket.send_to(&answer, asker).await;
            }
            drop(place);
        });
    }
}

async fn take_clients(listener: TcpListener, questions: &Questions) {
    let places = Arc::new(Semaphore::new(CLIENTS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let (client, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                log::debug!("names: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let questions = questions.clone();
        tokio::spawn(async move {
            if let Err(error) = answer_client(client, &questions).await {
                log::debug!("names for {address}: {error}");
            }
            drop(place);
        });
    }
}

/// One question after the other, as RFC 1035 4.2.2 has them.
async fn answer_client(mut client: TcpStream, questions: &Questions) -> io::Result<()> {
    while let Ok(length) = timeout(IDLE, client.read_u16()).await {
        let mut message = vec![0; length?.into()];
        timeout(IDLE, client.read_exact(&mut message)).await??;
        let Some(answer) = ask(questions, message, true).await else {
            return Ok(());
        };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let framed = [&length.to_be_bytes()[..], &answer].concat();
        timeout(IDLE, client.write_all(&framed)).await??;
    }
    Ok(())
}
