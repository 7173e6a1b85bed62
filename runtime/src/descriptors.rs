//! How many files the shim may have open.

use std::io;
use std::os::fd::RawFd;
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What the smallest pod needs, with some to spare. containerd's own limit, and so
/// ours, is a thousand at least.
const LEAST: u64 = 64;

/// A power of two, more than a pod of a few containers has.
const PROVIDED: RawFd = 256;

/// As the shim was given it, where it has another now.
static GIVEN: OnceLock<Rlimit> = OnceLock::new();

/// A shim could not have a pod.
#[derive(Debug, thiserror::Error)]
#[error("a shim needs {LEAST} open files, and its limit (RLIMIT_NOFILE) is {limit}")]
pub struct TooFewDescriptors {
    limit: u64,
}

/// Tells a limit that no pod fits in before anything else fails by it.
///
/// # Errors
/// It is too low.
pub fn check() -> Result<(), TooFewDescriptors> {
    match getrlimit(Resource::Nofile).maximum {
        Some(limit) if limit < LEAST => Err(TooFewDescriptors { limit }),
        _ => Ok(()),
    }
}

/// Takes as many as the shim may: each stream of each container is one or two, and
/// the lower limit is for programs that could not count further.
///
/// # Errors
/// The kernel refuses, as where the node's `fs.nr_open` is less than the limit by now.
/// The limit is what it was.
pub fn raise() -> io::Result<()> {
    let given = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: given.maximum,
        maximum: given.maximum,
    };
    change(given, most)
}

/// Has the kernel make room for the descriptors of a usual pod while this is the only
/// thread: a table that several share is made larger after what RCU calls a grace
/// period (`expand_fdtable` of Linux's fs/file.c), some 10 ms in which a pod waits to
/// start.
///
/// # Errors
/// The limit is lower, or the kernel refuses.
pub fn provide() -> io::Result<()> {
    let null = rustix::stdio::stdin();
    Ok(rustix::io::fcntl_dupfd_cloexec(null, PROVIDED - 1).map(drop)?)
}

fn change(given: Rlimit, to: Rlimit) -> io::Result<()> {
    setrlimit(Resource::Nofile, to)?;
    GIVEN.get_or_init(|| given);
    Ok(())
}

/// Gives a program of the node's the limit that the shim was given. Allocates
/// nothing: for a child before it executes that program.
///
/// # Errors
/// The kernel refuses.
pub fn give_back() -> io::Result<()> {
    let Some(given) = GIVEN.get() else {
        return Ok(());
    };
    // What was lowered meanwhile cannot be had again.
    let most = getrlimit(Resource::Nofile).maximum;
    let lowest = |limit: Option<u64>| match (limit, most) {
        (Some(limit), Some(most)) => Some(limit.min(most)),
        (limit, most) => limit.or(most),
    };
    let limit = Rlimit {
        current: lowest(given.current),
        maximum: lowest(given.maximum),
    };
    Ok(setrlimit(Resource::Nofile, limit)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_gets_what_the_shim_was_given() {
        let before = getrlimit(Resource::Nofile);
        let Some(current) = before.current.filter(|limit| Some(*limit) < before.maximum) else {
            println!("skipped: the limits are one");
            return;
        };
        // What was refused nobody has to give back.
        let impossible = Rlimit {
            current: Some(2),
            maximum: Some(1),
        };
        change(before, impossible).unwrap_err();
        assert!(GIVEN.get().is_none());
        give_back().unwrap();
        assert_eq!(getrlimit(Resource::Nofile), before);
        raise().unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current, before.maximum);
        give_back().unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current, Some(current));
        assert_eq!(getrlimit(Resource::Nofile), before);
    }
}
