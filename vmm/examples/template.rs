//! Boots a guest with Husk's agent without the shim, saves it once the agent
//! answers, and has others go on from there. Says how long each took until its
//! agent answered.
//!
//! ```text
//! template KERNEL INITRAMFS LINE [--memory MIB] [--cpus N] [--count N]
//!          [--vmm FILE --uid N]
//! ```
//! With `--vmm` machines run in that program, jailed, as the shim starts it, and
//! the memory of each is told; else in this process.

mod shim;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use husk_vmm::clock::monotonic_ns;
use husk_vmm_spec::{
    BootSpec, ConsoleSpec, Descriptor, HostPort, MemorySpec, Message, Reply, Request, SavedSpec,
    StartSpec, VcpuSpec, VmSpec, VsockSpec,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use shim::{Result, console, copy, send, start_vmm};

/// Where the agent dials, once.
const AGENT_PORT: u32 = 1024;

/// A ttrpc request of no service, which the agent answers.
const REQUEST: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 1, 1, 0];

/// How long a guest may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// What an idle guest still does after its first answer.
const SETTLING: Duration = Duration::from_millis(500);

struct Plan {
    kernel: String,
    initramfs: String,
    line: String,
    memory_mib: u32,
    cpus: u8,
    count: u32,
    vmm: Option<String>,
    uid: u32,
}

/// A machine whose agent has answered.
struct Machine {
    shim: OwnedFd,
    child: Option<Child>,
    /// The agent powers its guest off when this goes.
    _agent: UnixStream,
}

fn main() -> Result<()> {
    let plan = plan()?;
    let kernel = File::open(&plan.kernel)?.into();
    let initramfs = File::open(&plan.initramfs)?.into();
    let boot = StartSpec::Boot(BootSpec {
        kernel: Descriptor(3),
        initramfs: Some(Descriptor(4)),
        command_line: plan.line.clone(),
    });
    let machine = start(&plan, "boot", boot, vec![kernel, initramfs])?;
    thread::sleep(SETTLING);

    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let state = File::from(memfd_create("saved-state", flags)?);
    let memory = File::from(memfd_create("saved-memory", flags)?);
    memory.set_len(u64::from(plan.memory_mib) << 20)?;
    let saved = |at: u32| SavedSpec {
        state: Descriptor(at),
        memory: Descriptor(at + 1),
        origin: "example".into(),
    };
    let began = Instant::now();
    ask(&machine, &Request::Pause, &[])?;
    let files = [state.try_clone()?.into(), memory.try_clone()?.into()];
    ask(&machine, &Request::Save(saved(0)), &files)?;
    drop((files, machine));
    for file in [&state, &memory] {
        let all = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(file, all)?;
    }
    println!(
        "save: {} us, state {} bytes, memory {} KiB",
        began.elapsed().as_micros(),
        state.metadata()?.len(),
        memory.metadata()?.blocks() / 2
    );

    let mut alive = Vec::new();
    for number in 1..=plan.count {
        let files = vec![state.try_clone()?.into(), memory.try_clone()?.into()];
        let name = format!("restore {number}");
        let restore = StartSpec::Restore(saved(3));
        alive.push(start(&plan, &name, restore, files)?);
    }
    for (number, machine) in (1..).zip(&alive) {
        if let Some(child) = &machine.child {
            let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", child.id()))?;
            let of = |name| rollup.lines().find(|line| line.starts_with(name));
            let parts =
                ["Pss:", "Private_Dirty:", "Shared_Clean:"].map(|name| of(name).unwrap_or(""));
            println!("memory {number}: {}", parts.join(", "));
        }
    }
    for machine in alive {
        send(&machine.shim, &serde_json::to_vec(&Request::Kill)?, &[])?;
        if let Some(mut child) = machine.child {
            child.wait()?;
        }
    }
    Ok(())
}

/// Starts a machine and waits until its agent has answered.
fn start(plan: &Plan, name: &str, start: StartSpec, more: Vec<OwnedFd>) -> Result<Machine> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let (console, output) = console()?;
    let (mut agent, stream) = UnixStream::pair()?;
    agent.set_read_timeout(Some(PATIENCE))?;
    agent.write_all(&REQUEST)?;
    let mut descriptors = vec![kvm.into(), output, stream.into()];
    descriptors.extend(more);
    let spec = VmSpec {
        kvm: Descriptor(0),
        vcpus: VcpuSpec {
            boot: 1,
            max: plan.cpus,
        },
        memory: MemorySpec {
            boot_mib: plan.memory_mib,
            pluggable_mib: 0,
        },
        start,
        console: Some(ConsoleSpec {
            output: Descriptor(1),
        }),
        vfio: false,
        vsock: Some(VsockSpec {
            cid: 3,
            host_ports: vec![HostPort {
                port: AGENT_PORT,
                stream: Descriptor(2),
            }],
        }),
        blocks: Vec::new(),
        nets: Vec::new(),
        filesystems: Vec::new(),
    };
    let began_ns = monotonic_ns();
    let (shim, child) = start_vmm(plan.vmm.as_deref(), plan.uid)?;
    send(&shim, &serde_json::to_vec(&spec)?, &descriptors)?;
    drop(descriptors);
    thread::spawn(move || copy(console, std::io::stderr()));
    let timeline = match receive(&shim)? {
        Message::Started(timeline) => timeline,
        other => return Err(format!("{name}: {other:?}").into()),
    };
    let mut answer = [0; 10];
    if let Err(error) = agent.read_exact(&mut answer) {
        return Err(format!("{name}: {error}; {:?}", receive(&shim)?).into());
    }
    let us = |ns: u64| ns.saturating_sub(began_ns) / 1000;
    println!(
        "{name}: exec {} us, spec {} us, entered {} us, agent answered {} us",
        us(timeline.exec_ns),
        us(timeline.spec_ns),
        us(timeline.entered_ns),
        us(monotonic_ns())
    );
    Ok(Machine {
        shim,
        child,
        _agent: agent,
    })
}

fn ask(machine: &Machine, request: &Request, descriptors: &[OwnedFd]) -> Result<()> {
    send(&machine.shim, &serde_json::to_vec(request)?, descriptors)?;
    match receive(&machine.shim)? {
        Message::Reply(Ok(Reply::Done)) => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}

/// The VMM's next message.
fn receive(from: &OwnedFd) -> Result<Message> {
    Ok(shim::receive(from)?.ok_or("the VMM hung up")?)
}

fn plan() -> Result<Plan> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &str| arguments.next().ok_or(format!("no {what} named"));
    let mut plan = Plan {
        kernel: next("kernel")?,
        initramfs: next("initramfs")?,
        line: next("command line")?,
        memory_mib: 128,
        cpus: 1,
        count: 3,
        vmm: None,
        uid: 65_000,
    };
    while let Ok(option) = next("option") {
        let value = next("value")?;
        match option.as_str() {
            "--memory" => plan.memory_mib = value.parse()?,
            "--cpus" => plan.cpus = value.parse()?,
            "--count" => plan.count = value.parse()?,
            "--vmm" => plan.vmm = Some(value),
            "--uid" => plan.uid = value.parse()?,
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    Ok(plan)
}
