//! Names that are asked on the pod's localhost and answered by the host.

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};

use husk_protocol::agent::ServeNamesRequest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::Code;

use crate::agent::{Agent, context, skip, status, unable, within};

/// Runs something on a thread in the pod's network namespace.
fn in_pod<T: Send + 'static>(
    agent: &Agent,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", agent.pid())).unwrap();
    std::thread::spawn(move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
}

/// Takes a question; its number, how it came, and what it says.
async fn question(stream: &mut UnixStream) -> (u32, u8, Vec<u8>) {
    let length = stream.read_u16().await.unwrap();
    let number = stream.read_u32().await.unwrap();
    let over_tcp = stream.read_u8().await.unwrap();
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await.unwrap();
    (number, over_tcp, message)
}

async fn answer(stream: &mut UnixStream, number: u32, message: &[u8]) {
    let length = u16::try_from(message.len()).unwrap();
    stream.write_u16(length).await.unwrap();
    stream.write_u32(number).await.unwrap();
    stream.write_u8(0).await.unwrap();
    stream.write_all(message).await.unwrap();
}

#[tokio::test]
async fn names_are_asked_of_the_host() {
    if let Some(reason) = unable() {
        skip("names_are_asked_of_the_host", &reason);
        return;
    }
    let agent = Agent::start_with("ip link set lo up").await;
    let (host_port, listener) = agent.port();
    let request = ServeNamesRequest {
        address: "127.0.0.11".to_owned(),
        host_port,
        ..Default::default()
    };
    agent.client.serve_names(context(), &request).await.unwrap();
    let (mut host, _) = within("the agent", listener.accept()).await.unwrap();

    // Two at once, answered the other way round.
    let ask = |text: &'static [u8]| {
        in_pod(&agent, move || {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.send_to(text, "127.0.0.11:53").unwrap();
            let mut buffer = [0; 100];
            let (length, _) = socket.recv_from(&mut buffer).unwrap();
            buffer[..length].to_vec()
        })
    };
    let first = ask(b"first");
    let (of_first, over_tcp, message) = within("a question", question(&mut host)).await;
    assert_eq!((over_tcp, &*message), (0, &b"first"[..]));
    let second = ask(b"second");
    let (of_second, _, message) = within("a question", question(&mut host)).await;
    assert_eq!(message, b"second");
    answer(&mut host, 12345, b"to nobody").await;
    answer(&mut host, of_second, b"2").await;
    answer(&mut host, of_first, b"1").await;
    assert_eq!(second.join().unwrap(), b"2");
    assert_eq!(first.join().unwrap(), b"1");

    // More than fits in a datagram, twice over one connection.
    let client = in_pod(&agent, || {
        let mut stream = TcpStream::connect("127.0.0.11:53").unwrap();
        let mut answers = Vec::new();
        for _ in 0..2 {
            stream.write_all(b"\0\x04long").unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut answer = vec![0; u16::from_be_bytes(length).into()];
            stream.read_exact(&mut answer).unwrap();
            answers.push(answer);
        }
        answers
    });
    let long = vec![7; 65_535];
    for _ in 0..2 {
        let (number, over_tcp, message) = within("a question", question(&mut host)).await;
        assert_eq!((over_tcp, &*message), (1, &b"long"[..]));
        answer(&mut host, number, &long).await;
    }
    assert_eq!(client.join().unwrap(), [long.clone(), long]);

    // The address is taken until the host hangs up.
    let taken = agent.client.serve_names(context(), &request).await;
    let (_, text) = status(taken.unwrap_err());
    assert!(text.contains("listen for DNS on 127.0.0.11"), "{text}");
    drop(host);
    let (host_port, _listener) = agent.port();
    let again = ServeNamesRequest {
        host_port,
        ..request.clone()
    };
    let mut tries = 0;
    while agent.client.serve_names(context(), &again).await.is_err() {
        tries += 1;
        assert!(tries < 200);
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn names_are_served_on_localhost_alone() {
    if let Some(reason) = unable() {
        skip("names_are_served_on_localhost_alone", &reason);
        return;
    }
    let agent = Agent::start_with("ip link set lo up").await;
    for address in ["0.0.0.0", "10.0.0.1", "::1", ""] {
        let request = ServeNamesRequest {
            address: address.to_owned(),
            ..Default::default()
        };
        let refused = agent.client.serve_names(context(), &request).await;
        let (code, text) = status(refused.unwrap_err());
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.contains(address), "{text}");
    }
}
