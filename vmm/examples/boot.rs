//! Boots a kernel without the shim: makes the control socket, sends the spec,
//! copies the guest's console to standard output, says how it ended.
//!
//! ```text
//! boot KERNEL [--initramfs FILE] [--line TEXT] [--memory MIB] [--cpus N]
//!      [--max-cpus N] [--disk FILE]... [--read-only-disk FILE]...
//!      [--vmm FILE --uid N]
//! ```
//! With `--vmm` the machine runs in that program, jailed, as the shim starts it;
//! else in this process.

mod shim;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::thread;

use husk_vmm::clock::monotonic_ns;
use husk_vmm_spec::{
    BlockSpec, BootSpec, ConsoleSpec, Descriptor, MemorySpec, Message, Request, StartSpec,
    VcpuSpec, VmSpec,
};

use shim::{Result, console, copy, receive, send, start_vmm};

struct Plan {
    spec: VmSpec,
    descriptors: Vec<OwnedFd>,
    vmm: Option<String>,
    uid: u32,
}

fn main() -> Result<()> {
    let (plan, console) = plan()?;
    let asked_ns = monotonic_ns();
    // It goes on by itself.
    let (shim, _) = start_vmm(plan.vmm.as_deref(), plan.uid)?;
    send(&shim, &serde_json::to_vec(&plan.spec)?, &plan.descriptors)?;
    drop(plan.descriptors);
    let reader = thread::spawn(move || copy(console, std::io::stdout()));
    loop {
        let Some(message) = receive(&shim)? else {
            eprintln!("boot: the VMM hung up");
            break;
        };
        match message {
            Message::Started(timeline) => {
                let us = |ns: u64| ns.saturating_sub(asked_ns) / 1000;
                eprintln!(
                    "boot: exec {} us, spec {} us, entered {} us after the request",
                    us(timeline.exec_ns),
                    us(timeline.spec_ns),
                    us(timeline.entered_ns)
                );
                send(&shim, &serde_json::to_vec(&Request::Stats)?, &[])?;
            }
            Message::Reply(reply) => eprintln!("boot: {reply:?}"),
            Message::Exited(reason) => {
                eprintln!(
                    "boot: {reason:?} after {} us",
                    (monotonic_ns() - asked_ns) / 1000
                );
                break;
            }
        }
    }
    drop(shim);
    let _ = reader.join();
    Ok(())
}

fn plan() -> Result<(Plan, File)> {
    let mut arguments = std::env::args().skip(1);
    let kernel = arguments.next().ok_or("no kernel named")?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let (reader, writer) = console()?;
    let mut plan = Plan {
        spec: VmSpec {
            kvm: Descriptor(0),
            vcpus: VcpuSpec { boot: 1, max: 1 },
            memory: MemorySpec {
                boot_mib: 256,
                pluggable_mib: 0,
            },
            start: StartSpec::Boot(BootSpec {
                kernel: Descriptor(1),
                initramfs: None,
                command_line: "console=ttyS0 earlyprintk=ttyS0 panic=-1".into(),
            }),
            console: Some(ConsoleSpec {
                output: Descriptor(2),
            }),
            vfio: false,
            vsock: None,
            blocks: Vec::new(),
            nets: Vec::new(),
            filesystems: Vec::new(),
        },
        descriptors: vec![kvm.into(), File::open(kernel)?.into(), writer],
        vmm: None,
        uid: 65_000,
    };
    while let Some(option) = arguments.next() {
        let value = arguments.next().ok_or(format!("{option} wants a value"))?;
        let spec = &mut plan.spec;
        let StartSpec::Boot(boot) = &mut spec.start else {
            return Err("nothing boots".into());
        };
        let next = Descriptor(plan.descriptors.len() as u32);
        match option.as_str() {
            "--initramfs" => {
                plan.descriptors.push(File::open(value)?.into());
                boot.initramfs = Some(next);
            }
            "--line" => boot.command_line = value,
            "--memory" => spec.memory.boot_mib = value.parse()?,
            "--cpus" => {
                spec.vcpus.boot = value.parse()?;
                spec.vcpus.max = spec.vcpus.max.max(spec.vcpus.boot);
            }
            "--max-cpus" => spec.vcpus.max = value.parse()?,
            "--disk" | "--read-only-disk" => {
                let read_only = option == "--read-only-disk";
                let file = File::options().read(true).write(!read_only).open(value)?;
                plan.descriptors.push(file.into());
                let name = format!("disk{}", spec.blocks.len());
                spec.blocks.push(BlockSpec {
                    id: name.clone(),
                    file: next,
                    read_only,
                    serial: name,
                    rate: Default::default(),
                });
            }
            "--vmm" => plan.vmm = Some(value),
            "--uid" => plan.uid = value.parse()?,
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    Ok((plan, reader))
}
