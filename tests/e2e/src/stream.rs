//! Exec, Attach and PortForward over containerd's streaming server, as
//! Kubernetes' clients speak to it by WebSocket.

use std::collections::HashMap;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

/// Channels of Exec and Attach.
pub mod channel {
    /// To the process.
    pub const STDIN: u8 = 0;
    /// From the process.
    pub const STDOUT: u8 = 1;
    /// From the process.
    pub const STDERR: u8 = 2;
    /// The status at the end.
    pub const ERROR: u8 = 3;
    /// Terminal sizes.
    pub const RESIZE: u8 = 4;
    /// Version 5: names a channel that is done.
    pub const CLOSE: u8 = 255;
}

/// An open stream, its channels told apart.
pub struct Stream {
    socket: WebSocket<TcpStream>,
    protocol: String,
    received: HashMap<u8, Vec<u8>>,
    closed: bool,
}

impl Stream {
    /// Opens the stream of an Exec or Attach.
    pub fn open(url: &str) -> Result<Self> {
        Self::dial(url, "v5.channel.k8s.io, v4.channel.k8s.io")
    }

    /// Opens a connection to `port` behind a PortForward's URL.
    pub fn open_port(url: &str, port: u16) -> Result<Self> {
        let mut stream = Self::dial(&format!("{url}?port={port}"), "v4.channel.k8s.io")?;
        // Each channel (data 0, error 1) begins with the port, little endian.
        for which in [channel::STDIN, 1] {
            stream.until(Duration::from_secs(20), |stream| {
                stream.bytes(which).len() >= 2
            })?;
            let begun = stream.received.entry(which).or_default();
            ensure!(
                begun[..2] == port.to_le_bytes(),
                "channel {which} begins with {begun:?}"
            );
            begun.drain(..2);
        }
        Ok(stream)
    }

    fn dial(url: &str, protocols: &'static str) -> Result<Self> {
        let address = url
            .strip_prefix("http://")
            .and_then(|rest| rest.split('/').next())
            .with_context(|| format!("a streaming URL of another form: {url}"))?;
        let connection =
            TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
        connection.set_nodelay(true)?;
        let mut request = url.replacen("http://", "ws://", 1).into_client_request()?;
        request.headers_mut().insert(
            "Sec-WebSocket-Protocol",
            HeaderValue::from_static(protocols),
        );
        let (socket, answer) = tungstenite::client(request, connection)
            .map_err(|error| anyhow::anyhow!("{url}: {error}"))?;
        let protocol = answer
            .headers()
            .get("Sec-WebSocket-Protocol")
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        Ok(Self {
            socket,
            protocol,
            received: HashMap::new(),
            closed: false,
        })
    }

    /// Whether the server can be told that standard input ends.
    pub fn can_half_close(&self) -> bool {
        self.protocol.starts_with("v5.")
    }

    /// Sends bytes on a channel.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let mut message = vec![channel];
        message.extend(bytes);
        Ok(self.socket.send(Message::binary(message))?)
    }

    /// Ends standard input.
    pub fn end_stdin(&mut self) -> Result<()> {
        ensure!(self.can_half_close(), "{} cannot half-close", self.protocol);
        self.send(channel::CLOSE, &[channel::STDIN])
    }

    /// Tells the terminal's size.
    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<()> {
        let size = serde_json::json!({ "Width": columns, "Height": rows });
        self.send(channel::RESIZE, size.to_string().as_bytes())
    }

    /// What a channel has brought so far.
    pub fn bytes(&self, channel: u8) -> &[u8] {
        self.received.get(&channel).map_or(&[], Vec::as_slice)
    }

    /// What a channel has brought so far, as text.
    pub fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(self.bytes(channel)).into_owned()
    }

    /// Receives until a channel holds `wanted`.
    pub fn until_text(&mut self, channel: u8, wanted: &str, deadline: Duration) -> Result<()> {
        self.until(deadline, |stream| stream.text(channel).contains(wanted))
            .with_context(|| format!("waiting for {wanted:?}"))
    }

    /// Sends `question` each second until standard output holds `answer`.
    pub fn asks_until(&mut self, question: &[u8], answer: &str, deadline: Duration) -> Result<()> {
        let begun = Instant::now();
        loop {
            self.send(channel::STDIN, question)?;
            let seen = self.until_text(channel::STDOUT, answer, Duration::from_secs(1));
            if seen.is_ok() || begun.elapsed() > deadline {
                return seen;
            }
        }
    }

    /// Receives until the server closes.
    pub fn until_closed(&mut self, deadline: Duration) -> Result<()> {
        self.until(deadline, |stream| stream.closed)
    }

    /// Receives until `done` holds.
    pub fn until(&mut self, deadline: Duration, done: impl Fn(&Self) -> bool) -> Result<()> {
        let begun = Instant::now();
        while !done(self) {
            let left = deadline.saturating_sub(begun.elapsed());
            ensure!(
                !left.is_zero(),
                "not within {deadline:?}; received {}",
                self.shown()
            );
            ensure!(
                !self.closed,
                "closed by the server; received {}",
                self.shown()
            );
            self.socket.get_ref().set_read_timeout(Some(left))?;
            match self.socket.read() {
                Ok(Message::Binary(message)) => {
                    let (channel, bytes) =
                        message.split_first().context("a message without channel")?;
                    self.received.entry(*channel).or_default().extend(bytes);
                }
                Ok(Message::Close(_)) => self.closed = true,
                Ok(_) => {}
                Err(tungstenite::Error::Io(error))
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) => {}
                // The server may cut the connection without saying goodbye.
                Err(
                    tungstenite::Error::ConnectionClosed
                    | tungstenite::Error::AlreadyClosed
                    | tungstenite::Error::Io(_)
                    | tungstenite::Error::Protocol(_),
                ) => self.closed = true,
                Err(error) => bail!("{error}; received {}", self.shown()),
            }
        }
        Ok(())
    }

    /// The exit code from the status on the error channel, once closed.
    pub fn exit_code(&self) -> Result<i32> {
        let status: serde_json::Value = serde_json::from_slice(self.bytes(channel::ERROR))
            .with_context(|| format!("no status; received {}", self.shown()))?;
        if status["status"] == "Success" {
            return Ok(0);
        }
        status["details"]["causes"]
            .as_array()
            .and_then(|causes| causes.iter().find(|cause| cause["reason"] == "ExitCode"))
            .and_then(|cause| cause["message"].as_str()?.parse().ok())
            .with_context(|| format!("no exit code in {status}"))
    }

    fn shown(&self) -> String {
        let mut channels: Vec<_> = self.received.keys().copied().collect();
        channels.sort_unstable();
        let texts: Vec<String> = channels
            .into_iter()
            .map(|channel| {
                format!(
                    "{channel}: {:?}",
                    crate::process::tail(&self.text(channel), 500)
                )
            })
            .collect();
        format!("[{}]", texts.join(", "))
    }
}
