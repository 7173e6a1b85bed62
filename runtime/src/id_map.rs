//! Maps of user and group ids, as a user namespace or a mount has them.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

use husk_protocol::agent::IdMapping;
use serde::Deserialize;

/// As many lines as the kernel takes (user_namespaces(7)).
const RANGES_MAX: usize = 340;

/// Whom files are shown to belong to whose owner is in no map.
const NOBODY: u32 = 65_534;

/// What ids of users and groups stand for.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct IdMaps {
    /// Of users.
    pub users: Vec<IdRange>,
    /// Of groups.
    pub groups: Vec<IdRange>,
}

/// Successive ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct IdRange {
    /// First one as the container has them, or a file that is shown mapped.
    #[serde(rename = "containerID")]
    pub inside: u32,
    /// First one as all others have them.
    #[serde(rename = "hostID")]
    pub outside: u32,
    /// How many.
    pub size: u32,
}

/// A user namespace that nobody is in.
#[derive(Debug)]
pub struct UserNamespace {
    maps: IdMaps,
    file: File,
}

/// A process in a new user namespace. Killed when dropped.
struct Holder(libc::pid_t);

impl IdMaps {
    /// Both maps, unless they are empty.
    pub fn new(users: &[IdRange], groups: &[IdRange]) -> Option<Self> {
        (!users.is_empty() || !groups.is_empty()).then(|| Self {
            users: users.to_vec(),
            groups: groups.to_vec(),
        })
    }

    /// Takes what snapshotters say of maps out of a mount's options:
    /// `uidmap=0:100000:65536`, and the same for groups.
    ///
    /// # Errors
    /// They are no maps, or there is only one.
    pub fn take_from(options: &mut Vec<String>) -> io::Result<Option<Self>> {
        let mut take = |name: &str| {
            let at = options.iter().position(|option| option.starts_with(name));
            at.map(|at| ranges(&options.remove(at)[name.len()..]))
                .transpose()
        };
        match (take("uidmap=")?, take("gidmap=")?) {
            (None, None) => Ok(None),
            (Some(users), Some(groups)) => Ok(Some(Self { users, groups })),
            _ => Err(invalid("one of uidmap= and gidmap= without the other")),
        }
    }

    /// For the agent.
    pub fn for_guest(&self) -> [Vec<IdMapping>; 2] {
        [&self.users, &self.groups].map(|ranges| {
            let message = |range: &IdRange| IdMapping {
                container_id: range.inside,
                host_id: range.outside,
                size: range.size,
                ..IdMapping::default()
            };
            ranges.iter().map(message).collect()
        })
    }

    /// The user and group that the container has as root.
    pub fn root(&self) -> Option<(u32, u32)> {
        let root = |ranges: &[IdRange]| {
            let has_it = |range: &&IdRange| range.inside == 0 && range.size > 0;
            ranges.iter().find(has_it).map(|range| range.outside)
        };
        Some((root(&self.users)?, root(&self.groups)?))
    }

    /// The owners that files have which are stored with these; those in no map
    /// are nobody's, as the kernel shows them.
    pub fn outside(&self, uid: u32, gid: u32) -> (u32, u32) {
        let find = |ranges: &[IdRange], id: u32| {
            let found = ranges.iter().find_map(|range| {
                let offset = id.checked_sub(range.inside)?;
                (offset < range.size).then(|| range.outside.checked_add(offset))?
            });
            found.unwrap_or(NOBODY)
        };
        (find(&self.users, uid), find(&self.groups, gid))
    }

    /// A namespace with these maps.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn namespace(&self) -> io::Result<UserNamespace> {
        let holder = Holder::new(std::process::id())?;
        for (name, ranges) in [("uid_map", &self.users), ("gid_map", &self.groups)] {
            let line =
                |range: &IdRange| format!("{} {} {}\n", range.inside, range.outside, range.size);
            let text: String = ranges.iter().take(RANGES_MAX).map(line).collect();
            let path = format!("/proc/{}/{name}", holder.0);
            // The kernel takes it in one piece.
            let mut file = OpenOptions::new().write(true).open(path)?;
            file.write_all(text.as_bytes())?;
        }
        Ok(UserNamespace {
            maps: self.clone(),
            file: File::open(format!("/proc/{}/ns/user", holder.0))?,
        })
    }
}

impl UserNamespace {
    /// Its maps.
    pub fn maps(&self) -> &IdMaps {
        &self.maps
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn ranges(text: &str) -> io::Result<Vec<IdRange>> {
    let range = |text: &str| {
        let mut numbers = text.split(':').map(str::parse);
        let mut next = || numbers.next()?.ok();
        let range = IdRange {
            inside: next()?,
            outside: next()?,
            size: next()?,
        };
        numbers.next().is_none().then_some(range)
    };
    let read: Option<Vec<_>> = text.split(',').map(range).collect();
    read.ok_or_else(|| invalid(&format!("{text:?} is no map of ids")))
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

impl Holder {
    /// A thread of ours could not enter one: it shares what belongs to a user. The
    /// process ends with `parent`, which is this one.
    fn new(parent: u32) -> io::Result<Self> {
        let parent = libc::c_long::from(parent);
        // Without a signal at its end: it is nobody's to wait for but ours. With
        // our table of descriptors, so that it keeps none of them open.
        let flags = libc::CLONE_NEWUSER | libc::CLONE_FILES;
        let none: libc::c_ulong = 0;
        // SAFETY: as fork(2) does: the child has a copy of all memory, and there
        // makes system calls of numbers alone until it is killed.
        unsafe {
            match libc::syscall(libc::SYS_clone, flags, none, none, none, none) {
                -1 => Err(io::Error::last_os_error()),
                0 => {
                    libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    // One that was killed before sends no signal, and what it had open
                    // would stay so.
                    while libc::syscall(libc::SYS_getppid) == parent {
                        // Signals for us are not for it.
                        let seconds = libc::timespec {
                            tv_sec: 60,
                            tv_nsec: 0,
                        };
                        libc::syscall(libc::SYS_nanosleep, &raw const seconds, none);
                    }
                    loop {
                        libc::syscall(libc::SYS_exit_group, none);
                    }
                }
                pid => libc::pid_t::try_from(pid)
                    .map(Self)
                    .map_err(io::Error::other),
            }
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: numbers; nobody else waits for this child, so the number is its.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::time::{Duration, Instant};

    #[test]
    fn reads_what_snapshotters_say() {
        let mut options = ["ro", "uidmap=0:100000:10,10:5:1", "gidmap=0:7:10"]
            .map(str::to_owned)
            .to_vec();
        let maps = IdMaps::take_from(&mut options).unwrap().unwrap();
        assert_eq!(options, ["ro"]);
        assert_eq!(maps.users.len(), 2);
        assert_eq!(maps.root(), Some((100_000, 7)));
        assert_eq!(IdMaps::take_from(&mut options).unwrap(), None);
        for wrong in [
            "uidmap=0:1:1",
            "uidmap=0:1",
            "gidmap=0:1:1:1",
            "uidmap=a:1:1",
        ] {
            let mut options = vec![wrong.to_owned()];
            assert!(IdMaps::take_from(&mut options).is_err(), "{wrong}");
        }
    }

    #[test]
    fn nobody_stays_whose_parent_was_killed_at_once() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: not root");
            return;
        }
        // As if this process had taken it over.
        let holder = Holder::new(std::process::id() + 1).unwrap();
        let stat = format!("/proc/{}/stat", holder.0);
        let began = Instant::now();
        while !std::fs::read_to_string(&stat).unwrap().contains(") Z ") {
            assert!(began.elapsed() < Duration::from_secs(10), "it sleeps");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(holder);
        assert!(!std::path::Path::new(&stat).exists());
    }

    #[test]
    fn makes_a_namespace_that_nobody_stays_in() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: not root");
            return;
        }
        let range = IdRange {
            inside: 0,
            outside: 100_000,
            size: 65_536,
        };
        let maps = IdMaps::new(&[range], &[range]).unwrap();
        let namespace = maps.namespace().unwrap();
        let own = std::fs::metadata("/proc/self/ns/user").unwrap().ino();
        assert_ne!(namespace.file.metadata().unwrap().ino(), own);
        let children = std::fs::read_to_string("/proc/thread-self/children");
        assert_eq!(children.unwrap_or_default(), "");
        // Twice the same user outside.
        let maps = IdMaps::new(
            &[
                range,
                IdRange {
                    inside: 1 << 17,
                    ..range
                },
            ],
            &[range],
        )
        .unwrap();
        assert!(maps.namespace().is_err());
    }
}
