//! One jailed process a pod. The shim starts it with its end of the control
//! socket as descriptor 3 and the ids to run under.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use husk_vmm::clock::monotonic_ns;
use husk_vmm::exit::describe;
use husk_vmm::packet::ControlSocket;
use husk_vmm::seccomp::Confinement;
use husk_vmm::{arguments, control, jail};
use husk_vmm_spec::{CONTROL_FD, ExitReason, Message};
use rustix::io::FdFlags;

fn main() -> ExitCode {
    let exec_ns = monotonic_ns();
    // SAFETY: only sets a number in the allocator; no thread exists yet.
    // Threads allocate little, so one arena serves all of them.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let (spec, socket) = match start() {
        Ok(started) => started,
        Err(error) => {
            eprintln!("husk-vmm: {error}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = jail::enter(spec) {
        let failed = Message::Exited(ExitReason::Failed(describe(&error)));
        // There is nobody to tell when this fails.
        let _ = socket.send(&failed);
        return ExitCode::FAILURE;
    }
    control::serve(&socket, exec_ns, Confinement::Filters);
    ExitCode::SUCCESS
}

fn start() -> Result<(husk_vmm_spec::JailSpec, ControlSocket), Box<dyn std::error::Error>> {
    let spec = arguments::parse(std::env::args_os().skip(1))?;
    // SAFETY: the shim left its end here; nothing has opened a descriptor since
    // the process began, and the number is used nowhere else.
    let socket = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    if let Err(error) = rustix::io::fcntl_setfd(&socket, FdFlags::CLOEXEC) {
        // Dropping it would end the process for closing what is not open.
        std::mem::forget(socket);
        return Err(format!(
            "descriptor {CONTROL_FD} is not the control socket: {}",
            io::Error::from(error)
        )
        .into());
    }
    Ok((spec, ControlSocket::new(socket)))
}
