//! The four bpf(2) commands that port forwarding needs. Numbers and layouts are
//! those of linux/bpf.h.

use std::ffi::c_long;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

const MAP_CREATE: c_long = 0;
const MAP_UPDATE_ELEM: c_long = 2;
const PROG_LOAD: c_long = 5;
const LINK_CREATE: c_long = 28;

const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_TYPE_SK_LOOKUP: u32 = 36;

/// One instruction (`struct bpf_insn`).
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Instruction {
    code: u8,
    /// Destination in the low four bits, source in the high four.
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    pub(super) const fn new(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Self {
        Self {
            code,
            registers: to | from << 4,
            offset,
            immediate,
        }
    }
}

/// Makes a map that holds one socket.
///
/// # Errors
/// The kernel's answer.
pub(super) fn create_socket_map() -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    let attributes = Attributes {
        map_type: MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
    };
    bpf_fd(MAP_CREATE, &attributes)
}

/// Puts `socket` into the map at key 0.
///
/// # Errors
/// The kernel's answer.
pub(super) fn put_socket(map: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u32,
        _padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let key = 0_u32;
    let value = socket.as_raw_fd();
    let attributes = Attributes {
        map: map.as_raw_fd().cast_unsigned(),
        _padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    bpf(MAP_UPDATE_ELEM, &attributes).map(drop)
}

/// Loads a program that chooses the socket a new connection goes to.
///
/// # Errors
/// The kernel's answer; its verifier refuses with EINVAL or EACCES.
pub(super) fn load_socket_lookup(program: &[Instruction]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program_type: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buffer: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        ifindex: u32,
        expected_attach_type: u32,
    }
    let license = c"Apache-2.0";
    let mut name = [0; 16];
    name[..12].copy_from_slice(b"husk_forward");
    let attributes = Attributes {
        program_type: PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
        name,
        ifindex: 0,
        expected_attach_type: ATTACH_TYPE_SK_LOOKUP,
    };
    bpf_fd(PROG_LOAD, &attributes)
}

/// Attaches `program` to a network namespace for as long as the result lives.
///
/// # Errors
/// The kernel's answer.
pub(super) fn attach(program: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let attributes = Attributes {
        program: program.as_raw_fd().cast_unsigned(),
        target: netns.as_raw_fd().cast_unsigned(),
        attach_type: ATTACH_TYPE_SK_LOOKUP,
        flags: 0,
    };
    bpf_fd(LINK_CREATE, &attributes)
}

fn bpf_fd<T>(command: c_long, attributes: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: these commands return a new descriptor (close-on-exec) that nobody
    // else knows of.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: c_long, attributes: &T) -> io::Result<c_long> {
    // SAFETY: `attributes` is laid out as the command's part of union bpf_attr,
    // its size is given, and the pointers in it are to live data of the sizes
    // that its other fields name.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
