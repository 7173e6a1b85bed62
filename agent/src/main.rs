//! PID 1 of a Husk guest: the whole of its user space. It dials the shim once,
//! serves its requests over that connection, and powers the guest off when the
//! connection ends; only a guest that is restored before its first request dials
//! again.
//!
//! The same program is the helper that becomes a container's process
//! (`husk-agent init FD`) and the holder of a shared PID namespace
//! (`husk-agent hold FD`), makes a pod's namespaces (`husk-agent namespaces FD`),
//! and becomes the program of a debug shell (`husk-agent shell …`). Tests run it
//! outside of a guest with `--connect`.

mod clock;
mod connection;
mod container;
mod device;
mod early_init;
mod entropy;
mod error;
mod events;
mod forward;
mod hold;
mod init;
mod kernel_file;
mod kmsg;
mod lock;
mod memory;
mod mirror;
mod names;
mod netlink;
mod oci;
mod pci;
mod pidfd;
mod pod_namespaces;
mod power;
mod reaper;
mod sandbox;
mod service;
mod settings;
mod shell;
mod socket;
mod stdio;
mod storage;
mod watch;

use std::os::fd::RawFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use husk_protocol::agent::{create_agent, create_shell};
use husk_protocol::port;
use tokio::sync::Notify;

use crate::connection::Ending;
use crate::error::{Doing, Error, chain};
use crate::reaper::Reaper;
use crate::sandbox::Sandbox;
use crate::service::Service;
use crate::settings::Settings;
use crate::shell::{ShellService, Shells};
use crate::socket::Dialler;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // The kernel hands words of its command line that it doesn't know to PID 1.
    // A container's first process that executes this file, as it can, is PID 1
    // as well, but finds a /proc.
    let is_first = std::process::id() == 1 && !Path::new("/proc/self").exists();
    match arguments.as_slice() {
        [role, fd] if role == "init" && !is_first => match fd.parse() {
            Ok(fd) => init::main(fd),
            Err(_) => ExitCode::FAILURE,
        },
        [role, fd] if role == "hold" && !is_first => match fd.parse() {
            Ok(fd) => hold::main(fd),
            Err(_) => ExitCode::FAILURE,
        },
        [role, fd] if role == "namespaces" && !is_first => match fd.parse() {
            Ok(fd) => pod_namespaces::main(fd),
            Err(_) => ExitCode::FAILURE,
        },
        [role, rest @ ..] if role == "shell" && !is_first => shell::main(rest),
        [option, ..] if option == "--connect" => match Settings::from_arguments(&arguments) {
            Ok(settings) => run(settings),
            Err(usage) => {
                eprintln!("husk-agent: {usage}");
                ExitCode::FAILURE
            }
        },
        _ if is_first => run(Settings::from_kernel_command_line("")),
        _ => {
            eprintln!("husk-agent runs as the first process of a guest");
            ExitCode::FAILURE
        }
    }
}

fn run(mut settings: Settings) -> ExitCode {
    let started_ns = clock::since_boot_ns();
    let prepared = if settings.guest {
        let prepared = early_init::guest(&settings);
        // Readable only now.
        let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
        settings = Settings::from_kernel_command_line(&line);
        prepared
    } else {
        early_init::hosted(&settings)
    };
    // Without /dev there is no log.
    let speechless = prepared.is_err() || !settings.guest;
    kmsg::init(&settings);
    provide_descriptors();
    let served = prepared.map_err(Error::from).and_then(|()| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = runtime.doing("start", "the runtime")?;
        let served = runtime.block_on(serve(settings.clone(), started_ns));
        // Not by dropping it, which waits for calls that hang.
        runtime.shutdown_background();
        served
    });
    if let Err(error) = served {
        log::error!("{}", chain(&error));
        if speechless {
            eprintln!("husk-agent: {}", chain(&error));
        }
        if !settings.guest {
            return ExitCode::FAILURE;
        }
    }
    power::off(&settings)
}

/// Has the kernel make room for the descriptors of a usual pod while this is the only
/// thread: a table that several share is made larger after what RCU calls a grace
/// period (`expand_fdtable` of Linux's fs/file.c), in which a container waits to start.
fn provide_descriptors() {
    // A power of two. Without it all goes on, later.
    const PROVIDED: RawFd = 256;
    let _ = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), PROVIDED - 1);
}

/// Until the shim is gone, or asks for the end.
async fn serve(settings: Settings, started_ns: u64) -> Result<(), Error> {
    let reaper = Reaper::start().doing("collect", "children")?;
    let dialler = settings.dialler.clone();
    let are_shells_allowed = settings.debug_shell;
    let sandbox = Arc::new(Sandbox::new(settings, reaper));
    let shells = are_shells_allowed.then(|| Arc::new(Shells::new(Arc::clone(&sandbox))));
    // Where the guest was saved while it waited for its first request, each copy
    // finds its connection broken, and a shim of its own.
    while serve_one(&dialler, &sandbox, shells.as_ref(), started_ns).await? == Some(Ending::Broken)
        && sandbox.is_untouched()
    {
        log::info!("the connection is broken: dials again");
    }
    if let Some(shells) = shells {
        // They may have files open that are to be unmounted.
        shells.end_all().await;
    }
    sandbox.end().await;
    Ok(())
}

/// From a connection's beginning to its end; none when the shim has asked for the
/// end of the guest.
async fn serve_one(
    dialler: &Dialler,
    sandbox: &Arc<Sandbox>,
    shells: Option<&Arc<Shells>>,
    started_ns: u64,
) -> Result<Option<Ending>, Error> {
    let socket = dialler.dial(port::AGENT).await;
    let socket = socket.doing("dial host port", port::AGENT)?;
    let breaks = socket
        .break_watch()
        .doing("watch", "the shim's connection")?;
    let shutdown = Arc::new(Notify::new());
    let service = Service {
        sandbox: Arc::clone(sandbox),
        started_ns,
        shutdown: Arc::clone(&shutdown),
    };
    let (listener, end) = connection::listener(socket);
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(listener)
        .register_service(create_agent(Arc::new(service)));
    if let Some(shells) = shells {
        server = server.register_service(create_shell(Arc::new(ShellService(Arc::clone(shells)))));
    }
    server
        .start()
        .await
        .map_err(std::io::Error::other)
        .doing("serve", "the shim")?;
    log::info!("ready");
    tokio::select! {
        ending = end.wait() => {
            log::info!("the shim is gone");
            Ok(Some(ending))
        }
        () = breaks.wait() => Ok(Some(Ending::Broken)),
        () = shutdown.notified() => {
            log::info!("asked to end");
            Ok(None)
        }
    }
}
