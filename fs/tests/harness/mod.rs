//! Mounts the file server on this machine: FUSE from `/dev/fuse` instead of a
//! virtqueue, so that real system calls of a real kernel test it.

#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use husk_fs::buffers::Buffers;
use husk_fs::server::{DATA_BYTES, Resources, Server};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;
use vm_memory::VolatileSlice;

/// Room for the largest request or answer.
const MESSAGE_BYTES: usize = DATA_BYTES as usize + 4096;

/// A place to test in.
pub struct Place {
    /// Its path as the guest sees it.
    pub guest: PathBuf,
    /// The same directory as the host sees it.
    pub host: PathBuf,
    /// Whether the guest alone changes it.
    pub is_own: bool,
}

/// Runs a test in both areas and on an overlay, with room for all references
/// and for almost none.
pub fn everywhere(test: impl Fn(&Place)) {
    for budget in [1000, 2] {
        for (area, is_own) in [(OWN, true), (OVERLAY, true), (SHARED, false)] {
            let Some(mount) = Mount::new(budget) else {
                return;
            };
            test(&Place {
                guest: mount.guest(area),
                host: mount.host(area),
                is_own,
            });
        }
    }
}

/// The guest's own tree.
pub const OWN: &str = "web/rootfs";
/// The same on an overlay, as a container's root file system is.
pub const OVERLAY: &str = "layered/rootfs";
/// A volume.
pub const SHARED: &str = "web/mounts/0";

/// A served tree and where it is mounted; both vanish with it.
pub struct Mount {
    /// Holds both directories.
    dir: tempfile::TempDir,
    server: Option<JoinHandle<(usize, usize, usize)>>,
}

/// Why mounting can't be tested here.
fn obstacle() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root");
    }
    match File::open("/dev/fuse") {
        Ok(_) => None,
        Err(_) => Some("no /dev/fuse"),
    }
}

impl Mount {
    /// Serves a fresh tree with [`OWN`], [`OVERLAY`] and [`SHARED`], or says why
    /// it can't be.
    pub fn new(reference_budget: usize) -> Option<Self> {
        Self::on(None, reference_budget)
    }

    /// As `new`, without a disk, for tests of many files.
    pub fn in_memory(reference_budget: usize) -> Option<Self> {
        Self::on(Some("tmpfs"), reference_budget)
    }

    fn on(file_system: Option<&str>, reference_budget: usize) -> Option<Self> {
        if let Some(why) = obstacle() {
            println!("SKIPPED: {why}");
            return None;
        }
        // A mount namespace for this test's threads alone.
        // SAFETY: no other thread shares this one's working directory.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();

        let dir = tempfile::tempdir().unwrap();
        if let Some(kind) = file_system {
            rustix::mount::mount(kind, dir.path(), kind, MountFlags::empty(), c"").unwrap();
        }
        for place in [OWN, OVERLAY, SHARED] {
            std::fs::create_dir_all(dir.path().join("host").join(place)).unwrap();
        }
        std::fs::create_dir(dir.path().join("guest")).unwrap();
        mount_overlay(dir.path());
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = std::ffi::CString::new(format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            device.as_raw_fd()
        ))
        .unwrap();
        let target = dir.path().join("guest");
        rustix::mount::mount("husk", &target, "fuse", MountFlags::empty(), &*options).unwrap();
        let top = dir.path().join("host");
        let server = std::thread::spawn(move || serve(device, &top, reference_budget));
        Some(Self {
            dir,
            server: Some(server),
        })
    }

    /// A path as the host sees it.
    pub fn host(&self, path: &str) -> PathBuf {
        self.dir.path().join("host").join(path)
    }

    /// The same path as the guest sees it.
    pub fn guest(&self, path: &str) -> PathBuf {
        self.dir.path().join("guest").join(path)
    }

    /// Unmounts; the server's last counts (nodes, references, handles).
    pub fn unmount(mut self) -> (usize, usize, usize) {
        self.end().unwrap()
    }

    fn end(&mut self) -> Option<(usize, usize, usize)> {
        let server = self.server.take()?;
        rustix::mount::unmount(self.guest(""), UnmountFlags::DETACH).unwrap();
        Some(server.join().unwrap())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.end();
        // What is mounted would keep the directory from going.
        let overlay = self.host(OVERLAY);
        let _ = rustix::mount::unmount(overlay, UnmountFlags::DETACH);
        let shared = self.host(SHARED);
        let _ = rustix::mount::unmount(shared, UnmountFlags::DETACH);
        let _ = rustix::mount::unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

/// A directory with something in its lower layer.
fn mount_overlay(dir: &Path) {
    for layer in ["lower/below", "upper", "work"] {
        std::fs::create_dir_all(dir.join(layer)).unwrap();
    }
    std::fs::write(dir.join("lower/below/file"), "from below").unwrap();
    let layer = |name| dir.join(name).to_str().unwrap().to_owned();
    let options = std::ffi::CString::new(format!(
        "lowerdir={},upperdir={},workdir={}",
        layer("lower"),
        layer("upper"),
        layer("work")
    ))
    .unwrap();
    let target = dir.join("host").join(OVERLAY);
    rustix::mount::mount("overlay", target, "overlay", MountFlags::empty(), &*options).unwrap();
}

/// Answers the kernel until it unmounts.
fn serve(mut device: File, top: &Path, reference_budget: usize) -> (usize, usize, usize) {
    // Working directory and umask become this thread's own.
    // SAFETY: the thread has not used either.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.unwrap();
    let open = |path: &Path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).unwrap()
    };
    let mut server = Server::new(Resources {
        top: open(top),
        proc_self_fd: open(Path::new("/proc/self/fd")),
        mountinfo: None,
        reference_budget,
    })
    .unwrap();
    // What the program may not do, the thread may not do either: it would kill
    // the test.
    husk_fs::seccomp::install().unwrap();
    let mut request = vec![0; MESSAGE_BYTES];
    let mut reply = vec![0; MESSAGE_BYTES];
    let mut counts = server.counts();
    loop {
        let size = match device.read(&mut request) {
            Ok(size) => size,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => continue,
            // Unmounted, the second while a request was being taken.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ECONNABORTED)) => {
                return counts;
            }
            Err(e) => panic!("/dev/fuse: {e}"),
        };
        let used = server.handle(pieces(&mut request[..size]), pieces(&mut reply));
        counts = server.counts();
        if used > 0 {
            match device.write(&reply[..used]) {
                Ok(written) => assert_eq!(written, used),
                // The caller was killed in the meantime.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => (),
                Err(e) => panic!("/dev/fuse: {e}: {:x?}", &reply[..used.min(64)]),
            }
        }
    }
}

/// Cuts memory at odd places, as a guest may.
fn pieces(memory: &mut [u8]) -> Buffers<'_> {
    let mut buffers = Buffers::default();
    let mut rest = memory;
    for size in [7, 33, 1, 4095, 8192] {
        let (piece, later) = rest.split_at_mut(size.min(rest.len()));
        buffers.push(VolatileSlice::from(piece)).unwrap();
        rest = later;
    }
    buffers.push(VolatileSlice::from(rest)).unwrap();
    buffers
}
