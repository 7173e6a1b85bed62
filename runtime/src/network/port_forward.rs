//! Catches connections to localhost in the pod's network namespace.
//!
//! `kubectl port-forward` makes containerd dial localhost inside the namespace,
//! where nothing of the pod listens. A socket-lookup program attached to the
//! namespace hands every TCP connection to a loopback address, whatever its
//! port, to one listener of ours; the accepted connection's own address tells
//! which port was meant. Program and listener go with their descriptors.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::NetworkError;
use super::bpf::{self, Instruction};
use super::netns::Netns;
use super::resolver;

/// A listener for all loopback ports of a network namespace.
#[derive(Debug)]
pub struct PortForward {
    listener: TcpListener,
    attachment: OwnedFd,
}

impl PortForward {
    /// Begins to catch connections in the namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the kernel lacks socket lookup (5.9).
    pub fn open(netns: &Netns) -> Result<Self, NetworkError> {
        netns.enter(|| {
            let fail = |what| move |source| NetworkError::PortForward { what, source };
            let listener = listen().map_err(fail("listen"))?;
            let map = bpf::create_socket_map().map_err(fail("create the socket map"))?;
            bpf::put_socket(map.as_fd(), listener.as_fd())
                .map_err(fail("register the listener"))?;
            let program = bpf::load_socket_lookup(&program(map.as_fd()))
                .map_err(fail("load the socket-lookup program"))?;
            let namespace =
                File::open("/proc/thread-self/ns/net").map_err(fail("open the namespace"))?;
            let attachment = bpf::attach(program.as_fd(), namespace.as_fd())
                .map_err(fail("attach the socket-lookup program"))?;
            Ok(Self {
                listener,
                attachment,
            })
        })
    }

    /// The listener, non-blocking, and what must live as long as it. The local
    /// port of an accepted stream is the port that was dialled.
    pub fn into_parts(self) -> (TcpListener, OwnedFd) {
        (self.listener, self.attachment)
    }
}

fn listen() -> io::Result<TcpListener> {
    // A dual-stack socket takes IPv4 too; a namespace without IPv6 has only that.
    let any6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    let any4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let listener = TcpListener::bind(any6).or_else(|_| TcpListener::bind(any4))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

// Instruction codes of linux/bpf_common.h and linux/bpf.h.
const LOAD_WORD: u8 = 0x61;
const STORE_WORD_IMMEDIATE: u8 = 0x62;
const LOAD_IMMEDIATE_64: u8 = 0x18;
const MOVE: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const ADD_IMMEDIATE: u8 = 0x07;
const AND_IMMEDIATE: u8 = 0x57;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// Marks the immediate of [`LOAD_IMMEDIATE_64`] as a map's descriptor.
const PSEUDO_MAP_FD: u8 = 1;

const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

const SK_PASS: i32 = 1;

// Offsets in struct bpf_sk_lookup; addresses are in network byte order.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// The program: TCP to 127.0.0.0/8 or ::1 goes to the socket in `map`, all else
/// where it would go anyway; so does what Docker's server of names is asked.
fn program(map: BorrowedFd<'_>) -> [Instruction; 32] {
    let i = Instruction::new;
    let ipv6_one = 1_u32.to_be().cast_signed();
    let resolver = i32::from_ne_bytes(resolver::ADDRESS.octets());
    [
        /* 0 */ i(MOVE, 6, 1, 0, 0),
        /* 1 */ i(LOAD_WORD, 2, 6, PROTOCOL, 0),
        /* 2 */ i(JUMP_IF_NOT_EQUAL, 2, 0, 27, libc::IPPROTO_TCP),
        /* 3 */ i(LOAD_WORD, 2, 6, FAMILY, 0),
        /* 4 */ i(JUMP_IF_EQUAL, 2, 0, 5, libc::AF_INET6),
        // IPv4: the first byte in memory is the lowest of the word.
        /* 5 */
        i(LOAD_WORD, 2, 6, LOCAL_IP4, 0),
        /* 6 */ i(JUMP_IF_EQUAL, 2, 0, 23, resolver),
        /* 7 */ i(AND_IMMEDIATE, 2, 0, 0, 0xff),
        /* 8 */ i(JUMP_IF_NOT_EQUAL, 2, 0, 21, 127),
        /* 9 */ i(JUMP_IF_EQUAL, 2, 0, 6, 127),
        /* 10 */ i(LOAD_WORD, 2, 6, LOCAL_IP6, 0),
        /* 11 */ i(JUMP_IF_NOT_EQUAL, 2, 0, 18, 0),
        /* 12 */ i(LOAD_WORD, 2, 6, LOCAL_IP6 + 8, 0),
        /* 13 */ i(JUMP_IF_NOT_EQUAL, 2, 0, 16, 0),
        /* 14 */ i(LOAD_WORD, 2, 6, LOCAL_IP6 + 12, 0),
        /* 15 */ i(JUMP_IF_NOT_EQUAL, 2, 0, 14, ipv6_one),
        // The map's only key, 0, on the stack.
        /* 16 */
        i(STORE_WORD_IMMEDIATE, 10, 0, -4, 0),
        /* 17 */ i(LOAD_IMMEDIATE_64, 1, PSEUDO_MAP_FD, 0, map.as_raw_fd()),
        /* 18 */ i(0, 0, 0, 0, 0),
        /* 19 */ i(MOVE, 2, 10, 0, 0),
        /* 20 */ i(ADD_IMMEDIATE, 2, 0, 0, -4),
        /* 21 */ i(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        /* 22 */ i(JUMP_IF_EQUAL, 0, 0, 7, 0),
        /* 23 */ i(MOVE, 7, 0, 0, 0),
        /* 24 */ i(MOVE, 1, 6, 0, 0),
        /* 25 */ i(MOVE, 2, 7, 0, 0),
        /* 26 */ i(MOVE_IMMEDIATE, 3, 0, 0, 0),
        /* 27 */ i(CALL, 0, 0, 0, SK_ASSIGN),
        /* 28 */ i(MOVE, 1, 7, 0, 0),
        /* 29 */ i(CALL, 0, 0, 0, SK_RELEASE),
        /* 30 */ i(MOVE_IMMEDIATE, 0, 0, 0, SK_PASS),
        /* 31 */ i(EXIT, 0, 0, 0, 0),
    ]
}
