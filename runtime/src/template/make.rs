//! Makes a template of the node's: boots a machine of no pod, waits for its agent, and
//! saves it. A process of its own, which the first shim that could have used a
//! template leaves behind.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use husk_node::rates::Rates;
use husk_node::verified::trusted;
use husk_vmm_spec::ExitReason;
use rustix::fs::{FlockOperation, flock};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::runtime::Runtime;
use tokio::time::{sleep, timeout};

use super::large_pages;
use super::{DISCARDED, DOUBTED, FAILED, Template, TemplateKey, key_of};
use crate::config::{Config, ConfigError};
use crate::debug_shell;
use crate::guest_image;
use crate::hook;
use crate::machine::{host_facts, open};
use crate::serve::hold_descriptor_3;
use crate::vm_plan::{self, PlanError, Room, Start, VmParts};
use crate::vm_process::{Vm, VmEnd, VmError, Vmm};

/// How long the pod that wanted it goes first.
const OTHERS_FIRST: Duration = Duration::from_secs(2);

/// A ttrpc request without a service (message type 1, stream 1, no data): the
/// agent answers it and changes nothing.
const REQUEST: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 1, 1, 0];

/// What a guest still does when its agent has answered for the first time.
const SETTLING: Duration = Duration::from_millis(500);

/// As much nicer than others (setpriority(2)).
const NICE: i32 = 10;

/// Ended first when the node runs out of memory (proc_pid_oom_score_adj(5)): nobody
/// waits for it.
const OOM_SCORE: &str = "1000";

/// More than a machine has in use that has just booted, however large it is, bytes.
const MOST_SAVED: u64 = 128 << 20;

/// What stays free where templates are beside that, bytes: others need that file
/// system as well.
const LEFT_FREE: u64 = 32 << 20;

/// What a failure is until it is known.
const UNDERWAY: &str = "one is being made, or whoever made one was killed\n";

/// A template that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// The node's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file or directory.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Its specification.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// It was saved, and does not go on from there.
    #[error("a copy of the machine")]
    Copy(#[source] Box<MakeError>),
    /// Something of the system's.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> MakeError {
    move |source| MakeError::Io { what, source }
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> MakeError {
    let path = path.to_owned();
    move |source| MakeError::File { path, source }
}

/// Starts this program to make the one whose machine begins with `memory_mib`, in the
/// cgroup whose `cgroup.procs` is `procs`, and waits for nothing.
pub fn start(memory_mib: u32, procs: Option<&Path>) {
    match spawn(memory_mib, procs) {
        Ok(pid) => tracing::info!(pid, memory_mib, "a template is made"),
        Err(error) => tracing::warn!(%error, "no template is made"),
    }
}

fn spawn(memory_mib: u32, procs: Option<&Path>) -> io::Result<u32> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["template", &memory_mib.to_string()])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // It outlives this pod: it must keep neither its cgroup nor its mounts.
    if let Some(procs) = procs {
        let mut procs = File::options().write(true).open(procs)?;
        // SAFETY: one system call on what was opened before.
        unsafe { command.pre_exec(move || procs.write_all(b"0")) };
    }
    hook::among_node_mounts(&mut command)?;
    Ok(command.spawn()?.id().unwrap_or_default())
}

/// Makes the templates of this node that are not there, or of them the one whose
/// machine begins with `memory_mib`, unless somebody else is making one.
///
/// # Errors
/// What failed first; it is also noted beside the templates.
pub fn run(memory_mib: Option<u32>) -> Result<(), MakeError> {
    let _ = rustix::process::setsid();
    std::env::set_current_dir("/").map_err(io_error("root directory"))?;
    let _ = rustix::process::nice(NICE);
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let config = Config::load()?;
    let keys = TemplateKey::all_of_node(&config, host_facts());
    if keys.is_empty() {
        return Ok(());
    }
    let all = &config.template_dir;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(all)
        .and_then(|()| trusted(&fs::metadata(all)?))
        .map_err(file_error(all))?;
    let lock = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(all.join("lock"))
        .map_err(file_error(&all.join("lock")))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(());
    }
    hold_descriptor_3().map_err(io_error("/dev/null"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io_error("runtime"))?;
    let mut outcome = Ok(());
    for key in &keys {
        let is_wanted = memory_mib.is_none_or(|mib| mib == key.memory_mib());
        // That it has failed lately is no reason: whoever starts this has looked, or is
        // an operator who has mended something.
        if !is_wanted || key.open().is_some() {
            continue;
        }
        let made = note_and_make(&runtime, &config, key);
        outcome = outcome.and(made);
    }
    remove_others(all, &keys);
    outcome
}

fn note_and_make(runtime: &Runtime, config: &Config, key: &TemplateKey) -> Result<(), MakeError> {
    let failed = key.dir.with_extension(FAILED);
    let noted = fs::write(&failed, UNDERWAY).map_err(file_error(&failed));
    let made = noted.and_then(|()| runtime.block_on(make(config, key)));
    let noted = match &made {
        Ok(()) => fs::remove_file(&failed),
        Err(error) => {
            let _ = fs::remove_dir_all(&key.dir);
            fs::write(&failed, format!("{}\n", crate::error::chain(error)))
        }
    };
    made.and_then(|()| noted.map_err(file_error(&failed)))
}

/// Removes from a directory that may be somebody else's too what was made from
/// something that is no more, and what has been left half done.
fn remove_others(dir: &Path, keys: &[TemplateKey]) {
    let is_rest = |name: &str| {
        key_of(name).is_some_and(|(key, extension)| {
            let is_known = keys.iter().any(|known| known.name() == key);
            !is_known || !["", FAILED, DISCARDED, DOUBTED].contains(&extension)
        })
    };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if !entry.file_name().to_str().is_some_and(is_rest) {
            continue;
        }
        let _ = match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
    }
}

async fn make(config: &Config, key: &TemplateKey) -> Result<(), MakeError> {
    sleep(OTHERS_FIRST).await;
    let new = key.dir.with_extension("new");
    // Of one that was interrupted.
    let _ = fs::remove_dir_all(&new);
    has_room(&config.template_dir).map_err(file_error(&config.template_dir))?;
    DirBuilder::new()
        .mode(0o700)
        .create(&new)
        .map_err(file_error(&new))?;
    let state = create(&new.join("state"), 0)?;
    let memory = create(&new.join("memory"), u64::from(key.size.memory_mib) << 20)?;

    let boot = Start::Boot {
        kernel: guest_image::open("guest kernel", &config.kernel, config).await?,
        initramfs: debug_shell::initramfs(config).await?,
        command_line: key.command_line.clone(),
    };
    let (vm, agent) = start_machine(config, key, boot).await?;
    sleep(SETTLING).await;
    let saved = vm.save(key.origin(), state, memory).await;
    // Nobody holds the files for writing when they get their name.
    vm.kill().await;
    drop(agent);
    saved?;
    let memory = File::open(new.join("memory")).map_err(file_error(&new))?;
    if let Err(error) = large_pages::collapse(&memory) {
        // Copies start all the same, a little later.
        eprintln!("containerd-shim-husk-v2: the template's memory in large pages: {error}");
    }
    // A machine that cannot go on here does so for no pod either.
    let copy = Start::Restore {
        template: Template {
            state: open("state", &new.join("state"), false)?,
            memory: open("memory", &new.join("memory"), false)?,
        },
        origin: key.origin().to_owned(),
    };
    let copied = start_machine(config, key, copy).await;
    let (copy, _agent) = copied.map_err(|error| MakeError::Copy(Box::new(error)))?;
    copy.kill().await;
    let _ = fs::remove_dir_all(&key.dir);
    fs::rename(&new, &key.dir).map_err(file_error(&key.dir))
}

/// What is saved fits, and something is left.
fn has_room(dir: &Path) -> io::Result<()> {
    let all = rustix::fs::statvfs(dir)?;
    let free = all.f_bavail.saturating_mul(all.f_frsize);
    let needed = MOST_SAVED + LEFT_FREE;
    match free >= needed {
        true => Ok(()),
        false => Err(io::Error::other(format!(
            "{} MiB are free, and {} may be needed",
            free >> 20,
            needed >> 20
        ))),
    }
}

fn create(path: &Path, bytes: u64) -> Result<OwnedFd, MakeError> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(file_error(path))?;
    file.set_len(bytes)
        .and_then(|()| file.set_permissions(Permissions::from_mode(0o400)))
        .map_err(file_error(path))?;
    Ok(file.into())
}

/// Starts the machine and waits until its agent waits. The guest ends when the
/// agent's connection does.
async fn start_machine(
    config: &Config,
    key: &TemplateKey,
    start: Start,
) -> Result<(Vm, tokio::net::UnixStream), MakeError> {
    let patience = Duration::from_secs(config.boot_timeout_seconds.into());
    let kvm = open("KVM", Path::new("/dev/kvm"), true)?;
    let vmm = Vmm::spawn(&config.vmm, config.first_uid, None).await?;
    let (near, far) = UnixStream::pair().map_err(io_error("agent's socket"))?;
    let parts = VmParts {
        kvm,
        start,
        console: vmm.console_input()?,
        agent: far.into(),
        nics: Vec::new(),
        file_server: None,
        disks: Vec::new(),
        rates: Rates::default(),
        vfio: false,
    };
    let room = Room {
        vcpus: key.vcpus_max,
        pluggable_mib: 0,
    };
    let (spec, descriptors) = vm_plan::plan(key.size, room, parts)?;
    let (vm, _) = vmm
        .start(
            &spec,
            descriptors,
            patience,
            config.patience(),
            Rates::default(),
        )
        .await?;
    let answered = tokio::select! {
        answered = timeout(patience, answer(near)) => answered,
        end = vm.ended() => return Err(VmError::Ended(end).into()),
    };
    match answered {
        Ok(Ok(agent)) => Ok((vm, agent)),
        Ok(Err(source)) => match vm.kill().await {
            // Nobody else had a part in it.
            VmEnd {
                reason: Some(ExitReason::Killed),
                ..
            } => Err(io_error("the agent's answer")(source)),
            end => Err(VmError::Ended(end).into()),
        },
        Err(_) => {
            let VmEnd { console, .. } = vm.kill().await;
            let seconds = patience.as_secs();
            Err(VmError::NotReady { seconds, console }.into())
        }
    }
}

async fn answer(stream: UnixStream) -> io::Result<tokio::net::UnixStream> {
    stream.set_nonblocking(true)?;
    let mut stream = tokio::net::UnixStream::from_std(stream)?;
    stream.write_all(&REQUEST).await?;
    stream.read_exact(&mut [0; 10]).await?;
    Ok(stream)
}
