//! Docker's server of names for its networks. It listens in the namespace itself,
//! on an address of localhost, and rules of that namespace lead questions there.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use super::NetworkError;
use super::netns::Netns;

/// Docker's address, which it writes into `/etc/resolv.conf`.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

const PORT: u16 = 53;

/// It is on the same node.
const CONNECTED: Duration = Duration::from_secs(5);

/// Whether there is one in the namespace.
///
/// # Errors
/// The namespace cannot be entered.
pub fn is_there(netns: &Netns) -> Result<bool, NetworkError> {
    netns.enter(|| {
        // Of the calling thread's namespace.
        let table = std::fs::read_to_string("/proc/thread-self/net/udp");
        Ok(lists(&table.unwrap_or_default()))
    })
}

/// Some socket of the table is bound to the address; the kernel writes addresses
/// as the number that they are in memory.
fn lists(table: &str) -> bool {
    let address = format!("{:08X}:", u32::from_ne_bytes(ADDRESS.octets()));
    let local = |line: &str| line.split_whitespace().nth(1).map(str::to_owned);
    table
        .lines()
        .filter_map(local)
        .any(|local| local.starts_with(&address))
}

/// A non-blocking socket for datagrams with it.
///
/// # Errors
/// The namespace cannot be entered, or the kernel refused.
pub fn datagrams(netns: &Netns) -> Result<UdpSocket, NetworkError> {
    open(netns, || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((ADDRESS, PORT))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })
}

/// A non-blocking connection to it.
///
/// # Errors
/// The namespace cannot be entered, or nobody listens.
pub fn connection(netns: &Netns) -> Result<TcpStream, NetworkError> {
    open(netns, || {
        let stream = TcpStream::connect_timeout(&SocketAddr::from((ADDRESS, PORT)), CONNECTED)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    })
}

fn open<T: Send>(
    netns: &Netns,
    open: impl FnOnce() -> io::Result<T> + Send,
) -> Result<T, NetworkError> {
    netns.enter(|| open().map_err(NetworkError::Resolver))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_found_by_its_address() {
        let head =
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid";
        let line = |local: &str| {
            format!("{head}\n  12: {local} 00000000:0000 07 00000000:00000000 00:00000000     0\n")
        };
        assert!(lists(&line("0B00007F:A2C4")));
        assert!(!lists(&line("0100007F:0035")));
        assert!(!lists(head));
    }
}
