//! What the file server costs: file operations through a mount of it (with
//! `/dev/fuse` as transport) against the same on the directory itself, and
//! requests through the real program's virtqueue.
//!
//! `cargo bench -p husk-fs`, as root; with `-- queue` the second part alone,
//! whose instructions can be compared between runs, also on a busy machine.

#![allow(clippy::unwrap_used)]

#[path = "../tests/driver/mod.rs"]
mod driver;
#[path = "../tests/harness/mod.rs"]
mod harness;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use driver::{Descriptor, Guest, SCRATCH, object};
use harness::Mount;
use husk_fs::abi::{EntryOut, GetattrIn, InHeader, Opcode, OpenIn, OpenOut, ReadIn};
use rustix::mount::{MountFlags, MountPropagationFlags};
use vm_memory::ByteValued;

const MIB: usize = 1 << 20;
const BIG: usize = 256 * MIB;
const FILES: usize = 5000;

fn main() {
    if std::env::args().any(|word| word == "queue") {
        // Mounts of this part stay in a namespace of their own.
        drop(Mount::new(8));
        return queue();
    }
    let Some(mount) = Mount::new(8192) else {
        return;
    };
    let host = mount.host("web/rootfs");
    let guest = mount.guest("web/rootfs");
    println!("{:<34}{:>12}{:>12}{:>8}", "", "directly", "served", "ratio");
    for dir in ["host", "guest"] {
        // Each side has its own files, so that neither warms the other's.
        fs::create_dir(host.join(dir)).unwrap();
    }
    let sides = [host.join("host"), guest.join("guest")];
    compare("write 256 MiB", BIG, "B", sides.each_ref(), write_big);
    // Reread from where the guest has nothing cached.
    fs::rename(host.join("guest/big"), host.join("guest/cold")).unwrap();
    fs::rename(host.join("host/big"), host.join("host/cold")).unwrap();
    compare(
        "read 256 MiB, guest cold",
        BIG,
        "B",
        sides.each_ref(),
        read_big,
    );
    compare(
        "read 256 MiB, guest warm",
        BIG,
        "B",
        sides.each_ref(),
        read_big,
    );
    compare(
        "read 4 KiB at random, direct",
        20_000,
        "op",
        sides.each_ref(),
        read_random,
    );
    compare(
        "create and write 5000 files",
        FILES,
        "op",
        sides.each_ref(),
        create_many,
    );
    compare(
        "stat 5000 files, known",
        FILES,
        "op",
        sides.each_ref(),
        stat_many,
    );
    for dir in ["host", "guest"] {
        fs::rename(host.join(dir).join("many"), host.join(dir).join("new")).unwrap();
    }
    compare(
        "open 5000 files, unknown",
        FILES,
        "op",
        sides.each_ref(),
        open_new,
    );
    compare("list 5000 files", FILES, "op", sides.each_ref(), list_new);
    compare(
        "remove 5000 files",
        FILES,
        "op",
        sides.each_ref(),
        remove_new,
    );
    drop(mount);
    queue();
}

fn compare(name: &str, count: usize, unit: &str, sides: [&std::path::PathBuf; 2], run: fn(&Path)) {
    let [direct, served] = sides.map(|dir| {
        let start = Instant::now();
        run(dir);
        start.elapsed()
    });
    let told = |time: Duration| {
        let rate = count as f64 / time.as_secs_f64();
        match unit {
            "B" => format!("{:.0} MiB/s", rate / MIB as f64),
            _ => format!("{:.1} us", 1e6 / rate),
        }
    };
    let ratio = served.as_secs_f64() / direct.as_secs_f64();
    println!(
        "{name:<34}{:>12}{:>12}{ratio:>8.2}",
        told(direct),
        told(served)
    );
}

fn write_big(dir: &Path) {
    let file = File::create(dir.join("big")).unwrap();
    let block = vec![7; MIB];
    for offset in (0..BIG).step_by(MIB) {
        file.write_all_at(&block, offset as u64).unwrap();
    }
}

fn read_big(dir: &Path) {
    let file = File::open(dir.join("cold")).unwrap();
    let mut block = vec![0; MIB];
    for offset in (0..BIG).step_by(MIB) {
        file.read_exact_at(&mut block, offset as u64).unwrap();
    }
}

fn read_random(dir: &Path) {
    // Past the guest's cache; the host's is used either way.
    let mut options = File::options();
    if dir.ends_with("guest") {
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_DIRECT);
    }
    let file = options.read(true).open(dir.join("cold")).unwrap();
    let mut block = vec![0u8; 8192];
    let start = block.as_ptr().align_offset(4096);
    let page = &mut block[start..start + 4096];
    let mut at = 12345u64;
    for _ in 0..20_000 {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let offset = (at >> 20) % (BIG as u64 / 4096) * 4096;
        file.read_exact_at(page, offset).unwrap();
    }
}

fn create_many(dir: &Path) {
    let dir = dir.join("many");
    fs::create_dir(&dir).unwrap();
    for index in 0..FILES {
        fs::write(dir.join(index.to_string()), "content").unwrap();
    }
}

fn stat_many(dir: &Path) {
    for index in 0..FILES {
        fs::metadata(dir.join("many").join(index.to_string())).unwrap();
    }
}

fn open_new(dir: &Path) {
    for index in 0..FILES {
        File::open(dir.join("new").join(index.to_string())).unwrap();
    }
}

fn list_new(dir: &Path) {
    for entry in fs::read_dir(dir.join("new")).unwrap() {
        entry.unwrap().metadata().unwrap();
    }
}

fn remove_new(dir: &Path) {
    fs::remove_dir_all(dir.join("new")).unwrap();
}

/// Requests one at a time through the queue of the real program: start, memory
/// and the server's own processor time for each.
fn queue() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path();
    rustix::mount::mount("tmpfs", tree, "tmpfs", MountFlags::empty(), c"").unwrap();
    rustix::mount::mount_change(tree, MountPropagationFlags::SHARED).unwrap();
    fs::create_dir_all(tree.join("web/rootfs")).unwrap();
    rustix::mount::mount(
        "tmpfs",
        tree.join("web/rootfs"),
        "tmpfs",
        MountFlags::empty(),
        c"",
    )
    .unwrap();
    fs::write(tree.join("web/rootfs/file"), vec![1; 2 * MIB]).unwrap();

    let start = Instant::now();
    let mut guest = Guest::start(tree);
    println!(
        "\n{:<34}{:>12}",
        "start to a ready device",
        format!("{:.1} ms", start.elapsed().as_secs_f64() * 1e3)
    );
    guest.init();
    let mut node = 1;
    for name in ["web", "rootfs"] {
        let answer = guest
            .ask(Opcode::Lookup, node, &[name.as_bytes(), b"\0"])
            .unwrap();
        node = object::<EntryOut>(&answer).nodeid;
    }
    let answer = guest.ask(Opcode::Lookup, node, &[b"file\0"]).unwrap();
    let file = object::<EntryOut>(&answer).nodeid;
    let open = OpenIn::default();
    let answer = guest.ask(Opcode::Open, file, &[open.as_slice()]).unwrap();
    let fh = object::<OpenOut>(&answer).fh;
    let read = |size| ReadIn {
        fh,
        size,
        ..ReadIn::default()
    };
    let (small, large) = (read(4096), read(MIB as u32));
    let getattr = GetattrIn::default();
    let requests: [(&str, Opcode, u64, &[u8], u32); 4] = [
        ("LOOKUP", Opcode::Lookup, node, b"file\0", 200),
        ("GETATTR", Opcode::Getattr, file, getattr.as_slice(), 200),
        ("READ 4 KiB", Opcode::Read, file, small.as_slice(), 4096),
        (
            "READ 1 MiB",
            Opcode::Read,
            file,
            large.as_slice(),
            MIB as u32,
        ),
    ];
    let instructions = Instructions::of(guest.child.id());
    println!("for each request of the server:");
    for (name, opcode, node, body, room) in requests {
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode: opcode as u32,
            nodeid: node,
            ..InHeader::default()
        };
        let message = [header.as_slice(), body].concat();
        vm_memory::Bytes::write_slice(&guest.memory, &message, vm_memory::GuestAddress(SCRATCH))
            .unwrap();
        let chain = [
            Descriptor::readable(SCRATCH, message.len() as u32),
            Descriptor::writable(SCRATCH + 0x10_0000, 16),
            Descriptor::writable(SCRATCH + 0x10_0000 + 4096, room),
        ];
        const ROUNDS: u32 = 5000;
        guest.submit(1, &chain).unwrap();
        let before = processor_time(guest.child.id());
        let counted = instructions.as_ref().map(Instructions::read);
        for _ in 0..ROUNDS {
            guest.submit(1, &chain).unwrap();
        }
        let spent = processor_time(guest.child.id()) - before;
        let time = format!("{:.2} us", spent.as_secs_f64() * 1e6 / f64::from(ROUNDS));
        let count =
            counted
                .zip(instructions.as_ref())
                .map_or(String::new(), |(before, counter)| {
                    format!(
                        "{} instructions",
                        (counter.read() - before) / u64::from(ROUNDS)
                    )
                });
        println!("    {name:<30}{time:>12}{count:>22}");
    }
    let rollup = fs::read_to_string(format!("/proc/{}/smaps", guest.child.id())).unwrap();
    println!("memory: {}", private_memory(&rollup));
    assert!(guest.hang_up().success());
    rustix::mount::unmount(tree, rustix::mount::UnmountFlags::DETACH).unwrap();
}

/// Counts the instructions of a process, its kernel side included.
struct Instructions(File);

impl Instructions {
    /// Nothing where the machine cannot count.
    fn of(pid: u32) -> Option<Self> {
        // struct perf_event_attr of linux/perf_event.h: type hardware, size, and
        // as configuration the number of instructions.
        let mut attributes = [0u8; 128];
        attributes[4] = 128;
        attributes[8] = 1;
        let (any_processor, no_group, close_on_exec) = (-1, -1, 8);
        // SAFETY: the structure lives for the call and has the size it says.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                attributes.as_ptr(),
                pid,
                any_processor,
                no_group,
                close_on_exec,
            )
        };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: just opened, owned by nobody else.
        Some(Self(unsafe { File::from_raw_fd(fd) }))
    }

    fn read(&self) -> u64 {
        let mut count = [0; 8];
        (&self.0).read_exact(&mut count).unwrap();
        u64::from_ne_bytes(count)
    }
}

fn processor_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
}

/// PSS of all mappings but guest memory.
fn private_memory(smaps: &str) -> String {
    let mut is_guest = false;
    let mut kib = 0u64;
    for line in smaps.lines() {
        if line.contains("memfd:") {
            is_guest = true;
        } else if line
            .split(' ')
            .next()
            .is_some_and(|word| word.contains('-'))
        {
            is_guest = false;
        } else if let Some(value) = line.strip_prefix("Pss:")
            && !is_guest
        {
            kib += value.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    format!("{kib} KiB (PSS without guest memory)")
}
