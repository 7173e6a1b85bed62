//! Mounts that the shim makes, in its own mount namespace.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{
    MountAttrFlags, MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind,
    mount_change, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::id_map::IdMaps;
use crate::lower_layers;
use crate::mapped_overlay;
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

    /// Makes a directory a mount of its own that no recursive bind takes along,
    /// nor what is mounted in it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unbindable(dir: &Path) -> io::Result<Self> {
        mount_bind(dir, dir)?;
        let mount = Self::attached(dir);
        mount_change(dir, MountPropagationFlags::UNBINDABLE)?;
        Ok(mount)
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
    let maps = IdMaps::take_from(&mut options.data)?;
    if options.bind || matches!(kind, "bind" | "rbind") {
        options.copy.recursive |= kind == "rbind";
        let mut copy = MountCopy::new(source, options.copy)?;
        if let Some(maps) = &maps {
            copy.map_ids(&maps.namespace()?, false)?;
        }
        copy.set(options.attributes())?;
        copy.forbid_writing(options.read_only)?;
        return copy.attach(target);
    }
    let mut flags = options.flags | FORBIDDEN;
    flags.set(MountFlags::RDONLY, options.read_only != ReadOnly::No);
    match &maps {
        Some(maps) if kind == "overlay" => {
            return mapped_overlay::attach(source, target, flags, &options.data, maps);
        }
        Some(_) => {
            let text = format!("a mount of type {kind} cannot show other owners");
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        None => {}
    }
    let data = options.data.join(",");
    if data.len() <= OPTIONS {
        let data = CString::new(data)?;
        return Ok(mount(source, target, kind, flags, data.as_c_str())?);
    }
    let Some((base, data)) =
        compact_layers(&options.data).filter(|(_, data)| data.len() <= OPTIONS)
    else {
        return Err(io::Error::from(io::ErrorKind::ArgumentListTooLong));
    };
    let data = CString::new(data)?;
    in_directory(&base, || {
        Ok(mount(source, target, kind, flags, data.as_c_str())?)
    })
}

/// An overlay's options with its layers relative to the directory that they have
/// in common, which comes first: an image of some 50 layers fills a page with
/// full paths. None when there is nothing to gain.
fn compact_layers(options: &[String]) -> Option<(PathBuf, String)> {
    let paths = lower_layers::plain(options)?;
    let (first, others) = paths.split_first()?;
    let base = first.ancestors().skip(1).find(|base| {
        others
            .iter()
            .all(|path| path.starts_with(base) && path != base)
    })?;
    let relative: Vec<_> = paths
        .iter()
        .map(|path| path.strip_prefix(base).ok()?.to_str())
        .collect::<Option<_>>()?;
    Some((base.to_owned(), lower_layers::replaced(options, &relative)))
}

/// Does `work` in a thread whose working directory is `base`.
fn in_directory(base: &Path, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    apart(UnshareFlags::FS, || {
        rustix::process::chdir(base)?;
        work()
    })
}

/// Does `work` in a thread that shares nothing of `what` with the others.
pub fn apart<T: Send>(
    what: UnshareFlags,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let thread = || {
        // SAFETY: nothing else runs in this thread.
        unsafe { unshare_unsafe(what) }?;
        work()
    };
    let joined = std::thread::scope(|scope| {
        let spawned = std::thread::Builder::new().spawn_scoped(scope, thread);
        spawned.map(|thread| thread.join())
    });
    joined?.unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
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
            | "dev" | "noexec" | "exec" | "async" | "atime" | "diratime" | "norelatime"
            | "nostrictatime" => {}
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

    /// Containers' images have as many as 127 layers.
    #[test]
    fn mounts_more_layers_than_a_page_of_paths_holds() {
        if !own_namespace() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let _tmpfs = HostMount::new("tmpfs", "t".as_ref(), dir.path(), &[]).unwrap();
        let snapshots = dir
            .path()
            .join("io.containerd.snapshotter.v1.overlayfs/snapshots");
        let layers: Vec<PathBuf> = (0..127)
            .map(|n| snapshots.join(n.to_string()).join("fs"))
            .collect();
        for (n, layer) in layers.iter().enumerate() {
            std::fs::create_dir_all(layer).unwrap();
            std::fs::write(layer.join(format!("from-{n}")), "").unwrap();
        }
        let [upper, work, target] = ["upper", "work", "target"].map(|name| {
            let path = snapshots.join(name);
            std::fs::create_dir(&path).unwrap();
            path
        });
        let lower: Vec<_> = layers.iter().map(|p| p.display().to_string()).collect();
        let options = [
            "index=off".to_owned(),
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}", lower.join(":")),
        ];
        let here = std::env::current_dir().unwrap();
        let overlay = HostMount::new("overlay", "overlay".as_ref(), &target, &options).unwrap();
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 127);
        std::fs::write(target.join("new"), "").unwrap();
        assert!(upper.join("new").exists());
        assert_eq!(std::env::current_dir().unwrap(), here);
        drop(overlay);

        let one = [format!("lowerdir=/{}:/b", "a".repeat(OPTIONS))];
        let error = attach("overlay", "overlay".as_ref(), &target, &one).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ArgumentListTooLong);
    }

    #[test]
    fn layers_are_named_from_what_they_have_in_common() {
        let compact = |options: &[&str]| {
            let options: Vec<_> = options.iter().map(|o| (*o).to_owned()).collect();
            compact_layers(&options)
        };
        let expected = ("/s".into(), "lowerdir=2/fs:10/fs,ro".to_owned());
        let layers = "lowerdir=/s/2/fs:/s/10/fs";
        assert_eq!(compact(&[layers, "ro"]), Some(expected));
        let expected = ("/s".into(), "lowerdir=2:2/fs".to_owned());
        assert_eq!(compact(&["lowerdir=/s/2:/s/2/fs"]), Some(expected));
        for layers in [
            "lowerdir=/a/b\\:c:/a/d",
            "lowerdir=/a::/b",
            "lowerdir=a:b",
            "upperdir=/a",
        ] {
            assert_eq!(compact(&[layers]), None, "{layers}");
        }
    }

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
