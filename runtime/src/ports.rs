//! Host ports of a guest's vsock. Whoever dials a port first has its stream, and
//! every process of the guest may dial: the number is what tells the agent apart.

use std::io;

use husk_protocol::port;
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// A port that nobody can guess. The same may come again, but hardly while
/// another stream waits for its guest.
///
/// # Errors
/// The kernel has no random numbers.
pub fn random() -> io::Result<u32> {
    loop {
        let mut bytes = [0; 4];
        match getrandom(&mut bytes, GetRandomFlags::empty()) {
            Ok(4) => {}
            Ok(_) | Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let port = u32::from_ne_bytes(bytes);
        // The last one means any to the kernel (VMADDR_PORT_ANY).
        if (port::FIRST_STREAM..u32::MAX).contains(&port) {
            return Ok(port);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn cannot_be_guessed() {
        let ports: BTreeSet<u32> = (0..100).map(|_| random().unwrap()).collect();
        assert_eq!(ports.len(), 100);
        assert!(ports.iter().all(|port| *port >= port::FIRST_STREAM));
        // Neither in a row nor all in one corner.
        let next = ports.iter().filter(|port| ports.contains(&(**port + 1)));
        assert!(next.count() < 10);
        assert!(ports.last().unwrap() - ports.first().unwrap() > 1 << 30);
    }
}
