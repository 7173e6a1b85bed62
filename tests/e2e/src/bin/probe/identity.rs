//! What no two machines have in common.

use std::fs;
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

/// Nobody listens there.
const PORT: u16 = 9;

/// Prints random numbers from wherever the kernel gives them, a name and a value a
/// line. Of TCP it is how the first sequence numbers of two connections differ from
/// the clock: what the kernel keeps secret, and these ports.
pub fn identity() -> io::Result<()> {
    let mut bytes = [0; 32];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    println!("urandom {}", hex(&bytes));
    // SAFETY: the buffer is as long as said.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(got) != Ok(bytes.len()) {
        return Err(io::Error::last_os_error());
    }
    println!("getrandom {}", hex(&bytes));
    // SAFETY: the kernel gives every program 16 bytes there (getauxval(3)).
    let given = unsafe { *(libc::getauxval(libc::AT_RANDOM) as *const [u8; 16]) };
    println!("at-random {}", hex(&given));
    for name in ["uuid", "boot_id"] {
        let path = format!("/proc/sys/kernel/random/{name}");
        println!("{name} {}", fs::read_to_string(path)?.trim());
    }
    raise_loopback()?;
    let [one, other] = [40_001, 40_002].map(first_sequence);
    println!("sequence {} {}", one?, other?);
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

fn socket(domain: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = checked(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the descriptor is new.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Without a network of the pod's it may be down.
fn raise_loopback() -> io::Result<()> {
    let any = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // SAFETY: zeroes are valid for it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request lives on this stack.
    checked(unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })?;
    Ok(())
}

/// The first sequence number from `port`, less the clock as Linux adds it
/// (`seq_scale` of net/core/secure_seq.c: a count each 64 ns).
fn first_sequence(port: u16) -> io::Result<u32> {
    let protocol = u16::to_be(libc::ETH_P_IP as u16);
    let packets = socket(libc::AF_PACKET, libc::SOCK_DGRAM, protocol.into())?;
    let patience = libc::timeval {
        tv_sec: 5,
        tv_usec: 0,
    };
    // SAFETY: the value lives on this stack and is as long as said.
    checked(unsafe {
        libc::setsockopt(
            packets.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const patience).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    })?;
    let caller = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let address = |port: u16| libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from(Ipv4Addr::LOCALHOST).to_be(),
        },
        sin_zero: [0; 8],
    };
    let (ours, theirs) = (address(port), address(PORT));
    let length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: the address lives on this stack and is as long as said.
    checked(unsafe { libc::bind(caller.as_raw_fd(), (&raw const ours).cast(), length) })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let ticks = now.map_err(io::Error::other)?.as_nanos() >> 6;
    // SAFETY: as above. It is refused, which is as good.
    let _ = unsafe { libc::connect(caller.as_raw_fd(), (&raw const theirs).cast(), length) };
    loop {
        let mut packet = [0_u8; 128];
        // SAFETY: the buffer is as long as said.
        let got = unsafe {
            libc::recv(
                packets.as_raw_fd(),
                packet.as_mut_ptr().cast(),
                packet.len(),
                0,
            )
        };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        let packet = packet.get(..got).unwrap_or_default();
        if let Some(sequence) = syn_of(packet, port) {
            return Ok(sequence.wrapping_sub(ticks as u32));
        }
    }
}

/// The sequence number of an IPv4 packet that begins a connection from `port`.
fn syn_of(packet: &[u8], port: u16) -> Option<u32> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    if *packet.get(9)? != libc::IPPROTO_TCP as u8 {
        return None;
    }
    let tcp = packet.get(header..header + 20)?;
    let is_syn = tcp[13] & 0x12 == 0x02;
    let is_ours = tcp[..2] == port.to_be_bytes();
    (is_syn && is_ours).then(|| u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]))
}
