//! The socket on which a shim serves, named as containerd's own shims name it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Where the sockets of all shims are, unless containerd says otherwise.
pub const DEFAULT_DIR: &str = "/run/containerd/s";

/// A shim's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShimSocket {
    path: PathBuf,
}

/// A socket that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("shim's socket {path}")]
pub struct SocketError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl ShimSocket {
    /// The socket of the pod `id`.
    pub fn new(dir: &Path, containerd_address: &str, namespace: &str, id: &str) -> Self {
        let key = Path::new(containerd_address).join(namespace).join(id);
        let digest = Sha256::digest(key.as_os_str().as_encoded_bytes());
        let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            path: dir.join(name),
        }
    }

    /// The socket at `path`.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As containerd wants it.
    pub fn address(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Somebody serves on it.
    pub fn answers(&self) -> bool {
        UnixStream::connect(&self.path).is_ok()
    }

    /// Listens, for root only. A socket that a dead shim left is replaced.
    ///
    /// # Errors
    /// A living shim has it, or the directory cannot be written to.
    pub fn listen(&self) -> Result<UnixListener, SocketError> {
        self.try_listen().map_err(|source| SocketError {
            path: self.path.clone(),
            source,
        })
    }

    fn try_listen(&self) -> io::Result<UnixListener> {
        if let Some(dir) = self.path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let listener = match UnixListener::bind(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && !self.answers() => {
                self.remove();
                UnixListener::bind(&self.path)?
            }
            other => other?,
        };
        fs::set_permissions(&self.path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    /// Removes it.
    pub fn remove(&self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_named_as_containerd_names_it() {
        let socket = ShimSocket::new(Path::new("/s"), "/run/c.sock", "default", "t1");
        // printf %s /run/c.sock/default/t1 | sha256sum
        let expected = "unix:///s/dd09ba73725b34d40390e4e5128ea3ded7e75208a7501229bab08b34dd1f73c1";
        assert_eq!(socket.address(), expected);
    }

    #[test]
    fn replaces_what_a_dead_shim_left() {
        let dir = tempfile::tempdir().unwrap();
        let socket = ShimSocket::new(dir.path(), "/run/c.sock", "default", "t1");
        assert!(!socket.answers());
        drop(socket.listen().unwrap());
        assert!(!socket.answers());
        let listener = socket.listen().unwrap();
        assert!(socket.answers());
        assert!(socket.listen().is_err());
        drop(listener);
    }
}
