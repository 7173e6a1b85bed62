//! What of a process's memory is a guest's, as the kernel counts it.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

/// Name of the file in memory that is the guest's memory; the VMM gives it.
const GUEST_MEMORY: &str = "/memfd:guest-memory";

/// The same of a QEMU that gets its memory so, which Husk is compared with.
const QEMU_MEMORY: &str = "/memfd:memory-backend";

/// Ends the name of the template's file that a copy has mapped.
const TEMPLATE_MEMORY: &str = "/memory";

/// What a copy of a template has where the template has zeroes is mapped without a
/// name, in pieces of at least so much. Nothing else of a VMM's or file server's is as
/// large without a name: a thread's stack is 2 MiB.
const LARGE_KIB: u64 = 4 << 10;

/// Memory of a process, KiB. Pages that several processes share count in parts
/// (proportional set size).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Its own.
    pub own_kib: u64,
    /// The guest's.
    pub guest_kib: u64,
}

/// Of a process that runs.
///
/// # Errors
/// It is gone, or not for this user to look at.
pub fn of_process(pid: u32) -> io::Result<Parts> {
    parts(BufReader::new(File::open(format!("/proc/{pid}/smaps"))?))
}

/// Of smaps (proc_pid_smaps(5)): a line a mapping, and its counters below.
fn parts(smaps: impl BufRead) -> io::Result<Parts> {
    let (mut found, mut in_guest) = (Parts::default(), false);
    for line in smaps.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if let Some(rest) = line.strip_prefix("Pss:") {
            let kib = rest.split_whitespace().next().unwrap_or_default();
            let kib: u64 = kib.parse().map_err(io::Error::other)?;
            *(if in_guest {
                &mut found.guest_kib
            } else {
                &mut found.own_kib
            }) += kib;
        } else if let Some(mapping) = Mapping::of(&line) {
            in_guest = mapping.is_of_guest();
        }
    }
    Ok(found)
}

struct Mapping<'a> {
    kib: u64,
    name: &'a str,
}

impl<'a> Mapping<'a> {
    /// None: the line is a counter.
    fn of(line: &'a str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (from, to) = words.next()?.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        let kib = address(to)?.saturating_sub(address(from)?) >> 10;
        // Permissions, offset, device and inode come between.
        let name = words.nth(4).unwrap_or_default();
        Some(Self { kib, name })
    }

    fn is_of_guest(&self) -> bool {
        [GUEST_MEMORY, QEMU_MEMORY]
            .iter()
            .any(|name| self.name.starts_with(name))
            || self.name.ends_with(TEMPLATE_MEMORY)
            || (self.name.is_empty() && self.kib >= LARGE_KIB)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOTED: &str = "\
7f0000000000-7f0010000000 rw-s 00000000 00:01 17  /memfd:guest-memory (deleted)
Size:             262144 kB
Pss:               50000 kB
Pss_Dirty:         50000 kB
VmFlags: rd wr sh mr mw me ms
7f0020000000-7f0020001000 r-xp 00000000 00:01 18  /usr/libexec/husk/husk-vmm
Pss:                 700 kB
7ffe00000000-7ffe00001000 rw-p 00000000 00:00 0   [stack]
Pss:                  12 kB
";

    const COPY: &str = "\
7f0000000000-7f0002000000 rw-p 00000000 00:1a 99  /husk-templates/0a/memory
Pss:                4000 kB
7f0002000000-7f0008000000 rw-p 00000000 00:00 0
Pss:                 500 kB
7f0010000000-7f0010200000 rw-p 00000000 00:00 0
Pss:                  30 kB
7f0020000000-7f0020001000 rw-p 00000000 00:00 0   [heap]
Pss:                   7 kB
";

    #[test]
    fn tells_the_guest_from_the_rest() {
        for (smaps, own_kib, guest_kib) in [(BOOTED, 712, 50_000), (COPY, 37, 4_500)] {
            let found = parts(smaps.as_bytes()).unwrap();
            assert_eq!(found, Parts { own_kib, guest_kib });
        }
    }

    #[test]
    fn numbers_that_are_none_are_errors() {
        parts(&b"7f00-7f10 rw-p 0 0 0\nPss: x kB\n"[..]).unwrap_err();
    }
}
