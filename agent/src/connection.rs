//! The one connection that ttrpc is served on, as the listener ttrpc wants.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use ttrpc::asynchronous::transport::Listener;

use crate::socket::Socket;

/// A listener that has accepted this connection and will accept no other, and
/// what is rung at the connection's end.
pub fn listener(socket: Socket) -> (Listener, Arc<Notify>) {
    let ended = Arc::new(Notify::new());
    let connection = Connection {
        socket,
        ended: Arc::clone(&ended),
    };
    let stream = futures::stream::once(std::future::ready(Ok(connection)));
    (Listener::new(stream), ended)
}

struct Connection {
    socket: Socket,
    ended: Arc<Notify>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.ended.notify_one();
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
            Poll::Ready(Ok(())) if buf.filled().len() == before => self.ended.notify_one(),
            Poll::Ready(Err(_)) => self.ended.notify_one(),
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
