//! What the fuzz targets have in common.

pub mod driver;
pub mod file_server;
pub mod fuse;
pub mod memory;
pub mod vectors;

/// Ends the process well, saying why: what a target needs is not on this machine.
pub fn skip(why: impl std::fmt::Display) -> ! {
    println!("SKIPPED: {why}");
    std::process::exit(0)
}

/// As every program in Rust begins, while libFuzzer's main function is in C++: a
/// pipe or socket that nobody reads is an error and not the end.
pub fn start() {
    // SAFETY: changes how the process takes a signal that nobody handles.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
