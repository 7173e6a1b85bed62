//! Names of Docker's networks: containers ask a server on their localhost, which
//! is the guest's. What is asked there is asked here, in the pod's network
//! namespace on the node, where Docker's server listens.

use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket, UnixStream};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio::time::timeout;

use crate::agent_client::Agent;
use crate::blocking;
use crate::error::Error;
use crate::network::{Netns, NetworkError, resolver};
use crate::pace::{Pace, Rate};
use crate::ports;
use crate::stdio::StdioError;
use crate::vm_process::Vm;

/// Most questions of a pod at a time.
const QUESTIONS: usize = 64;

/// How many are asked: the server is the whole node's.
const ASKED: Rate = Rate {
    burst: 1000,
    per_second: 200,
};

/// How long an answer may take: Docker asks others in turn.
const PATIENCE: Duration = Duration::from_secs(15);

/// Whether the guest serves names.
#[derive(Clone, Debug, Default)]
pub struct Names(Arc<Mutex<bool>>);

/// A message to or from the server.
struct Message {
    number: u32,
    over_tcp: bool,
    bytes: Vec<u8>,
}

impl Names {
    /// Has the guest serve names as soon as there is a server in the namespace. A
    /// pod that cannot resolve them runs all the same.
    pub async fn catch_up(&self, netns: &Netns, vm: &Vm, agent: &Agent) {
        let mut served = self.0.lock().await;
        if *served {
            return;
        }
        let inside = netns.clone();
        let there = blocking::run(move || resolver::is_there(&inside)).await;
        match there {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return,
            Ok(Err(error)) => {
                return tracing::debug!("names: {}", crate::error::chain(&error));
            }
            Err(error) => return tracing::debug!(%error, "names"),
        }
        match begin(vm, agent).await {
            Ok(guest) => {
                *served = true;
                let (netns, names) = (netns.clone(), self.clone());
                tokio::spawn(async move {
                    carry(guest, netns).await;
                    // Another may begin.
                    *names.0.lock().await = false;
                });
            }
            Err(error) => tracing::warn!("no names: {}", crate::error::chain(&error)),
        }
    }
}

async fn begin(vm: &Vm, agent: &Agent) -> Result<UnixStream, Error> {
    let fail = |source: io::Error| StdioError::Socket {
        stream: "names",
        source,
    };
    let (near, far) = StdUnixStream::pair().map_err(fail)?;
    near.set_nonblocking(true).map_err(fail)?;
    far.set_nonblocking(true).map_err(fail)?;
    let port = ports::random().map_err(fail)?;
    vm.add_host_ports(vec![(port, far.into())]).await?;
    // An agent answers when it has dialled: for one that says so and has not this is
    // the end of the connection, and it may serve names another time.
    let served = agent.serve_names(resolver::ADDRESS, port).await;
    vm.remove_host_ports(vec![port]).await;
    served?;
    Ok(UnixStream::from_std(near).map_err(fail)?)
}

/// Asks what the guest asks, until it hangs up.
async fn carry(guest: UnixStream, netns: Netns) {
    let (mut from_guest, mut to_guest) = guest.into_split();
    let (answers, mut answered) = mpsc::channel::<Message>(1);
    let places = Arc::new(Semaphore::new(QUESTIONS));
    let mut pace = Pace::new(ASKED);
    let listen = async {
        while let Ok(question) = read(&mut from_guest).await {
            pace.ready().await;
            pace.take(1);
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            let (netns, answers) = (netns.clone(), answers.clone());
            tokio::spawn(async move {
                let asked = timeout(PATIENCE, ask(&netns, &question)).await;
                match asked {
                    Ok(Ok(bytes)) => {
                        // The guest may have hung up.
                        let _ = answers.send(Message { bytes, ..question }).await;
                    }
                    Ok(Err(error)) => tracing::debug!(%error, "a name"),
                    Err(_) => tracing::debug!("no answer about a name"),
                }
                drop(place);
            });
        }
    };
    let answer = async {
        while let Some(message) = answered.recv().await {
            if write(&mut to_guest, &message).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = listen => {}
        () = answer => {}
    }
}

async fn read(guest: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Message> {
    let length = guest.read_u16().await?;
    let number = guest.read_u32().await?;
    let over_tcp = guest.read_u8().await? != 0;
    let mut bytes = vec![0; length.into()];
    guest.read_exact(&mut bytes).await?;
    Ok(Message {
        number,
        over_tcp,
        bytes,
    })
}

async fn write(guest: &mut (impl AsyncWriteExt + Unpin), message: &Message) -> io::Result<()> {
    let length = u16::try_from(message.bytes.len()).map_err(io::Error::other)?;
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(message.number.to_be_bytes());
    frame.push(u8::from(message.over_tcp));
    frame.extend(&message.bytes);
    guest.write_all(&frame).await
}

/// As the guest's program asked: an answer too long for a datagram says so, and
/// then it asks by TCP itself.
async fn ask(netns: &Netns, question: &Message) -> io::Result<Vec<u8>> {
    if question.over_tcp {
        let stream = opened(netns, resolver::connection).await?;
        let mut stream = TcpStream::from_std(stream)?;
        let length = u16::try_from(question.bytes.len()).map_err(io::Error::other)?;
        stream
            .write_all(&[&length.to_be_bytes()[..], &question.bytes].concat())
            .await?;
        let mut answer = vec![0; stream.read_u16().await?.into()];
        stream.read_exact(&mut answer).await?;
        return Ok(answer);
    }
    let socket = opened(netns, resolver::datagrams).await?;
    let socket = UdpSocket::from_std(socket)?;
    socket.send(&question.bytes).await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    let length = socket.recv(&mut answer).await?;
    answer.truncate(length);
    Ok(answer)
}

async fn opened<T: Send + 'static>(
    netns: &Netns,
    open: fn(&Netns) -> Result<T, NetworkError>,
) -> io::Result<T> {
    let netns = netns.clone();
    let opened = blocking::run(move || open(&netns)).await?;
    opened.map_err(io::Error::other)
}
