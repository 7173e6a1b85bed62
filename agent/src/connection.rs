//! The one connection that ttrpc is served on, as the listener ttrpc wants.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use ttrpc::asynchronous::transport::Listener;

use crate::socket::Socket;

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The shim has hung up.
    Closed,
    /// The shim did not: what joined us is gone. So it is for a guest that was
    /// saved and is restored.
    Broken,
}

/// The end of a connection.
#[derive(Default)]
pub struct End {
    rung: Notify,
    broken: AtomicBool,
}

impl End {
    /// Waits for it.
    pub async fn wait(&self) -> Ending {
        self.rung.notified().await;
        match self.broken.load(Ordering::Relaxed) {
            true => Ending::Broken,
            false => Ending::Closed,
        }
    }
}

/// A listener that has accepted this connection and will accept no other, and the
/// connection's end.
pub fn listener(socket: Socket) -> (Listener, Arc<End>) {
    let end = Arc::new(End::default());
    let connection = Connection {
        socket,
        end: Arc::clone(&end),
    };
    let stream = futures::stream::once(std::future::ready(Ok(connection)));
    (Listener::new(stream), end)
}

struct Connection {
    socket: Socket,
    end: Arc<End>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end.rung.notify_one();
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.socket).poll_read(cx, buf);
        // ttrpc keeps a dead connection until its last request is answered.
        match &polled {
            Poll::Ready(Ok(())) if buf.filled().len() == before => self.end.rung.notify_one(),
            Poll::Ready(Err(_)) => {
                self.end.broken.store(true, Ordering::Relaxed);
                self.end.rung.notify_one();
            }
            _ => {}
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
