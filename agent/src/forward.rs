//! Port forwarding: a TCP connection within the pod, carried over a host port.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::TcpStream;

use crate::error::{Doing, Error};
use crate::socket::Dialler;

/// Connects to the port on localhost, then to the host, and carries both ways
/// until both are done.
pub async fn dial(dialler: &Dialler, port: u32, host_port: u32) -> Result<(), Error> {
    let port = u16::try_from(port).map_err(|_| Error::Invalid {
        field: "port",
        reason: format!("{port} is no TCP port"),
    })?;
    let connected = match TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await {
        Ok(stream) => Ok(stream),
        // A server of IPv6 alone; its answer matters only when it's there.
        Err(error) => TcpStream::connect(SocketAddr::from((Ipv6Addr::LOCALHOST, port)))
            .await
            .map_err(|_| error),
    };
    let mut inside = connected.doing("connect to port", port)?;
    let mut outside = dialler
        .dial(host_port)
        .await
        .doing("dial host port", host_port)?;
    tokio::spawn(async move {
        if let Err(error) = tokio::io::copy_bidirectional(&mut inside, &mut outside).await {
            log::debug!("forwarding of port {port}: {error}");
        }
    });
    Ok(())
}
