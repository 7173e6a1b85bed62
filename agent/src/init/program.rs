//! The last steps of any process: what the OCI process object says of it.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit};

use super::InitError;
use super::capabilities::Capabilities;
use super::executable::{self, ExecutableError, FileId};
use super::hook::Hooks;
use super::seccomp::Filter;
use super::terminal::Terminal;
use crate::error::{Doing, OsError};
use crate::kernel_file;
use crate::oci::{Personality, PersonalityDomain, Process, Scheduler};

/// A program that only needs to be executed.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    capabilities: Capabilities,
    filter: Option<Filter>,
    no_new_privileges: bool,
}

/// Sets how eagerly the kernel kills it for memory. Before a user namespace:
/// lowering it needs rights over the guest.
pub fn set_oom_score(process: &Process) -> Result<(), OsError> {
    match process.oom_score_adj {
        Some(score) => kernel_file::write("/proc/self/oom_score_adj", score.to_string())
            .doing("set", "oom_score_adj"),
        None => Ok(()),
    }
}

/// Sets the execution domain.
pub fn set_personality(personality: Option<Personality>) -> Result<(), OsError> {
    let Some(personality) = personality else {
        return Ok(());
    };
    let domain = match personality.domain {
        PersonalityDomain::Linux => 0,
        PersonalityDomain::Linux32 => 8,
    };
    // SAFETY: a number.
    let result = unsafe { libc::personality(domain) };
    checked(result.into()).doing("set", "the personality")
}

/// Sets the resource limits.
pub fn set_resource_limits(process: &Process) -> Result<(), InitError> {
    for limit in &process.rlimits {
        let resource = resource(&limit.kind).ok_or_else(|| InitError::Invalid {
            field: "process.rlimits",
            reason: format!("{:?} is unknown", limit.kind),
        })?;
        let infinite = |value: u64| (value != u64::MAX).then_some(value);
        let values = Rlimit {
            current: infinite(limit.soft),
            maximum: infinite(limit.hard),
        };
        rustix::process::setrlimit(resource, values).doing("set", &limit.kind)?;
    }
    Ok(())
}

/// Does everything up to, not including, the execution.
pub fn prepare(
    process: &Process,
    filter: Option<Filter>,
    terminal: Option<&Terminal>,
    own: FileId,
) -> Result<Program, InitError> {
    rustix::process::setsid().doing("make", "a session")?;
    join_keyring();
    if let Some(terminal) = terminal {
        take_terminal(process, terminal)?;
    }
    if let Some(umask) = process.user.umask {
        rustix::process::umask(Mode::from_raw_mode(umask));
    }
    set_resource_limits(process)?;
    set_priorities(process)?;
    enter_working_directory(process)?;

    let environment = environment(process);
    let arguments = process.args.iter();
    let arguments: Vec<CString> = arguments
        .map(|word| c_string("process.args", word))
        .collect::<Result<_, _>>()?;
    let name = process.args.first().ok_or(ExecutableError::NoArguments)?;
    let no_new_privileges = process.no_new_privileges;
    if no_new_privileges {
        rustix::thread::set_no_new_privs(true).doing("set", "no_new_privs")?;
    }
    let capabilities = Capabilities::from_spec(process.capabilities.as_ref())?;
    capabilities.limit_bounding()?;
    become_user(process)?;
    let search = environment
        .iter()
        .find_map(|line| line.strip_prefix("PATH="));
    let path = executable::find(name, search, own)?;
    capabilities.prepare()?;
    Ok(Program {
        path,
        arguments,
        environment: environment
            .iter()
            .map(|line| c_string("process.env", line))
            .collect::<Result<_, _>>()?,
        capabilities,
        filter,
        no_new_privileges,
    })
}

impl Program {
    /// Becomes the program, after the hooks. With no_new_privs there is no system
    /// call of ours between the filter and the execution; without, capset(2) is
    /// one, and with hooks there is what starts them: the filter has to allow it,
    /// as with other runtimes.
    pub fn execute(self, hooks: Hooks, own: FileId) -> Result<Infallible, InitError> {
        let path = c_string("process.args", &self.path.to_string_lossy())?;
        reset_signals();
        hide_descriptors().doing("close", "inherited descriptors")?;
        let load = || match &self.filter {
            Some(filter) => filter.load().doing("load", "the seccomp filter"),
            None => Ok(()),
        };
        if self.no_new_privileges {
            self.capabilities.finish()?;
            load()?;
        } else {
            // Without no_new_privs only CAP_SYS_ADMIN may load a filter.
            load()?;
            self.capabilities.finish()?;
        }
        hooks.run(own)?;
        let Err(errno) = nix::unistd::execve(&path, &self.arguments, &self.environment);
        Err(ExecutableError::refused(&self.path, &errno.into()).into())
    }
}

/// A session keyring of its own. Without one the kernel takes the user's, which
/// all containers of the same user would share.
fn join_keyring() {
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    // A kernel without keys has none to share.
    // SAFETY: a number, and no name.
    let _ = unsafe {
        let no_name = std::ptr::null::<libc::c_char>();
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, no_name)
    };
}

fn c_string(field: &'static str, text: &str) -> Result<CString, InitError> {
    CString::new(text).map_err(|_| InitError::Invalid {
        field,
        reason: "contains a NUL byte".to_owned(),
    })
}

fn take_terminal(process: &Process, terminal: &Terminal) -> Result<(), OsError> {
    if let Some(size) = process.console_size {
        let cells = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
        let size = rustix::termios::Winsize {
            ws_row: cells(size.height),
            ws_col: cells(size.width),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&terminal.slave, size).doing("size", "the terminal")?;
    }
    // Its owner may open it by name; its group is the terminals'.
    let owner = rustix::fs::Uid::from_raw(process.user.uid);
    rustix::fs::fchown(&terminal.slave, Some(owner), None).doing("hand over", "the terminal")?;
    nix::unistd::dup2_stdin(&terminal.slave)
        .and_then(|()| nix::unistd::dup2_stdout(&terminal.slave))
        .and_then(|()| nix::unistd::dup2_stderr(&terminal.slave))
        .doing("use", "the terminal")?;
    rustix::process::ioctl_tiocsctty(&terminal.slave).doing("control", "the terminal")
}

fn set_priorities(process: &Process) -> Result<(), InitError> {
    if let Some(priority) = &process.io_priority {
        let class = match priority.class.as_str() {
            "IOPRIO_CLASS_RT" => 1,
            "IOPRIO_CLASS_BE" => 2,
            "IOPRIO_CLASS_IDLE" => 3,
            other => {
                return Err(InitError::Invalid {
                    field: "process.ioPriority",
                    reason: format!("{other:?} is unknown"),
                });
            }
        };
        let value = class << 13 | (priority.priority & 7);
        // IOPRIO_WHO_PROCESS, ourselves.
        // SAFETY: three numbers.
        let result = unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, value) };
        checked(result).doing("set", "the I/O priority")?;
    }
    if let Some(scheduler) = &process.scheduler {
        set_scheduler(scheduler)?;
    }
    Ok(())
}

/// `struct sched_attr` of linux/sched/types.h, first version.
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn set_scheduler(scheduler: &Scheduler) -> Result<(), InitError> {
    const POLICIES: [&str; 7] = [
        "SCHED_OTHER",
        "SCHED_FIFO",
        "SCHED_RR",
        "SCHED_BATCH",
        "SCHED_ISO",
        "SCHED_IDLE",
        "SCHED_DEADLINE",
    ];
    const FLAGS: [&str; 7] = [
        "SCHED_FLAG_RESET_ON_FORK",
        "SCHED_FLAG_RECLAIM",
        "SCHED_FLAG_DL_OVERRUN",
        "SCHED_FLAG_KEEP_POLICY",
        "SCHED_FLAG_KEEP_PARAMS",
        "SCHED_FLAG_UTIL_CLAMP_MIN",
        "SCHED_FLAG_UTIL_CLAMP_MAX",
    ];
    // The kernel numbers both as they stand here.
    let number = |names: &[&str], name: &str| {
        let found = names.iter().position(|other| *other == name);
        found.ok_or_else(|| InitError::Invalid {
            field: "process.scheduler",
            reason: format!("{name:?} is unknown"),
        })
    };
    let mut flags = 0;
    for flag in &scheduler.flags {
        flags |= 1 << number(&FLAGS, flag)?;
    }
    let attributes = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: number(&POLICIES, &scheduler.policy)? as u32,
        flags,
        nice: scheduler.nice,
        priority: scheduler.priority.cast_unsigned(),
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
    };
    // SAFETY: the struct tells its own size and lives until the call ends.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    Ok(checked(result).doing("set", "the scheduler")?)
}

/// Makes the directory when the image lacks it, and makes sure that it is in
/// the container: a path by way of one of our descriptors isn't.
fn enter_working_directory(process: &Process) -> Result<(), InitError> {
    let path = &process.cwd;
    if !path.is_absolute() {
        return Err(InitError::Invalid {
            field: "process.cwd",
            reason: format!("{} is not an absolute path", path.display()),
        });
    }
    if !path.exists() {
        fs::create_dir_all(path).doing("make", path.display())?;
    }
    std::env::set_current_dir(path).doing("change to", path.display())?;
    let inside = std::env::current_dir().is_ok_and(|path| path.is_absolute());
    if !inside {
        return Err(InitError::Invalid {
            field: "process.cwd",
            reason: format!("{} is outside of the container", path.display()),
        });
    }
    Ok(())
}

/// The last value of a name counts; `HOME` is the user's when not given.
fn environment(process: &Process) -> Vec<String> {
    let mut environment: Vec<String> = Vec::new();
    for line in &process.env {
        let name = line.split_once('=').map_or(line.as_str(), |(name, _)| name);
        let same = |other: &String| {
            other
                .split_once('=')
                .is_some_and(|(other, _)| other == name)
        };
        match environment.iter_mut().find(|other| same(other)) {
            Some(slot) => slot.clone_from(line),
            None => environment.push(line.clone()),
        }
    }
    if !environment.iter().any(|line| line.starts_with("HOME=/")) {
        environment.retain(|line| !line.starts_with("HOME="));
        environment.push(format!("HOME={}", home_of(process.user.uid)));
    }
    environment
}

fn home_of(uid: u32) -> String {
    let text = passwd().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let home = text.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let found = fields.next()?.parse() == Ok(uid);
        found.then(|| fields.nth(2).unwrap_or_default())
    });
    home.filter(|home| home.starts_with('/'))
        .unwrap_or("/")
        .to_owned()
}

/// An image's file: it may be anything, so we wait for no other end of a pipe
/// and read no more than a real one has.
fn passwd() -> io::Result<Vec<u8>> {
    const BYTES: u64 = 1 << 20;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open("/etc/passwd", flags, Mode::empty())?;
    let file = fs::File::from(file);
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut text = Vec::new();
    file.take(BYTES).read_to_end(&mut text)?;
    Ok(text)
}

fn become_user(process: &Process) -> Result<(), InitError> {
    let user = &process.user;
    let more = user.additional_gids.iter();
    let groups: Vec<Gid> = more.map(|gid| Gid::from_raw(*gid)).collect();
    setgroups(&groups).doing("set", "groups")?;
    rustix::thread::set_keep_capabilities(true).doing("keep", "capabilities")?;
    let gid = Gid::from_raw(user.gid);
    setresgid(gid, gid, gid).doing("change to group", gid)?;
    let uid = Uid::from_raw(user.uid);
    setresuid(uid, uid, uid).doing("change to user", uid)?;
    rustix::thread::set_keep_capabilities(false).doing("no longer keep", "capabilities")?;
    Ok(())
}

/// As a program expects them.
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is no code of ours. SIGKILL and SIGSTOP answer EINVAL, as they may.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an empty set made by the library.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Everything but the standard streams closes at the execution.
fn hide_descriptors() -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    // SAFETY: numbers; descriptors stay valid until the execution.
    checked(unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, CLOSE_RANGE_CLOEXEC) })
}

fn checked(result: libc::c_long) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_STACK" => Resource::Stack,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        _ => return None,
    })
}
