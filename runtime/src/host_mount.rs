//! Mounts that the shim makes, in its own mount namespace.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{
    MountAttrFlags, MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};

use crate::mount_copy::{CopyOptions, FORBIDDEN, MountCopy, ReadOnly};

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
    copy: CopyOptions,
    read_only: ReadOnly,
    data: Vec<String>,
}

impl HostMount {
    /// Mounts at `target`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new(kind: &str, source: &Path, target: &Path, options: &[String]) -> io::Result<Self> {
        attach(kind, source, target, options)?;
        Ok(Self::attached(target))
    }

    /// Takes over what has been mounted at `target`.
    pub fn attached(target: &Path) -> Self {
        Self {
            target: target.to_owned(),
        }
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

/// Mounts as containerd's snapshotters and mount(8) say it: a type, a source and
/// options. It goes with the mount that `target` lies in.
///
/// # Errors
/// The kernel refuses.
pub fn attach(kind: &str, source: &Path, target: &Path, options: &[String]) -> io::Result<()> {
    let mut options = Options::parse(options);
    if options.bind || matches!(kind, "bind" | "rbind") {
        options.copy.recursive |= kind == "rbind";
        let copy = MountCopy::new(source, options.copy)?;
        copy.set(options.attributes())?;
        copy.forbid_writing(options.read_only)?;
        return copy.attach(target);
    }
    let data = options.data.join(",");
    if data.len() > OPTIONS {
        return Err(io::Error::from(io::ErrorKind::ArgumentListTooLong));
    }
    let data = std::ffi::CString::new(data)?;
    let mut flags = options.flags | FORBIDDEN;
    flags.set(MountFlags::RDONLY, options.read_only != ReadOnly::No);
    Ok(mount(source, target, kind, flags, data.as_c_str())?)
}

impl Options {
    fn parse(options: &[String]) -> Self {
        let mut parsed = Self {
            flags: MountFlags::empty(),
            bind: false,
            copy: CopyOptions::default(),
            read_only: ReadOnly::No,
            data: Vec::new(),
        };
        for option in options {
            let flag = match option.as_str() {
                "sync" => MountFlags::SYNCHRONOUS,
                "dirsync" => MountFlags::DIRSYNC,
                "noatime" => MountFlags::NOATIME,
                "nodiratime" => MountFlags::NODIRATIME,
                "relatime" => MountFlags::RELATIME,
                "strictatime" => MountFlags::STRICTATIME,
                option => {
                    parsed.parse_other(option);
                    continue;
                }
            };
            parsed.flags.insert(flag);
        }
        parsed
    }

    fn parse_other(&mut self, option: &str) {
        match option {
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.copy.recursive) = (true, true),
            "ro" => self.read_only = ReadOnly::Top,
            "rro" => self.read_only = ReadOnly::All,
            "rw" | "rrw" => self.read_only = ReadOnly::No,
            "slave" | "rslave" | "shared" | "rshared" => self.copy.follows = true,
            "private" | "rprivate" => self.copy.follows = false,
            // Of no meaning here, or for the guest to see to.
            "defaults" | "loop" | "unbindable" | "runbindable" | "nosuid" | "suid" | "nodev"
            | "dev" | "noexec" | "exec" => {}
            _ => self.data.push(option.to_owned()),
        }
    }

    /// Those that a bind can have.
    fn attributes(&self) -> MountAttrFlags {
        [
            (MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
            (
                MountFlags::STRICTATIME,
                MountAttrFlags::MOUNT_ATTR_STRICTATIME,
            ),
            (
                MountFlags::NODIRATIME,
                MountAttrFlags::MOUNT_ATTR_NODIRATIME,
            ),
        ]
        .into_iter()
        .filter(|(flag, _)| self.flags.contains(*flag))
        .fold(MountAttrFlags::empty(), |all, (_, attribute)| {
            all | attribute
        })
    }
}

/// Gives the calling thread a mount namespace from which nothing leaves; false
/// without the right to.
#[cfg(test)]
pub fn own_namespace() -> bool {
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: not root");
        return false;
    }
    // SAFETY: no other thread relies on this one's working directory.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", slave).unwrap();
    true
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
        assert_eq!(overlay.read_only, ReadOnly::Top);
        assert_eq!(overlay.data, ["index=off", "lowerdir=/a:/b"]);
        assert!(!overlay.bind);
        let bind = parse("rbind,rprivate,ro,rw,nosuid,noatime");
        assert!(bind.bind && bind.copy.recursive && bind.data.is_empty());
        assert_eq!(bind.read_only, ReadOnly::No);
        assert_eq!(bind.attributes(), MountAttrFlags::MOUNT_ATTR_NOATIME);
        assert!(!bind.copy.follows && parse("rbind,rslave").copy.follows);
    }
}
