//! The kernel's random numbers in a guest that was restored from a template: the
//! same as in every other one, until they begin anew.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::error::{Doing, OsError};

// linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// Most bytes that are taken in.
const BYTES_MAX: usize = 512;

/// `struct rand_pool_info`.
#[repr(C)]
struct Pool {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    data: [u8; BYTES_MAX],
}

/// Takes in what comes from the host, and has every generator of the kernel begin
/// anew: those of processors and of the vDSO see that their keys are old.
pub fn renew(entropy: &[u8]) -> Result<(), OsError> {
    let device = "/dev/urandom";
    let file = File::open(device).doing("open", device)?;
    for part in entropy.chunks(BYTES_MAX).take(1) {
        let mut pool = Pool {
            // BYTES_MAX fits.
            entropy_bits: part.len() as libc::c_int * 8,
            bytes: part.len() as libc::c_int,
            data: [0; BYTES_MAX],
        };
        for (to, from) in pool.data.iter_mut().zip(part) {
            *to = *from;
        }
        // SAFETY: the structure says how long it is, and lives until the call is
        // over.
        let added = unsafe { libc::ioctl(file.as_raw_fd(), RNDADDENTROPY, &raw const pool) };
        checked(added).doing("add entropy to", device)?;
    }
    // SAFETY: takes no argument.
    let reseeded = unsafe { libc::ioctl(file.as_raw_fd(), RNDRESEEDCRNG) };
    checked(reseeded).doing("reseed", device)
}

fn checked(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_in_what_the_host_gives() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        // The machine's own generator is none the worse for it.
        for length in [1, 64, BYTES_MAX, BYTES_MAX + 1] {
            renew(&vec![7; length]).unwrap();
        }
    }
}
