//! The file server on a small tree that is the same for each input.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use husk_fs::server::{Resources, Server};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

use crate::skip;

type Job = Box<dyn FnOnce(&mut Server) + Send>;

/// A server on a thread of its own, which has a file server's privileges, while
/// the caller keeps root's to put the tree in order.
pub struct FileServer {
    jobs: Sender<Job>,
    done: Mutex<Receiver<()>>,
    outside: PathBuf,
    tree: PathBuf,
}

/// What lies beside the tree.
const OUTSIDE: &str = "outside";

impl FileServer {
    /// Needs root.
    pub fn start() -> Self {
        if !rustix::process::geteuid().is_root() {
            skip("the file server needs root");
        }
        let dir = tempfile::tempdir().expect("a directory").keep();
        let (outside, tree) = (dir.join("a"), dir.join("tree"));
        // SAFETY: no other thread shares this one's working directory.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
            .expect("a mount namespace");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).expect("mounts are changed");
        let small = c"size=8m,nr_inodes=500";
        rustix::mount::mount("tmpfs", &dir, "tmpfs", MountFlags::NODEV, small).expect("a tmpfs");
        fs::create_dir(&tree).expect("a directory");
        fs::write(&outside, OUTSIDE).expect("a file");
        let (jobs, take) = channel::<Job>();
        let (tell, done) = channel();
        let top = tree.clone();
        std::thread::spawn(move || {
            let mut server = server(&top);
            for job in take {
                job(&mut server);
                let _ = tell.send(());
            }
        });
        Self {
            jobs,
            done: Mutex::new(done),
            outside,
            tree,
        }
    }

    /// Puts the tree in order, runs `job` and returns when it has ended.
    pub fn run(&self, job: impl FnOnce(&mut Server) + Send + 'static) {
        self.tidy();
        self.jobs.send(Box::new(job)).expect("the server lives");
        self.done
            .lock()
            .expect("nobody failed")
            .recv()
            .expect("the server lives");
        let outside = fs::read(&self.outside).expect("nobody took it");
        assert_eq!(outside, OUTSIDE.as_bytes());
    }

    fn tidy(&self) {
        for entry in fs::read_dir(&self.tree).expect("the tree") {
            let path = entry.expect("an entry").path();
            if path.is_symlink() || !path.is_dir() {
                fs::remove_file(path).expect("it goes");
            } else {
                fs::remove_dir_all(path).expect("it goes");
            }
        }
        let at = |name: &str| self.tree.join(name);
        fs::create_dir_all(at("a/rootfs/b")).expect("a directory");
        fs::create_dir_all(at("b/c")).expect("a directory");
        fs::write(at("a/rootfs/a"), "content").expect("a file");
        std::os::unix::fs::symlink("/etc", at("c")).expect("a link");
    }
}

fn server(tree: &Path) -> Server {
    // SAFETY: the thread has used neither working directory nor umask.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.expect("a working directory");
    let open = |path: &Path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).expect("a directory")
    };
    Server::new(Resources {
        top: open(tree),
        proc_self_fd: open(Path::new("/proc/self/fd")),
        mountinfo: None,
        reference_budget: 8,
    })
    .expect("a server")
}
