//! What a process is and how it ends.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::path::Path;

/// Prints real and effective user, real and effective group.
pub fn ids() -> io::Result<()> {
    // SAFETY: they take nothing and cannot fail.
    let ids = unsafe {
        [
            libc::getuid(),
            libc::geteuid(),
            libc::getgid(),
            libc::getegid(),
        ]
    };
    println!("{}", ids.map(|id| id.to_string()).join(" "));
    Ok(())
}

/// Dies by SIGNAL, as a program does that has no handler for it.
pub fn die(signal: u64) -> io::Result<()> {
    let signal = i32::try_from(signal).map_err(io::Error::other)?;
    // SAFETY: plain calls on a set that lives on this stack.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        libc::sigprocmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
    if signal == libc::SIGSEGV {
        // What PID 1 is sent it ignores; a real fault it does not survive.
        // SAFETY: nothing is ever mapped there, so it only faults.
        unsafe { std::ptr::without_provenance_mut::<u8>(1).write_volatile(0) };
    }
    // SAFETY: a number.
    unsafe { libc::raise(signal) };
    Err(io::Error::other(format!("signal {signal} was survived")))
}

/// Answers each HTTP request with 200 if FILE exists and with 503 otherwise.
pub fn serve(address: &str, file: &str) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    println!("listening on {}", listener.local_addr()?);
    for connection in listener.incoming() {
        // A client that only connects is no reason to end.
        let _ = connection.and_then(|mut connection| {
            let _ = connection.read(&mut [0; 512])?;
            let status = match Path::new(file).exists() {
                true => "200 OK",
                false => "503 Service Unavailable",
            };
            write!(connection, "HTTP/1.0 {status}\r\nContent-Length: 0\r\n\r\n")
        });
    }
    Ok(())
}
