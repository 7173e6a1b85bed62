//! The life of a VMM process: the spec comes in, the machine runs, requests are
//! answered in order, the reason of the end goes out.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use husk_vmm_spec::{
    ExitReason, Failure, Message, Reply, Request, SavedSpec, SpecError, Timeline, ValidVmSpec,
    VmSpec,
};
use rustix::event::{PollFd, PollFlags};

use crate::boot::{self, BootError};
use crate::clock::monotonic_ns;
use crate::devices::{PlugError, When};
use crate::exit::describe;
use crate::machine::Machine;
use crate::packet::{ControlSocket, Descriptors, Packet, PacketError};
use crate::saved::SavedError;
use crate::seccomp::{Confinement, Role};

/// Serves one machine on `socket` and returns when it is over. `exec_ns` is when
/// the process began.
pub fn serve(socket: &ControlSocket, exec_ns: u64, confinement: Confinement) {
    let reason = match start(socket, exec_ns, confinement) {
        Ok(Some(mut machine)) => {
            let reason = run(socket, &mut machine);
            if !machine.stop() {
                // The shim hears of the end all the same. What still runs ends with
                // the process.
                std::mem::forget(machine);
            }
            reason
        }
        Ok(None) => return,
        Err(failure) => ExitReason::Failed(failure),
    };
    // There is nobody to tell when this fails.
    let _ = socket.send(&Message::Exited(reason));
}

/// Boots what the first packet asks for. Nothing when the shim has hung up.
fn start(
    socket: &ControlSocket,
    exec_ns: u64,
    confinement: Confinement,
) -> Result<Option<Machine>, Failure> {
    let Some(mut packet) = socket.receive().map_err(|error| describe(&error))? else {
        return Ok(None);
    };
    let spec: VmSpec = packet.parse().map_err(|error| describe(&error))?;
    let spec =
        ValidVmSpec::new(spec, packet.descriptors.count()).map_err(|error| describe(&error))?;
    let spec_ns = monotonic_ns();
    let limited = confinement.limit_threads(spec.spec().vcpus.max);
    limited.map_err(|source| {
        describe(&BootError::Host {
            what: "limit of threads",
            source,
        })
    })?;
    let confinement = match spec.spec().vfio {
        true => confinement.with_vfio(),
        false => confinement,
    };
    let mut machine = boot::start(&spec, &mut packet.descriptors, confinement)
        .map_err(|error| describe(&error))?;
    drop(packet);
    confinement.check_descriptors().map_err(|source| {
        // A thread that could not begin closes what it had.
        if let Some(ExitReason::Failed(failure)) = machine.exit().reason() {
            return failure;
        }
        describe(&BootError::Host {
            what: "descriptors of the jailed process",
            source,
        })
    })?;
    confinement.enter(Role::Main).map_err(|source| {
        describe(&BootError::Host {
            what: "seccomp filter of the main thread",
            source,
        })
    })?;
    let entered_ns = monotonic_ns();
    machine.resume().map_err(|error| describe(&error))?;
    let timeline = Timeline {
        exec_ns,
        spec_ns,
        entered_ns,
    };
    // A hang-up is seen by the loop that follows.
    let _ = socket.send(&Message::Started(timeline));
    Ok(Some(machine))
}

/// Answers requests until the machine ends.
fn run(socket: &ControlSocket, machine: &mut Machine) -> ExitReason {
    let device_loop = machine.device_loop.handle();
    loop {
        if let Some(reason) = machine.exit().reason() {
            return reason;
        }
        let mut ready = [
            PollFd::from_borrowed_fd(machine.exit().as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(device_loop.given_back(), PollFlags::IN),
        ];
        match rustix::event::poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return ExitReason::Failed(describe(&io::Error::from(error))),
        }
        let [ended, control, late] = ready.map(|polled| !polled.revents().is_empty());
        // Why is what counts, whatever else is asked.
        if ended {
            continue;
        }
        if late {
            machine.devices().remove_late_ones();
        }
        if !control {
            continue;
        }
        let reply = match socket.receive() {
            Ok(None) => return ExitReason::Killed,
            Err(PacketError::Socket(error)) => return ExitReason::Failed(describe(&error)),
            Err(error @ PacketError::TooLong) => Err(describe(&error)),
            Ok(Some(packet)) => match answer(packet, machine) {
                Answer::Reply(reply) => reply,
                Answer::Kill => return ExitReason::Killed,
            },
        };
        // A hang-up is seen in the next round.
        let _ = socket.send(&Message::Reply(reply));
    }
}

enum Answer {
    Reply(Result<Reply, Failure>),
    Kill,
}

fn answer(packet: Packet, machine: &mut Machine) -> Answer {
    let request: Request = match packet.parse() {
        Ok(request) => request,
        Err(error) => return Answer::Reply(Err(describe(&error))),
    };
    let Packet {
        mut descriptors, ..
    } = packet;
    Answer::Reply(match request {
        Request::Kill => return Answer::Kill,
        Request::Pause => done(machine.pause()),
        Request::Resume => done(machine.resume()),
        Request::Save(saved) => done(save(&saved, machine, &mut descriptors)),
        Request::Stats => Ok(Reply::Stats(machine.stats())),
        Request::AddHostPorts(ports) => {
            done(machine.devices().add_host_ports(&ports, &mut descriptors))
        }
        Request::PlugMemory(mib) => done(machine.devices().plug_memory(mib)),
        Request::RemoveHostPorts(ports) => done(machine.devices().remove_host_ports(ports)),
        Request::AddDevice(device) => done(
            device
                .check(descriptors.count())
                .map_err(PlugError::from)
                .and_then(|()| {
                    machine
                        .devices()
                        .add(&device, &mut descriptors, When::Later)
                }),
        ),
        Request::AddVfio(group) => done(
            group
                .check(descriptors.count())
                .map_err(PlugError::from)
                .and_then(|()| machine.devices().add_vfio(&group, &mut descriptors)),
        ),
        Request::RemoveDevice(id) => done(machine.devices().remove(&id)),
    })
}

fn save(
    saved: &SavedSpec,
    machine: &Machine,
    descriptors: &mut Descriptors,
) -> Result<(), SaveError> {
    saved.check(descriptors.count())?;
    let state = File::from(descriptors.take(saved.state)?);
    let memory = File::from(descriptors.take(saved.memory)?);
    Ok(machine.save(&saved.origin, state, &memory)?)
}

/// A request to save that failed.
#[derive(Debug, thiserror::Error)]
enum SaveError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("descriptor")]
    Descriptor(#[from] io::Error),
    #[error(transparent)]
    Saved(#[from] SavedError),
}

fn done<E: std::error::Error>(result: Result<(), E>) -> Result<Reply, Failure> {
    result
        .map(|()| Reply::Done)
        .map_err(|error| describe(&error))
}
