//! `husk-probe`: what the test image runs where busybox has no tool for it.
//! Standard library only, so that the image stays small.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;

#[path = "probe/files.rs"]
mod files;
#[path = "probe/identity.rs"]
mod identity;
#[path = "probe/life.rs"]
mod life;
#[path = "probe/ring.rs"]
mod ring;

const USAGE: &str = "usage: probe pause | echo ADDR | fetch ADDR TEXT | eat MIB | huge MIB | pattern BYTES | check BYTES | count DIR | files DIR | many DIR COUNT | hold FILE | try-lock FILE | map FILE | watch DIR | poke FILE TEXT | listen PATH | ask PATH TEXT | identity | ids | die SIGNAL | serve ADDR FILE";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        [] if std::process::id() == 1 => guest_init(),
        ["pause"] => pause(),
        ["echo", address] => echo(address),
        ["fetch", address, text] => fetch(address, text),
        ["eat", mib] => number(mib).and_then(eat),
        ["huge", mib] => number(mib).and_then(huge),
        ["pattern", bytes] => number(bytes).and_then(pattern),
        ["check", bytes] => number(bytes).and_then(check),
        ["count", dir] => count(dir),
        ["files", dir] => files::files(dir),
        ["many", dir, count] => number(count).and_then(|count| files::many(dir, count)),
        ["hold", file] => files::hold(file),
        ["try-lock", file] => files::try_lock(file),
        ["map", file] => files::map(file),
        ["watch", dir] => files::watch(dir),
        ["poke", file, text] => files::poke(file, text),
        ["listen", path] => files::listen(path),
        ["ask", path, text] => files::ask(path, text),
        ["identity"] => identity::identity(),
        ["ids"] => life::ids(),
        ["die", signal] => number(signal).and_then(life::die),
        ["serve", address, file] => life::serve(address, file),
        _ => Err(io::Error::other(USAGE)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("probe: {error}");
            ExitCode::FAILURE
        }
    }
}

fn number(text: &str) -> io::Result<u64> {
    text.parse().map_err(io::Error::other)
}

/// Prints how many entries a directory has.
fn count(dir: &str) -> io::Result<()> {
    println!("{}", std::fs::read_dir(dir)?.count());
    Ok(())
}

/// As PID 1 of a guest: says that it is there, and ends the machine.
fn guest_init() -> io::Result<()> {
    println!("guest up");
    io::stdout().flush()?;
    // SAFETY: it only ends this machine.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    Err(io::Error::last_os_error())
}

/// Holds the namespaces of a pod, as Kubernetes' pause does, until SIGTERM.
fn pause() -> io::Result<()> {
    // SAFETY: the set lives on this stack; the calls only read and write it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        loop {
            let mut signal = 0;
            libc::sigwait(&set, &mut signal);
            if signal != libc::SIGCHLD {
                return Ok(());
            }
            while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {}
        }
    }
}

/// Sends back what each connection sends, until it half-closes.
fn echo(address: &str) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    println!("listening on {}", listener.local_addr()?);
    for connection in listener.incoming() {
        let mut connection = connection?;
        thread::spawn(move || -> io::Result<()> {
            let mut reader = connection.try_clone()?;
            io::copy(&mut reader, &mut connection)?;
            connection.shutdown(std::net::Shutdown::Write)
        });
    }
    Ok(())
}

/// Sends TEXT, half-closes and prints the reply.
fn fetch(address: &str, text: &str) -> io::Result<()> {
    let mut connection = TcpStream::connect(address)?;
    connection.write_all(text.as_bytes())?;
    connection.shutdown(std::net::Shutdown::Write)?;
    let mut reply = String::new();
    connection.read_to_string(&mut reply)?;
    println!("{reply}");
    Ok(())
}

/// Touches MIB of memory, says so, and holds it until killed.
fn eat(mib: u64) -> io::Result<()> {
    let mut held = Vec::new();
    for index in 0..mib {
        // A byte that differs from page to page defeats any merging.
        held.push(vec![index as u8 | 1; 1 << 20]);
    }
    println!("holding {} MiB", held.len());
    loop {
        thread::park();
    }
}

/// Touches MIB of memory in huge pages of 2 MiB.
fn huge(mib: u64) -> io::Result<()> {
    const PAGE: usize = 2 << 20;
    const MAP_HUGE_2MB: i32 = 21 << libc::MAP_HUGE_SHIFT;
    let length = usize::try_from(mib << 20).map_err(io::Error::other)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | MAP_HUGE_2MB;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, of which nobody else knows.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, -1, 0) };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    for offset in (0..length).step_by(PAGE) {
        // SAFETY: within the mapping, which is never unmapped.
        unsafe { memory.cast::<u8>().add(offset).write_volatile(1) };
    }
    println!("{mib} MiB of huge pages");
    Ok(())
}

/// A xorshift sequence: cheap, and any loss or reordering shows.
struct Pattern(u64);

impl Pattern {
    fn fill(&mut self, block: &mut [u8]) {
        for word in block.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes()[..word.len()]);
        }
    }
}

const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
const BLOCK: usize = 1 << 16;

/// Writes BYTES of the sequence.
fn pattern(bytes: u64) -> io::Result<()> {
    let (mut pattern, mut left) = (Pattern(SEED), bytes);
    let mut block = vec![0; BLOCK];
    let mut output = io::stdout().lock();
    while left > 0 {
        let length = left.min(BLOCK as u64) as usize;
        pattern.fill(&mut block[..length]);
        output.write_all(&block[..length])?;
        left -= length as u64;
    }
    output.flush()
}

/// Reads the sequence until end of file and fails at the first difference.
fn check(bytes: u64) -> io::Result<()> {
    let (mut pattern, mut seen) = (Pattern(SEED), 0_u64);
    let (mut expected, mut block) = (vec![0; BLOCK], Vec::with_capacity(BLOCK));
    let mut input = io::stdin().lock();
    loop {
        block.clear();
        let length = (&mut input).take(BLOCK as u64).read_to_end(&mut block)?;
        if length == 0 {
            break;
        }
        pattern.fill(&mut expected[..length]);
        if block != expected[..length] {
            return Err(io::Error::other(format!(
                "differs within 64 KiB of byte {seen}"
            )));
        }
        seen += length as u64;
    }
    if seen != bytes {
        return Err(io::Error::other(format!("{seen} bytes, expected {bytes}")));
    }
    println!("{seen} bytes as expected");
    Ok(())
}
