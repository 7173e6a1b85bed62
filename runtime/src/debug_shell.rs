//! Programs that root of the node runs in the guest itself, where the configuration
//! allows it (docs/decisions/debug-shell.md): what the machine is given for it, and
//! the socket on which the operator's command asks.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_node::shell;
use husk_protocol::limit;
use husk_protocol::path::DEBUG_SHELL;
use rustix::fs::MemfdFlags;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::agent_client::Agent;
use crate::config::Config;
use crate::guest_image::open;
use crate::vm_process::{Vm, VmError};

mod session;

/// Pause after a connection that could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// What is added to the guest kernel's command line. Templates are told apart by it,
/// so that a copy has a shell where its pod may have one, and there alone.
pub fn kernel_parameters(config: &Config) -> String {
    match (config.debug_shell, config.kernel_parameters.as_str()) {
        (false, given) => given.to_owned(),
        (true, "") => DEBUG_SHELL.to_owned(),
        (true, given) => format!("{DEBUG_SHELL} {given}"),
    }
}

/// The initramfs: the agent's, and where debug shells are allowed a second archive
/// behind it, which the kernel unpacks over the first
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
///
/// # Errors
/// A file is not there, is not what it should be, or cannot be copied.
pub async fn initramfs(config: &Config) -> Result<OwnedFd, VmError> {
    let agent = open("initramfs", &config.initramfs, config).await?;
    if !config.debug_shell {
        return Ok(agent);
    }
    let shell = open("debug shell", &config.debug_initramfs(), config).await?;
    joined(agent, shell).map_err(|source| VmError::Io {
        what: "a larger initramfs",
        source,
    })
}

fn joined(first: OwnedFd, second: OwnedFd) -> io::Result<OwnedFd> {
    let whole = rustix::fs::memfd_create("initramfs", MemfdFlags::CLOEXEC)?;
    let mut whole = File::from(whole);
    io::copy(&mut File::from(first), &mut whole)?;
    // An archive begins at a multiple of four.
    let bytes = whole.metadata()?.len();
    whole.set_len(bytes.next_multiple_of(4))?;
    io::Seek::seek(&mut whole, io::SeekFrom::End(0))?;
    io::copy(&mut File::from(second), &mut whole)?;
    // The VMM gets nothing that it could write to.
    let path = format!("/proc/self/fd/{}", whole.as_raw_fd());
    OpenOptions::new().read(true).open(path).map(OwnedFd::from)
}

/// Serves in the pod's directory until the machine has ended. A pod is one without
/// it as well.
pub async fn serve(dir: &Path, vm: Vm, agent: Agent) {
    let listener = match listen(dir) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(%error, "no debug shell");
            return;
        }
    };
    let end_vm = vm.clone();
    tokio::select! {
        () = accept(&listener, vm, agent) => {}
        _ = end_vm.ended() => {}
    }
    let _ = std::fs::remove_file(dir.join(shell::SOCKET));
}

fn listen(dir: &Path) -> io::Result<UnixListener> {
    // The directory is for root alone; so is the socket.
    let dir = File::open(dir)?;
    let path = shell::path_in(dir.as_raw_fd());
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

async fn accept(listener: &UnixListener, vm: Vm, agent: Agent) {
    let places = Arc::new(Semaphore::new(limit::SHELLS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "debug shell");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if !is_ours(&stream) {
            continue;
        }
        let (vm, agent) = (vm.clone(), agent.clone());
        tokio::spawn(async move {
            let end_vm = vm.clone();
            tokio::select! {
                () = session::attend(stream, vm, agent) => {}
                // Whoever waits sees the end of the stream.
                _ = end_vm.ended() => {}
            }
            drop(place);
        });
    }
}

/// The other end belongs to who this shim belongs to.
fn is_ours(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_node::sums::{self, Hash};
    use std::io::Read;

    fn config(dir: &Path) -> Config {
        Config {
            initramfs: dir.join("initramfs.cpio"),
            debug_shell: true,
            kernel_parameters: "quiet".into(),
            template_dir: dir.join("templates"),
            ..Config::default()
        }
    }

    fn put(path: &Path, text: &str) {
        std::fs::write(path, text).unwrap();
        let (hash, _) = Hash::of(&File::open(path).unwrap()).unwrap();
        let name = path.file_name().unwrap().display();
        let mut sums = OpenOptions::new();
        let sums = sums.append(true).create(true);
        let mut sums = sums.open(path.with_file_name(sums::FILE)).unwrap();
        io::Write::write_all(&mut sums, format!("{hash}  {name}\n").as_bytes()).unwrap();
    }

    #[tokio::test]
    async fn a_machine_is_given_nothing_unless_it_is_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let allowed = config(dir.path());
        let mut config = allowed.clone();
        config.debug_shell = false;
        put(&config.initramfs, "agent");
        assert_eq!(kernel_parameters(&config), "quiet");
        let mut text = String::new();
        let plain = initramfs(&config).await.unwrap();
        File::from(plain).read_to_string(&mut text).unwrap();
        assert_eq!(text, "agent");

        assert_eq!(kernel_parameters(&allowed), "husk.debug_shell=1 quiet");
        let error = initramfs(&allowed).await.unwrap_err().to_string();
        assert!(error.starts_with("debug shell /"), "{error}");
        std::fs::write(dir.path().join("debug.cpio"), "shell").unwrap();
        let error = initramfs(&allowed).await.unwrap_err().to_string();
        assert!(error.contains("has no line for it"), "{error}");
        put(&dir.path().join("debug.cpio"), "shell");
        let mut both = File::from(initramfs(&allowed).await.unwrap());
        text.clear();
        both.read_to_string(&mut text).unwrap();
        assert_eq!(text, "agent\0\0\0shell");
        assert!(io::Write::write(&mut both, b"x").is_err());
    }
}
