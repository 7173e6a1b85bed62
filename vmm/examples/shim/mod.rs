//! What the examples do in the shim's place: they start a VMM and talk to it.

use std::error::Error;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread;

use husk_vmm::clock::monotonic_ns;
use husk_vmm::control;
use husk_vmm::packet::ControlSocket;
use husk_vmm::seccomp::Confinement;
use husk_vmm_spec::{CONTROL_FD, Message, PACKET_BYTES};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use rustix::pipe::{PipeFlags, pipe_with};

/// What may go wrong is told as it is.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Starts a VMM: `program`, jailed under `uid`, or without one a thread of this
/// process. Gives the shim's end of the control socket.
pub fn start_vmm(program: Option<&str>, uid: u32) -> Result<(OwnedFd, Option<Child>)> {
    let (shim, vmm) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let child = match program {
        Some(program) => Some(spawn(program, uid, vmm)?),
        None => {
            let exec_ns = monotonic_ns();
            thread::spawn(move || {
                control::serve(&ControlSocket::new(vmm), exec_ns, Confinement::None);
            });
            None
        }
    };
    Ok((shim, child))
}

fn spawn(program: &str, uid: u32, control: OwnedFd) -> Result<Child> {
    let mut command = Command::new(program);
    command.args(["--uid", &uid.to_string(), "--gid", &uid.to_string()]);
    let fd = control.as_raw_fd();
    // SAFETY: dup2 is async-signal-safe, and nothing else is done in the child.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd, CONTROL_FD) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    Ok(command.spawn()?)
}

/// A pipe for a console: this end, and the VMM's, which does not wait.
pub fn console() -> Result<(File, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    rustix::io::ioctl_fionbio(&reader, false)?;
    Ok((reader.into(), writer))
}

/// Shows what a console says until its machine ends.
pub fn copy(mut console: File, mut to: impl Write) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = console.read(&mut buffer) {
        let _ = to.write_all(&buffer[..count]);
    }
}

/// Sends a packet.
pub fn send(to: &OwnedFd, bytes: &[u8], descriptors: &[OwnedFd]) -> Result<()> {
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err("too many descriptors".into());
    }
    rustix::net::sendmsg(
        to,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// The VMM's next message; none when it has hung up.
pub fn receive(from: &OwnedFd) -> Result<Option<Message>> {
    let mut bytes = vec![0; PACKET_BYTES];
    let received = rustix::net::recvmsg(
        from,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut RecvAncillaryBuffer::default(),
        RecvFlags::empty(),
    )?;
    match received.bytes {
        0 => Ok(None),
        count => Ok(Some(serde_json::from_slice(&bytes[..count])?)),
    }
}
