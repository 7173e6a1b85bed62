//! The shim of a pod: serves containerd until the pod is gone.

use std::env;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::stream;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::time::{sleep, timeout};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::blocking;
use crate::config::{Config, ConfigError};
use crate::daemon;
use crate::descriptors;
use crate::event::Publisher;
use crate::flags::Flags;
use crate::hook;
use crate::id::{Id, IdError};
use crate::log;
use crate::pod::{Pod, PodSettings};
use crate::sandbox_service::SandboxService;
use crate::socket::{DEFAULT_DIR, ShimSocket, SocketError};
use crate::task_service::TaskService;

/// Environment variable with the address for events.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// How long the last events may take.
const LAST_EVENTS: Duration = Duration::from_secs(10);

/// How long work on other threads may take that nobody waits for.
const LAST_WORK: Duration = Duration::from_secs(1);

/// Pause before a connection that could not be taken is tried again.
const AGAIN: Duration = Duration::from_millis(100);

/// How long the last answers may take.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// A shim that could not begin.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A name that cannot be.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The node's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The shim's socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The kernel refused.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The server.
    #[error("server")]
    Server(#[from] ttrpc::Error),
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::Io { what, source }
}

/// Serves on the socket that the flags name, with the bundle as working directory,
/// once the standard input says so. The socket is made here, so that it is there
/// only while somebody lives who removes it. Returns when the pod is gone.
///
/// # Errors
/// Something that every pod needs could not be had.
pub fn serve(flags: &Flags) -> Result<(), ServeError> {
    log::start(Path::new("."), flags);
    let served = try_serve(flags);
    if let Err(error) = &served {
        let why = crate::error::chain(error);
        tracing::error!("{why}");
        daemon::tell_failure(&why);
    }
    served
}

fn try_serve(flags: &Flags) -> Result<(), ServeError> {
    hold_descriptor_3().map_err(io_error("/dev/null"))?;
    if let Err(error) = descriptors::raise() {
        // A pod has fewer containers with it, perhaps.
        tracing::warn!(%error, "the limit of open files is not raised");
    }
    // A pod may still fit in what there is.
    let _ = descriptors::provide();
    // Not a leader yet unless started by hand, and then it may stay.
    let _ = rustix::process::setsid();
    own_mounts().map_err(io_error("making a mount namespace"))?;
    let settings = PodSettings {
        namespace: Id::new("namespace", &flags.namespace)?,
        id: Id::new("pod id", &flags.id)?,
        config: Arc::new(Config::load()?),
        debug: flags.debug,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(io_error("runtime"))?;
    let socket = socket_of(flags);
    let listener = socket.listen()?;
    // Whoever was started by hand need not have somebody who hears it.
    let _ = daemon::tell_ready();
    if !matches!(daemon::is_released(), Ok(true)) {
        tracing::info!("whoever started the shim is gone and has told nobody of it");
        // Nobody else can have taken its place while this one listens.
        socket.remove();
        return Ok(());
    }
    let served = runtime.block_on(run(&socket, listener, settings));
    if served.is_err() {
        socket.remove();
    }
    // Some file system may never answer who unmounts it.
    blocking::finish(LAST_WORK);
    runtime.shutdown_background();
    served
}

async fn run(
    socket: &ShimSocket,
    listener: UnixListener,
    settings: PodSettings,
) -> Result<(), ServeError> {
    let address = env::var(TTRPC_ADDRESS).unwrap_or_default();
    let (events, publisher) = Publisher::start(&address, settings.namespace.as_str());
    tracing::info!(pid = std::process::id(), "shim serves");
    let (pod, over) = Pod::start(settings, events);
    let listener = listen(listener).map_err(io_error("socket"))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(TaskService::new(pod.clone()).services())
        .register_service(SandboxService::new(pod).services());
    server.start().await?;
    over.await;

    // Events are promised even to a containerd that is away; answers are not.
    publisher.finish(LAST_EVENTS).await;
    // While it listens still, so that it cannot be a newer shim's.
    socket.remove();
    if timeout(LAST_ANSWERS, server.shutdown()).await.is_err() {
        tracing::debug!("somebody still waits for an answer");
    }
    // The connections' writers end in their own time.
    sleep(Duration::from_millis(10)).await;
    Ok(())
}

/// Where `start` wants the shim, or who starts it by hand would look for it.
fn socket_of(flags: &Flags) -> ShimSocket {
    match &flags.socket {
        Some(path) => ShimSocket::at(path.clone()),
        None => {
            let dir = Path::new(DEFAULT_DIR);
            ShimSocket::new(dir, &flags.address, &flags.namespace, &flags.id)
        }
    }
}

/// Connections as they come. Where one cannot be had, for want of a descriptor
/// mostly, it stays where it is until it can.
fn listen(listener: UnixListener) -> io::Result<Listener> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    Ok(Listener::new(stream::unfold(listener, async |listener| {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => return Some((Ok(connection), listener)),
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be taken");
                    sleep(AGAIN).await;
                }
            }
        }
    })))
}

/// Puts something on descriptor 3, where it is free, for good: programs get
/// their socket there, and what `Command` opens for itself while it spawns must
/// not come to lie there.
///
/// # Errors
/// No descriptor is free.
pub fn hold_descriptor_3() -> io::Result<()> {
    loop {
        let file = File::open("/dev/null")?;
        if file.as_raw_fd() > 3 {
            return Ok(());
        }
        let _: i32 = file.into_raw_fd();
    }
}

/// Whatever this process mounts goes with it; what the node mounts still
/// arrives.
fn own_mounts() -> io::Result<()> {
    hook::keep_node_mounts()?;
    // SAFETY: no shared descriptor table is given up.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS)? };
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", flags)?;
    Ok(())
}
