//! `start`: answers the address of the shim that serves a bundle, and starts
//! that shim where there is none.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;

use crate::bundle::{Bundle, BundleError, Role};
use crate::config::{Config, ConfigError};
use crate::daemon::Daemon;
use crate::descriptors::{self, TooFewDescriptors};
use crate::flags::Flags;
use crate::id::Id;
use crate::joined::{self, POD_FILE};
use crate::network::NetnsId;
use crate::serve::TTRPC_ADDRESS;
use crate::socket::{DEFAULT_DIR, ShimSocket};

/// Most that containerd may send, bytes.
const INPUT: u64 = 10 << 20;

/// Log levels of the newer protocol: this and below is more than usual.
const DEBUG_LEVEL: i32 = -4;

/// File in the bundle with the shim's address, where containerd looks after a
/// restart.
pub const ADDRESS_FILE: &str = "address";

/// File in the bundle with the shim's process id.
pub const PID_FILE: &str = "shim.pid";

/// A shim that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The node's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No pod fits in the limit.
    #[error(transparent)]
    Descriptors(#[from] TooFewDescriptors),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A container of a pod that is not there.
    #[error("pod {0} has no shim: it has ended or was never started")]
    NoPod(String),
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

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Io { what, source }
}

/// What containerd wants, by whichever protocol.
#[derive(Debug, PartialEq, Eq)]
struct Wish {
    /// Where sockets go.
    socket_dir: PathBuf,
    /// Address for events.
    ttrpc_address: Option<String>,
    debug: bool,
    /// It speaks the protocol of containerd 2.3.
    modern: bool,
}

/// Runs in the bundle, prints the answer.
///
/// # Errors
/// There is no shim and none could be started; nothing stays.
pub fn start(flags: &Flags) -> Result<(), StartError> {
    descriptors::check()?;
    // Told here already, where the error reaches whoever asked.
    let config = Config::load()?;
    let mut input = Vec::new();
    io::stdin()
        .take(INPUT)
        .read_to_end(&mut input)
        .map_err(io_error("reading standard input"))?;
    let wish = Wish::read(&input, flags);
    let bundle = env::current_dir().map_err(io_error("working directory"))?;
    let role = match Bundle::load(&bundle) {
        Ok(loaded) => match (loaded.role()?, loaded.netns()) {
            (Role::Single, Some(netns)) => join(flags, &wish, &bundle, &config, netns)?,
            (role, _) => role,
        },
        // A pod of the Sandbox API comes without a spec.
        Err(BundleError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Role::Sandbox
        }
        Err(error) => return Err(error.into()),
    };
    let pod = match &role {
        Role::Member { sandbox } => sandbox.as_str(),
        Role::Single | Role::Sandbox => &flags.id,
    };
    let socket = ShimSocket::new(&wish.socket_dir, &flags.address, &flags.namespace, pod);
    match role {
        Role::Member { .. } if !socket.answers() => Err(StartError::NoPod(pod.to_owned())),
        Role::Member { .. } => {
            write(&bundle, ADDRESS_FILE, &socket.address())?;
            tell(&wish, &socket)
        }
        Role::Single | Role::Sandbox => start_shim(flags, &wish, &bundle, &socket),
    }
}

/// The role of a container that names a network namespace: another pod's makes
/// it a container of that.
fn join(
    flags: &Flags,
    wish: &Wish,
    bundle: &Path,
    config: &Config,
    netns: &Path,
) -> Result<Role, StartError> {
    let namespace = Id::new("namespace", &flags.namespace).map_err(BundleError::from)?;
    let found = joined::pod_with(&config.state_dir, &namespace, netns);
    let Some(pod) = found.filter(|pod| pod.as_str() != flags.id) else {
        // Its interfaces would be taken away from the node.
        return match NetnsId::of(netns) == NetnsId::of(Path::new("/proc/self/ns/net")) {
            true => Err(BundleError::HostNetwork.into()),
            false => Ok(Role::Single),
        };
    };
    let (dir, name) = (&wish.socket_dir, pod.as_str());
    if !ShimSocket::new(dir, &flags.address, &flags.namespace, name).answers() {
        return Ok(Role::Single);
    }
    write(bundle, POD_FILE, name)?;
    Ok(Role::Member { sandbox: pod })
}

fn start_shim(
    flags: &Flags,
    wish: &Wish,
    bundle: &Path,
    socket: &ShimSocket,
) -> Result<(), StartError> {
    let started = spawn(flags, wish, socket).and_then(|mut daemon| {
        // From the answer on, containerd takes it that the shim serves.
        daemon.await_ready().map_err(io_error("the shim"))?;
        write(bundle, ADDRESS_FILE, &socket.address())?;
        write(bundle, PID_FILE, &daemon.pid().to_string())?;
        tell(wish, socket)?;
        let released = daemon.release();
        released.map_err(io_error("the shim ended as soon as it was started"))
    });
    // A daemon takes its own with it, unless it was killed; one that answers is
    // another shim's.
    if started.is_err() && !socket.answers() {
        socket.remove();
    }
    started
}

fn spawn(flags: &Flags, wish: &Wish, socket: &ShimSocket) -> Result<Daemon, StartError> {
    let daemon = Daemon::spawn(|command| {
        command
            .arg("-socket")
            .arg(socket.path())
            .args(["-namespace", &flags.namespace])
            .args(["-id", &flags.id])
            .args(["-address", &flags.address])
            .args(["-publish-binary", &flags.publish_binary]);
        if wish.debug {
            command.arg("-debug");
        }
        if let Some(address) = &wish.ttrpc_address {
            command.env(TTRPC_ADDRESS, address);
        }
        command
    });
    let daemon = daemon.map_err(io_error("starting the shim"))?;
    raise_oom_score(daemon.pid());
    Ok(daemon)
}

fn tell(wish: &Wish, socket: &ShimSocket) -> Result<(), StartError> {
    let mut stdout = io::stdout();
    let told = stdout.write_all(&answer(wish, socket));
    told.and_then(|()| stdout.flush())
        .map_err(io_error("writing the answer"))
}

/// One above containerd's own, as containerd's shims have it.
fn raise_oom_score(pid: u32) {
    let read = |pid: &str| fs::read_to_string(format!("/proc/{pid}/oom_score_adj"));
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    let score = parent
        .and_then(|parent| read(&parent).ok())
        .and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(score) = score {
        // Not everywhere allowed, nowhere vital.
        let _ = fs::write(
            format!("/proc/{pid}/oom_score_adj"),
            (score + 1).min(1000).to_string(),
        );
    }
}

fn write(bundle: &Path, name: &'static str, text: &str) -> Result<(), StartError> {
    let new = bundle.join(format!(".{name}.new"));
    File::create(&new)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(&new, bundle.join(name)))
        .map_err(io_error(name))
}

/// containerd 2.3 gets a message. Everybody before, from 1.5 to 2.2, and CRI-O
/// take a bare address and then ask for the Task service by its older name.
fn answer(wish: &Wish, socket: &ShimSocket) -> Vec<u8> {
    let address = socket.address();
    if !wish.modern {
        return address.into_bytes();
    }
    let result = BootstrapResult {
        version: containerd_shim_protos::TASK_API_VERSION,
        address: address.clone(),
        protocol: "ttrpc".to_owned(),
        ..BootstrapResult::default()
    };
    result
        .write_to_bytes()
        .unwrap_or_else(|_| address.into_bytes())
}

impl Wish {
    /// The newer protocol's message parses from the older's options too; names
    /// that agree with the flags tell it apart.
    fn read(input: &[u8], flags: &Flags) -> Self {
        let modern = BootstrapParams::parse_from_bytes(input)
            .ok()
            .filter(|params| {
                !input.is_empty()
                    && params.instance_id == flags.id
                    && params.namespace == flags.namespace
            });
        let default_dir = PathBuf::from(DEFAULT_DIR);
        match modern {
            None => Self {
                socket_dir: default_dir,
                ttrpc_address: None,
                debug: flags.debug,
                modern: false,
            },
            Some(params) => Self {
                socket_dir: match params.socket_dir.as_deref() {
                    None | Some("") => default_dir,
                    Some(dir) => PathBuf::from(dir),
                },
                ttrpc_address: Some(params.containerd_ttrpc_address)
                    .filter(|address| !address.is_empty()),
                debug: flags.debug || params.log_level.value() <= DEBUG_LEVEL,
                modern: true,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::well_known_types::any::Any;

    fn flags() -> Flags {
        Flags {
            namespace: "default".into(),
            id: "t1".into(),
            ..Flags::default()
        }
    }

    #[test]
    fn tells_the_protocols_apart() {
        let params = BootstrapParams {
            instance_id: "t1".into(),
            namespace: "default".into(),
            containerd_ttrpc_address: "/run/c.ttrpc".into(),
            ..BootstrapParams::default()
        };
        let wish = Wish::read(&params.write_to_bytes().unwrap(), &flags());
        assert!(wish.modern);
        assert_eq!(wish.ttrpc_address.as_deref(), Some("/run/c.ttrpc"));

        let options = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: b"default".to_vec(),
            ..Any::default()
        };
        assert!(!Wish::read(&options.write_to_bytes().unwrap(), &flags()).modern);
        assert!(!Wish::read(&[], &flags()).modern);
        assert!(!Wish::read(b"\xff\xff", &flags()).modern);
    }

    #[test]
    fn answers_in_the_askers_protocol() {
        let socket = ShimSocket::new(Path::new("/s"), "/c", "default", "t1");
        let mut wish = Wish::read(&[], &flags());
        assert_eq!(answer(&wish, &socket), socket.address().into_bytes());
        wish.modern = true;
        let result = BootstrapResult::parse_from_bytes(&answer(&wish, &socket)).unwrap();
        assert_eq!(result.address, socket.address());
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    }
}
