//! The namespaces of a pod with users of its own (`hostUsers: false`): one of
//! users, and one each of network, IPC and host name that belong to it, so that
//! the pod's root has the rights there that its capabilities name. They are made
//! in a copy of this program, `husk-agent namespaces FD`; the agent's main thread
//! then goes into all of them but that of users, and what it starts with it.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::OnceLock;

use husk_protocol::agent::{CreateSandboxRequest, IdMapping as IdMappingMessage};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::Uid;
use rustix::thread::set_thread_res_uid;

use crate::container::{Helper, IdMaps, LaunchError};
use crate::early_init;
use crate::error::{Doing, Error, OsError};
use crate::init::channel::{AgentChannel, HelperChannel};
use crate::init::plan::{Order, Report};
use crate::init::{InitError, namespaces};
use crate::kernel_file;
use crate::oci::IdMapping;
use crate::stdio::ChildStreams;

/// Those that belong to the pod's users, by their names in /proc.
const OWNED: [(&str, CloneFlags); 3] = [
    ("net", CloneFlags::CLONE_NEWNET),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
];

/// There is one pod.
static NETWORKS: OnceLock<Networks> = OnceLock::new();

/// A pod's namespace of users.
#[derive(Debug)]
pub struct PodUsers {
    maps: IdMaps,
    file: File,
}

#[derive(Debug)]
struct Networks {
    /// Where the machine's interfaces appear, and the kernel tells of devices.
    first: File,
    pod: File,
}

impl PodUsers {
    /// Makes the namespaces and enters them.
    pub async fn make(request: &CreateSandboxRequest) -> Result<Self, Error> {
        let maps = IdMaps::new(
            mappings(&request.uid_mappings),
            mappings(&request.gid_mappings),
        )?;
        let (helper, channel) = start(&maps).await?;
        let open = |name: &str| {
            let path = format!("/proc/{}/ns/{name}", helper.pid());
            File::open(&path).doing("open", path)
        };
        let file = open("user")?;
        let mut owned = Vec::new();
        for (name, flag) in OWNED {
            owned.push((name, flag, open(name)?));
        }
        // It ends, and the namespaces are where they are open.
        drop(channel);
        let first = File::open("/proc/thread-self/ns/net").doing("open", "the first network")?;
        let pod = open_clone(&owned[0].2)?;
        for (name, flag, namespace) in &owned {
            setns(namespace, *flag).doing("enter the pod's", name)?;
        }
        let networks = Networks { first, pod };
        NETWORKS.set(networks).map_err(|_| Error::SandboxExists)?;
        early_init::bring_up_loopback()?;
        Ok(Self { maps, file })
    }

    /// To join it, for a container with these maps.
    pub fn with_maps(&self, maps: &IdMaps) -> Option<io::Result<File>> {
        (self.maps == *maps).then(|| self.file.try_clone())
    }

    /// To join it.
    pub fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Sets a sysctl of the pod's namespaces.
    pub fn write_sysctl(&self, path: &Path, value: &str) -> io::Result<()> {
        match kernel_file::write(path, value) {
            // Some are writable to the root of their namespace alone, whatever
            // the rights of others.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let root = self.maps.root().ok_or(error)?;
                let (keep, none) = (Uid::ROOT, None::<Uid>);
                set_thread_res_uid(none, Uid::from_raw(root), none)?;
                let written = kernel_file::write(path, value);
                set_thread_res_uid(none, keep, none)?;
                written
            }
            written => written,
        }
    }
}

fn open_clone(file: &File) -> Result<File, OsError> {
    file.try_clone().doing("open", "the pod's network")
}

fn mappings(messages: &[IdMappingMessage]) -> Vec<IdMapping> {
    let mapping = |message: &IdMappingMessage| IdMapping {
        container_id: message.container_id,
        host_id: message.host_id,
        size: message.size,
    };
    messages.iter().map(mapping).collect()
}

async fn start(maps: &IdMaps) -> Result<(Helper, AgentChannel), LaunchError> {
    let (mut channel, theirs) = AgentChannel::pair().doing("make", "a channel")?;
    let helper = Helper::spawn("namespaces", &theirs, ChildStreams::default())?;
    drop(theirs);
    loop {
        let report = channel.receive::<Report>().await;
        match report.doing("hear", "the helper")? {
            Some((Report::IdMapsNeeded, _)) => {
                maps.write(helper.pid())?;
                let answered = channel.send(&Order::Continue).await;
                answered.doing("tell", "the helper")?;
            }
            Some((Report::Ready, _)) => return Ok((helper, channel)),
            Some((Report::Failure(failure), _)) => return Err(LaunchError::Reported(failure)),
            _ => return Err(LaunchError::Ended),
        }
    }
}

/// The network namespace that interfaces have to be moved to, if it is not the
/// first.
pub fn network() -> Option<&'static File> {
    NETWORKS.get().map(|networks| &networks.pod)
}

/// Does something, such as to open a socket, where interfaces appear and the
/// kernel tells of devices. Of the calling thread.
pub fn in_first_network<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let Some(networks) = NETWORKS.get() else {
        return work();
    };
    setns(&networks.first, CloneFlags::CLONE_NEWNET)?;
    let done = work();
    setns(&networks.pod, CloneFlags::CLONE_NEWNET)?;
    done
}

/// Makes the namespaces and waits until they are open.
pub fn main(fd: RawFd) -> ! {
    HelperChannel::serve(fd, hold)
}

fn hold(channel: &mut HelperChannel) -> Result<Infallible, InitError> {
    namespaces::enter_user_namespace(channel)?;
    let owned = OWNED
        .iter()
        .fold(CloneFlags::empty(), |all, (_, flag)| all | *flag);
    unshare(owned).doing("make", "the pod's namespaces")?;
    channel
        .send(&Report::Ready, None)
        .doing("tell", "the agent")?;
    let _ = channel.receive::<Order>();
    std::process::exit(0)
}
