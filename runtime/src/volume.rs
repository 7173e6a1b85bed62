//! Volumes: binds of the host's files and directories go through the shared
//! tree; what the kernel provides is mounted in the guest and left alone here.

mod huge_pages;

use std::collections::BTreeMap;
use std::io;
use std::path::{Component, Path, PathBuf};

use husk_protocol::agent::{Storage, TmpfsStorage};
use husk_protocol::path;
use ttrpc::Code;

use crate::bundle::Mount;
use crate::device::{DeviceError, Devices};
use crate::mirror::{self, MirrorUse};
use crate::mount_copy::{CopyOptions, MountCopy, ReadOnly};
use crate::shared_tree::{ContainerTree, SharedTreeError};

/// Size of a pod's `/dev/shm`, as container engines make it.
const SHM_BYTES: u64 = 64 << 20;

/// What is done about one mount of the spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumePlan {
    /// The guest mounts it as the spec says.
    Guest,
    /// The pod's `/dev/shm`, which the guest has.
    Shm,
    /// Shown to the guest through the shared tree.
    Tree {
        /// On the host.
        source: PathBuf,
        /// How it is copied.
        options: CopyOptions,
        /// What of it is not to be written to.
        read_only: ReadOnly,
    },
}

/// A volume that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// Its source is not there.
    #[error("volume for {destination}: {path}")]
    Source {
        /// In the container.
        destination: PathBuf,
        /// On the host.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A node of a character device that no guest has.
    #[error("volume for {destination}: {path} is a device of the host, which a guest cannot have")]
    Device {
        /// In the container.
        destination: PathBuf,
        /// On the host.
        path: PathBuf,
    },
    /// A block device.
    #[error(transparent)]
    Block(#[from] DeviceError),
    /// The shared tree.
    #[error(transparent)]
    Tree(#[from] SharedTreeError),
}

impl VolumeError {
    /// What containerd is told.
    pub fn code(&self) -> Code {
        match self {
            Self::Source { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Code::NOT_FOUND
            }
            Self::Device { .. } => Code::INVALID_ARGUMENT,
            Self::Block(error) => error.code(),
            Self::Source { .. } | Self::Tree(_) => Code::UNKNOWN,
        }
    }
}

impl VolumePlan {
    /// What to do about `mount`.
    pub fn new(mount: &Mount) -> Self {
        let has = |names: &[&str]| mount.has_any(names);
        let kind = mount.kind.as_deref().unwrap_or_default();
        let bind = matches!(kind, "bind" | "rbind") || has(&["bind", "rbind"]);
        match &mount.source {
            Some(source) if bind && is_shm(&mount.destination, source) => Self::Shm,
            Some(source) if bind => Self::Tree {
                source: source.clone(),
                options: CopyOptions {
                    recursive: kind == "rbind" || has(&["rbind"]),
                    follows: has(&["slave", "rslave", "shared", "rshared"]),
                },
                read_only: if has(&["rro"]) {
                    ReadOnly::All
                } else if has(&["ro"]) {
                    ReadOnly::Top
                } else {
                    ReadOnly::No
                },
            },
            _ => Self::Guest,
        }
    }
}

/// The engines keep a pod's shared memory in a tmpfs named so.
fn is_shm(destination: &Path, source: &Path) -> bool {
    destination == Path::new("/dev/shm") && source.file_name().is_some_and(|name| name == "shm")
}

/// The pod's `/dev/shm` as a storage of the sandbox, owned by the user and group
/// that are its root.
pub fn shm_storage((uid, gid): (u32, u32)) -> Storage {
    let mut options = ["nosuid", "nodev", "noexec"].map(str::to_owned).to_vec();
    options.extend([format!("uid={uid}"), format!("gid={gid}")]);
    let mut storage = Storage {
        mount_point: shm_path(),
        options,
        ..Storage::default()
    };
    storage.set_tmpfs(TmpfsStorage {
        size_bytes: SHM_BYTES,
        mode: 0o1777,
        ..TmpfsStorage::default()
    });
    storage
}

fn shm_path() -> String {
    format!("{}/shm", path::SANDBOX)
}

/// Binds of the pod's own files that a container lacks, where containerd does
/// not write them: destination and the guest's path.
pub fn pod_binds(mounts: &[Mount]) -> Vec<(&'static str, String)> {
    let file = |name: &str| format!("{}/{name}", path::SANDBOX);
    [
        ("/etc/resolv.conf", file("resolv.conf")),
        ("/etc/hosts", file("hosts")),
        ("/etc/hostname", file("hostname")),
        ("/dev/shm", shm_path()),
    ]
    .into_iter()
    .filter(|(destination, _)| {
        !mounts
            .iter()
            .any(|mount| mount.destination == Path::new(destination))
    })
    .collect()
}

/// Brings the volumes into the tree, those that are devices to `devices` and those
/// of which the guest gets a copy to `mirrors`;
/// the guest's paths of those mounts that have one. `pod_uid` is the pod's as
/// Kubernetes names it. Blocks.
///
/// # Errors
/// A source is not there or not for a guest, or the kernel refuses.
pub fn mount_volumes(
    tree: &mut ContainerTree,
    devices: &mut Devices,
    mirrors: &mut Vec<MirrorUse>,
    mounts: &[Mount],
    pod_uid: Option<&str>,
) -> Result<BTreeMap<usize, String>, VolumeError> {
    let mut sources = BTreeMap::new();
    for (index, mount) in mounts.iter().enumerate() {
        match VolumePlan::new(mount) {
            VolumePlan::Guest => {}
            VolumePlan::Shm => {
                sources.insert(index, shm_path());
            }
            VolumePlan::Tree {
                source,
                options,
                read_only,
            } => {
                let mapped = mount.id_maps();
                if read_only != ReadOnly::No && mirror::is_watched(&source) {
                    let shared = tree.tree().mirrors().share(&source, mapped.clone());
                    let shared = shared.map_err(|error| source_error(mount, &source, error))?;
                    if let Some(shared) = shared {
                        sources.insert(index, shared.guest_path());
                        mirrors.push(shared);
                        continue;
                    }
                }
                let volumes = tree.tree().volumes();
                let below = volumes.mounts_below(&source, options);
                let below = below.map_err(|error| source_error(mount, &source, error))?;
                let fail = |error| source_error(mount, &source, error);
                let mut copy = MountCopy::new(&source, options).map_err(fail)?;
                let kind = copy.file_type().map_err(fail)?;
                if kind.is_block_device() {
                    let number = copy.device_number().map_err(fail)?;
                    let path = devices.mount_block(&mount.destination, number)?;
                    sources.insert(index, path);
                    continue;
                }
                if kind.is_char_device() {
                    let number = copy.device_number().map_err(fail)?;
                    let path = devices.mount_character(number);
                    let path = path.ok_or_else(|| VolumeError::Device {
                        destination: mount.destination.clone(),
                        path: source.clone(),
                    })?;
                    sources.insert(index, path);
                    continue;
                }
                let (file_system, top) = copy.stat().map_err(fail)?;
                let huge_pages = huge_pages::storage(&file_system, &top, mapped.as_ref());
                if let Some(storage) = huge_pages.filter(|_| kind.is_dir()) {
                    sources.insert(index, devices.mount_in_guest(storage));
                    continue;
                }
                if let Some(maps) = mapped {
                    let namespace = maps.namespace().map_err(fail)?;
                    let recursive = mount.has_any(&["ridmap"]);
                    copy.map_ids(&namespace, recursive).map_err(fail)?;
                }
                let of_pod = pod_uid.is_some_and(|uid| is_empty_dir(&source, uid));
                let shared = volumes.share(copy, below, read_only, of_pod)?;
                sources.insert(index, shared.guest_path());
                tree.keep_volume(shared);
            }
        }
    }
    Ok(sources)
}

fn source_error(mount: &Mount, path: &Path, source: io::Error) -> VolumeError {
    VolumeError::Source {
        destination: mount.destination.clone(),
        path: path.to_owned(),
        source,
    }
}

/// The source is an emptyDir of the pod, as the kubelet lays them out:
/// `pods/<uid>/volumes/kubernetes.io~empty-dir/<name>`.
fn is_empty_dir(source: &Path, pod_uid: &str) -> bool {
    let parts: Vec<_> = source.components().map(Component::as_os_str).collect();
    let plain = !source
        .components()
        .any(|part| matches!(part, Component::ParentDir));
    plain
        && !pod_uid.is_empty()
        && parts
            .windows(4)
            .any(|parts| parts[..] == ["pods", pod_uid, "volumes", "kubernetes.io~empty-dir"])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_mount::own_namespace;
    use crate::id::Id;
    use crate::shared_tree::SharedTree;

    fn mount(kind: &str, source: &str, destination: &str, options: &[&str]) -> Mount {
        Mount {
            destination: destination.into(),
            kind: (!kind.is_empty()).then(|| kind.to_owned()),
            source: Some(source.into()),
            options: Some(options.iter().map(|&o| o.to_owned()).collect()),
            users: None,
            groups: None,
        }
    }

    #[test]
    fn leaves_the_kernels_own_to_the_guest() {
        for (kind, destination) in [
            ("proc", "/proc"),
            ("sysfs", "/sys"),
            ("tmpfs", "/dev"),
            ("devpts", "/dev/pts"),
            ("mqueue", "/dev/mqueue"),
            ("cgroup", "/sys/fs/cgroup"),
            ("tmpfs", "/dev/shm"),
        ] {
            let plan = VolumePlan::new(&mount(kind, kind, destination, &["nosuid"]));
            assert_eq!(plan, VolumePlan::Guest, "{destination}");
        }
    }

    #[test]
    fn shares_binds() {
        let read_only = mount("", "/srv", "/v", &["rbind", "ro"]);
        let expected = VolumePlan::Tree {
            source: "/srv".into(),
            options: CopyOptions {
                recursive: true,
                follows: false,
            },
            read_only: ReadOnly::Top,
        };
        assert_eq!(VolumePlan::new(&read_only), expected);
        let shm = mount("bind", "/run/containerd/x/shm", "/dev/shm", &["rbind"]);
        assert_eq!(VolumePlan::new(&shm), VolumePlan::Shm);
        let volume = mount("bind", "/var/lib/volume", "/dev/shm", &["rbind"]);
        assert!(matches!(VolumePlan::new(&volume), VolumePlan::Tree { .. }));
    }

    #[test]
    fn adds_only_what_is_not_mounted() {
        let hosts = mount("bind", "/h", "/etc/hosts", &["rbind"]);
        let added: Vec<_> = pod_binds(&[hosts]).into_iter().map(|(to, _)| to).collect();
        assert_eq!(added, ["/etc/resolv.conf", "/etc/hostname", "/dev/shm"]);
    }

    #[test]
    fn names_a_volume_it_cannot_have() {
        if !own_namespace() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let id = Id::new("container", "c").unwrap();
        let mut tree = ContainerTree::create(&SharedTree::pretended(dir.path()), &id).unwrap();
        let mut devices = devices(dir.path());
        let missing = mount("bind", "/no/such", "/v", &["rbind"]);
        let error =
            mount_volumes(&mut tree, &mut devices, &mut Vec::new(), &[missing], None).unwrap_err();
        assert_eq!(error.code(), Code::NOT_FOUND);
        assert!(error.to_string().contains("/no/such"), "{error}");
    }

    /// Of a container whose spec says nothing of devices.
    fn devices(dir: &Path) -> Devices {
        std::fs::write(dir.join("config.json"), "{}").unwrap();
        let bundle = crate::bundle::Bundle::load(dir).unwrap();
        let id = Id::new("container", "c").unwrap();
        let groups = std::sync::Arc::new(crate::vfio::PodGroups::new(false));
        Devices::open(&id, &bundle, &Default::default(), &groups).unwrap()
    }

    #[test]
    fn a_device_node_is_one_of_the_guest() {
        if !own_namespace() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let id = Id::new("container", "c").unwrap();
        let mut tree = ContainerTree::create(&SharedTree::pretended(dir.path()), &id).unwrap();
        let mut devices = devices(dir.path());
        let block = dir.path().join("block");
        let unknown = dir.path().join("unknown");
        for (path, kind) in [
            (&block, rustix::fs::FileType::BlockDevice),
            (&unknown, rustix::fs::FileType::CharacterDevice),
        ] {
            let number = rustix::fs::makedev(4000, 1);
            let mode = rustix::fs::Mode::RUSR;
            rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, number).unwrap();
        }
        let bind = |source: &Path| mount("bind", source.to_str().unwrap(), "/v", &["bind"]);
        let mounts = [bind(Path::new("/dev/null")), bind(&block)];
        let sources =
            mount_volumes(&mut tree, &mut devices, &mut Vec::new(), &mounts, None).unwrap();
        assert_eq!(sources[&0], "/dev/null");
        assert_eq!(sources[&1], "/run/husk/containers/c/devices/0");
        let error = mount_volumes(
            &mut tree,
            &mut devices,
            &mut Vec::new(),
            &[bind(&unknown)],
            None,
        )
        .unwrap_err();
        assert!(matches!(error, VolumeError::Device { .. }), "{error}");
        // Nobody may read the block device, so no disk is plugged for it.
        let (guest, disks, _) = devices.finish();
        assert!(disks.is_empty() && guest.numbers.is_empty());
        assert_eq!(guest.storages.len(), 1);
        assert_eq!(guest.storages[0].block().serial, "");
    }

    #[test]
    fn huge_pages_are_the_guests() {
        if !own_namespace() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let id = Id::new("container", "c").unwrap();
        let mut tree = ContainerTree::create(&SharedTree::pretended(dir.path()), &id).unwrap();
        let mut devices = devices(dir.path());
        let pages = dir.path().join("pages");
        std::fs::create_dir(&pages).unwrap();
        if !huge_pages::tests::mount(&pages, "pagesize=2M") {
            println!("SKIPPED: no huge pages here");
            return;
        }
        let bind = |at| mount("bind", pages.to_str().unwrap(), at, &["rbind", "ro"]);
        let mounts = [bind("/hugepages"), bind("/again")];
        let sources =
            mount_volumes(&mut tree, &mut devices, &mut Vec::new(), &mounts, None).unwrap();
        let place = &sources[&0];
        assert!(
            place.starts_with("/run/husk/sandbox/huge-pages/"),
            "{place}"
        );
        assert_eq!(&sources[&1], place);
        let (guest, disks, _) = devices.finish();
        assert!(disks.is_empty());
        let mounted: Vec<_> = guest.storages.iter().map(|one| &one.mount_point).collect();
        assert_eq!(mounted, [place], "one for both");
    }

    #[test]
    fn knows_the_pods_own_empty_directories() {
        let of_pod = "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/cache";
        assert!(is_empty_dir(Path::new(of_pod), "u1"));
        assert!(!is_empty_dir(Path::new(of_pod), "u2"));
        assert!(!is_empty_dir(Path::new(of_pod), ""));
        assert!(!is_empty_dir(&Path::new(of_pod).join("../../secret"), "u1"));
        let secret = "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~secret/key";
        assert!(!is_empty_dir(Path::new(secret), "u1"));
    }
}
