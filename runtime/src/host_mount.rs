//! Mounts that the shim makes, in its own mount namespace.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive,
    mount_change, mount_remount, unmount,
};

/// Most bytes of options that mount(2) takes: one page, its NUL included.
const OPTIONS: usize = 4095;

/// Something mounted at a path. Unmounted when dropped.
#[derive(Debug)]
pub struct HostMount {
    target: PathBuf,
}

/// Options in the form of mount(8), sorted out.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MountFlags,
    bind: bool,
    recursive: bool,
    data: Vec<String>,
}

impl HostMount {
    /// Mounts as containerd's snapshotters and mount(8) say it: a type, a source
    /// and options.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new(kind: &str, source: &Path, target: &Path, options: &[String]) -> io::Result<Self> {
        let options = Options::parse(options);
        if options.bind || matches!(kind, "bind" | "rbind") {
            let recursive = options.recursive || kind == "rbind";
            return Self::bind(source, target, recursive, options.flags);
        }
        let data = options.data.join(",");
        if data.len() > OPTIONS {
            return Err(io::Error::from(io::ErrorKind::ArgumentListTooLong));
        }
        let data = std::ffi::CString::new(data)?;
        mount(source, target, kind, options.flags, data.as_c_str())?;
        Ok(Self {
            target: target.to_owned(),
        })
    }

    /// Shows `source` at `target` too.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn bind(
        source: &Path,
        target: &Path,
        recursive: bool,
        flags: MountFlags,
    ) -> io::Result<Self> {
        if recursive {
            mount_bind_recursive(source, target)?;
        } else {
            mount_bind(source, target)?;
        }
        let bound = Self {
            target: target.to_owned(),
        };
        if !flags.is_empty() {
            // A bind takes its flags only when mounted again.
            mount_remount(target, MountFlags::BIND | flags, "")?;
        }
        Ok(bound)
    }

    /// A tmpfs whose mounts are seen by the namespaces made from this one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn shared_tmpfs(target: &Path) -> io::Result<Self> {
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("husk", target, "tmpfs", flags, c"mode=0755,size=1m")?;
        let tree = Self {
            target: target.to_owned(),
        };
        mount_change(target, MountPropagationFlags::SHARED)?;
        Ok(tree)
    }

    /// A directory as if something was mounted there.
    #[cfg(test)]
    pub fn pretended(path: &Path) -> Self {
        Self {
            target: path.to_owned(),
        }
    }

    /// Where it is.
    pub fn target(&self) -> &Path {
        &self.target
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        // Detached, so that neither users nor submounts hold it.
        if let Err(error) = unmount(&self.target, UnmountFlags::DETACH) {
            tracing::warn!(path = %self.target.display(), %error, "unmount");
        }
    }
}

impl Options {
    fn parse(options: &[String]) -> Self {
        let mut parsed = Self {
            flags: MountFlags::empty(),
            bind: false,
            recursive: false,
            data: Vec::new(),
        };
        for option in options {
            let (flag, set) = match option.as_str() {
                "bind" => {
                    parsed.bind = true;
                    continue;
                }
                "rbind" => {
                    (parsed.bind, parsed.recursive) = (true, true);
                    continue;
                }
                // Of no meaning here, or for the guest to see to.
                "defaults" | "rw" | "loop" | "private" | "rprivate" | "slave" | "rslave"
                | "shared" | "rshared" | "unbindable" | "runbindable" | "rro" | "rrw" => {
                    if option == "rw" {
                        parsed.flags.remove(MountFlags::RDONLY);
                    }
                    if option == "rro" {
                        parsed.flags.insert(MountFlags::RDONLY);
                    }
                    continue;
                }
                "ro" => (MountFlags::RDONLY, true),
                "nosuid" => (MountFlags::NOSUID, true),
                "suid" => (MountFlags::NOSUID, false),
                "nodev" => (MountFlags::NODEV, true),
                "dev" => (MountFlags::NODEV, false),
                "noexec" => (MountFlags::NOEXEC, true),
                "exec" => (MountFlags::NOEXEC, false),
                "sync" => (MountFlags::SYNCHRONOUS, true),
                "dirsync" => (MountFlags::DIRSYNC, true),
                "noatime" => (MountFlags::NOATIME, true),
                "nodiratime" => (MountFlags::NODIRATIME, true),
                "relatime" => (MountFlags::RELATIME, true),
                "strictatime" => (MountFlags::STRICTATIME, true),
                _ => {
                    parsed.data.push(option.clone());
                    continue;
                }
            };
            parsed.flags.set(flag, set);
        }
        parsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Options {
        let options: Vec<String> = text.split(',').map(str::to_owned).collect();
        Options::parse(&options)
    }

    #[test]
    fn sorts_options_out() {
        let overlay = parse("index=off,ro,lowerdir=/a:/b");
        assert_eq!(overlay.flags, MountFlags::RDONLY);
        assert_eq!(overlay.data, ["index=off", "lowerdir=/a:/b"]);
        assert!(!overlay.bind);
        let bind = parse("rbind,rprivate,rw,nosuid");
        assert!(bind.bind && bind.recursive && bind.data.is_empty());
        assert_eq!(bind.flags, MountFlags::NOSUID);
    }
}
