//! A saved machine: the file that holds it, a machine that begins from one, and
//! each kind of device that can be saved, with a driver that does as it likes.
#![no_main]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};

use arbitrary::Arbitrary;
use husk_fuzz::driver::{Act, changed, drive_saved};
use husk_fuzz::skip;
use husk_virtio::VirtioDevice;
use husk_virtio::balloon::Balloon;
use husk_virtio::console::Console;
use husk_virtio::rng::Rng;
use husk_virtio::vsock::Vsock;
use husk_vmm::boot;
use husk_vmm::packet::Descriptors;
use husk_vmm::saved::{MAGIC, MachineState, VERSION};
use husk_vmm::seccomp::Confinement;
use husk_vmm_spec::{
    BootSpec, ConsoleSpec, Descriptor, HostPort, MemorySpec, SavedSpec, StartSpec, ValidVmSpec,
    VcpuSpec, VmSpec, VsockSpec,
};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::pipe::{PipeFlags, pipe_with};

#[derive(Arbitrary, Debug)]
enum Input {
    /// What stands behind the file's first bytes.
    File(Vec<u8>),
    /// Changes to a whole machine.
    Machine(Vec<(u16, u8)>),
    /// Changes to a device.
    Device {
        kind: Kind,
        before: Vec<Act<()>>,
        changes: Vec<(u16, u8)>,
        after: Vec<Act<()>>,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Rng,
    Balloon,
    Console,
    Vsock,
}

const MIB: u32 = 64;
const ORIGIN: &str = "fuzz";

/// A machine that was saved before it ran, and its memory.
struct Saved {
    state: Vec<u8>,
    memory: File,
}

static SAVED: LazyLock<Saved> = LazyLock::new(|| {
    let memory = memfd("memory");
    memory.set_len(u64::from(MIB) << 20).expect("memory");
    let state = memfd("state");
    let kernel = memfd("kernel");
    kernel.write_all_at(&kernel_bytes(), 0).expect("memory");
    let start = StartSpec::Boot(BootSpec {
        kernel: Descriptor(3),
        initramfs: None,
        command_line: String::new(),
    });
    let mut machine = machine(start, vec![kernel.into()]).expect("a machine");
    let copy = state.try_clone().expect("a descriptor");
    machine
        .save(ORIGIN, copy, &memory)
        .expect("it can be saved");
    machine.stop();
    let seals = SealFlags::WRITE | SealFlags::SHRINK;
    rustix::fs::fcntl_add_seals(&memory, seals).expect("seals");
    let mut bytes = vec![0; state.metadata().expect("its size").len() as usize];
    state.read_exact_at(&mut bytes, 0).expect("its bytes");
    Saved {
        state: bytes,
        memory,
    }
});

fn memfd(name: &str) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    rustix::fs::memfd_create(name, flags)
        .expect("a memfd")
        .into()
}

/// An ELF file of one segment: `1: hlt; jmp 1b`.
fn kernel_bytes() -> Vec<u8> {
    const ENTRY: u64 = 2 << 20;
    let code = [0xf4, 0xeb, 0xfd];
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend([ENTRY, 64, 0].map(u64::to_le_bytes).concat());
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // Loaded, readable and executable; where in the file and in memory, how long.
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let length = code.len() as u64;
    file.extend(
        [120, ENTRY, ENTRY, length, length, 4096]
            .map(u64::to_le_bytes)
            .concat(),
    );
    file.extend(code);
    file
}

fn machine(
    start: StartSpec,
    more: Vec<OwnedFd>,
) -> Result<husk_vmm::machine::Machine, boot::BootError> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.unwrap_or_else(|error| skip(format!("/dev/kvm: {error}")));
    let (_, output) = pipe_with(PipeFlags::NONBLOCK).expect("a pipe");
    let (stream, _) = UnixStream::pair().expect("a pair");
    let spec = VmSpec {
        kvm: Descriptor(0),
        vcpus: VcpuSpec { boot: 1, max: 1 },
        memory: MemorySpec {
            boot_mib: MIB,
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
                port: 1,
                stream: Descriptor(2),
            }],
        }),
        blocks: Vec::new(),
        nets: Vec::new(),
        filesystems: Vec::new(),
    };
    let mut descriptors = vec![kvm.into(), output, stream.into()];
    descriptors.extend(more);
    let spec = ValidVmSpec::new(spec, descriptors.len()).expect("it is valid");
    boot::start(
        &spec,
        &mut Descriptors::from(descriptors),
        Confinement::None,
    )
}

/// Starts one from the changed state and lets it run for a moment.
fn restore(changes: &[(u16, u8)]) {
    let state = memfd("state");
    let bytes = changed(SAVED.state.clone(), changes);
    state.write_all_at(&bytes, 0).expect("memory");
    let memory = SAVED.memory.try_clone().expect("a descriptor");
    let start = StartSpec::Restore(SavedSpec {
        state: Descriptor(3),
        memory: Descriptor(4),
        origin: ORIGIN.into(),
    });
    match machine(start, vec![state.into(), memory.into()]) {
        Ok(mut machine) => {
            machine.resume().expect("the loop lives");
            machine.stop();
        }
        Err(error) => assert!(!changes.is_empty(), "{error:?}"),
    }
    unmap();
}

/// Takes back the addresses of a machine that has ended: a VMM keeps them as long
/// as it lives.
fn unmap() {
    let inode = SAVED
        .memory
        .metadata()
        .expect("its number")
        .ino()
        .to_string();
    let maps = std::fs::read_to_string("/proc/self/maps").expect("it is mounted");
    // Each of its pieces in the file is a line, and leads to the same addresses.
    let mut starts = BTreeSet::new();
    for line in maps.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        let number = |text: &str| u64::from_str_radix(text, 16).expect("a number");
        if let [range, _, offset, _, found, ..] = fields[..]
            && found == inode
            && let Some((start, _)) = range.split_once('-')
        {
            starts.insert((number(start) - number(offset)) as usize);
        }
    }
    for start in starts {
        let bytes = (MIB as usize) << 20;
        // SAFETY: the mapping of a machine that is gone, from its first byte to its
        // last, once: nobody has mapped anything there since.
        let _ = unsafe { rustix::mm::munmap(std::ptr::without_provenance_mut(start), bytes) };
    }
}

fn device(kind: Kind) -> Box<dyn VirtioDevice> {
    match kind {
        Kind::Rng => Box::new(Rng),
        Kind::Balloon => Box::new(Balloon::default()),
        Kind::Console => {
            let (_, writer) = pipe_with(PipeFlags::NONBLOCK).expect("a pipe");
            Box::new(Console::new(writer, Arc::default()).expect("a pipe is good"))
        }
        Kind::Vsock => {
            let (_, far) = UnixStream::pair().expect("a pair");
            Box::new(Vsock::new(3, vec![(1, far.into())]))
        }
    }
}

fuzz_target!(init: husk_fuzz::start(), |input: Input| {
    match input {
        Input::File(bytes) => {
            let file = [&MAGIC[..], &VERSION.to_le_bytes(), &bytes].concat();
            if let Some(state) = MachineState::parse(&file) {
                // What passed can be written, and passes again.
                let bytes = postcard::to_allocvec(&state).expect("it can be written");
                let file = [&MAGIC[..], &VERSION.to_le_bytes(), &bytes].concat();
                assert!(MachineState::parse(&file).is_some());
            }
        }
        Input::Machine(changes) => restore(&changes),
        Input::Device {
            kind,
            before,
            changes,
            after,
        } => drive_saved(|| device(kind), before, &changes, after),
    }
});
