//! Overlays whose layers appear with other owners than they are stored with: of
//! pods with users of their own. What is stored in the upper layer has the mapped
//! owners already.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change,
    move_mount, open_tree,
};
use rustix::thread::UnshareFlags;

use crate::host_mount::apart;
use crate::id_map::{IdMaps, UserNamespace};
use crate::lower_layers;
use crate::mount_copy::{CopyOptions, MountCopy};

/// Where layers are mounted for the moment. Nothing that is needed meanwhile lies
/// below it.
const PLACE: &str = "/sys";

/// Name of the overlay there; those of layers are numbers.
const MERGED: &str = "merged";

/// Mounts an overlay at `target`. Of `data`, the options of the file system, the
/// lower layers are shown by `maps`.
///
/// # Errors
/// The kernel refuses, or a layer's file system can not be shown so.
pub fn attach(
    source: &Path,
    target: &Path,
    flags: MountFlags,
    data: &[String],
    maps: &IdMaps,
) -> io::Result<()> {
    let namespace = maps.namespace()?;
    // The kernel wants layers that are mounted in the namespace of whoever mounts
    // the overlay. In one of its own nobody sees them, and they go with it.
    let tree = apart(UnshareFlags::NEWNS | UnshareFlags::FS, || {
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private)?;
        build(source, flags, data, &namespace)
    })?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
        // For a descriptor's name in /proc.
        | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    Ok(move_mount(&tree, c"", CWD, target, flags)?)
}

fn build(
    source: &Path,
    flags: MountFlags,
    data: &[String],
    namespace: &UserNamespace,
) -> io::Result<OwnedFd> {
    let place = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let mut copies = Vec::new();
    for layer in layers(data)? {
        let mut copy = MountCopy::new(layer, CopyOptions::default())?;
        copy.map_ids(namespace, false)?;
        copies.push(copy);
    }
    mount("husk", PLACE, "tmpfs", place, c"mode=0700,size=1m")?;
    rustix::process::chdir(PLACE)?;
    fs::create_dir(MERGED)?;
    let mut names = Vec::new();
    for (number, copy) in copies.into_iter().enumerate() {
        let name = number.to_string();
        fs::create_dir(&name)?;
        copy.attach(Path::new(&name))?;
        names.push(name);
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let options = CString::new(lower_layers::replaced(data, &names))?;
    mount(source, MERGED, "overlay", flags, options.as_c_str())?;
    let copy = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(CWD, MERGED, copy)?)
}

/// The paths of lower layers, topmost first.
fn layers(data: &[String]) -> io::Result<Vec<&Path>> {
    lower_layers::plain(data).ok_or_else(|| {
        let lower = lower_layers::given(data).unwrap_or_default();
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("mapped owners need plain lower layers, not {lower:?}"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_mount::{HostMount, own_namespace};
    use std::os::unix::fs::{MetadataExt, chown};

    const MAPS: [&str; 2] = ["uidmap=0:100000:65536", "gidmap=0:200000:65536"];

    #[test]
    fn layers_appear_with_the_owners_that_the_maps_say() {
        if !own_namespace() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let [one, two, upper, work, target] = ["1", "2", "upper", "work", "target"].map(|name| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        });
        fs::write(one.join("a"), "").unwrap();
        fs::write(two.join("b"), "text").unwrap();
        chown(two.join("b"), Some(5), Some(6)).unwrap();
        chown(&upper, Some(100_000), Some(200_000)).unwrap();
        let count = || {
            let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            table.lines().count()
        };
        let before = count();
        let path = |path: &Path| path.display().to_string();
        let mut options = vec![
            format!("workdir={}", path(&work)),
            format!("upperdir={}", path(&upper)),
            format!("lowerdir={}:{}", path(&one), path(&two)),
        ];
        options.extend(MAPS.map(str::to_owned));
        let overlay = HostMount::new("overlay", "overlay".as_ref(), &target, &options).unwrap();
        assert_eq!(count(), before + 1);
        let owner = |name: &str| {
            let metadata = fs::metadata(target.join(name)).unwrap();
            (metadata.uid(), metadata.gid())
        };
        assert_eq!(owner("a"), (100_000, 200_000));
        assert_eq!(owner("b"), (100_005, 200_006));
        assert_eq!(owner("."), (100_000, 200_000));
        // Copied up as it appears.
        fs::write(target.join("b"), "more").unwrap();
        let copied = fs::metadata(upper.join("b")).unwrap();
        assert_eq!((copied.uid(), copied.gid()), (100_005, 200_006));
        drop(overlay);
        assert_eq!(fs::metadata(two.join("b")).unwrap().uid(), 5);

        // A bind, as of an image with one layer.
        let mut options: Vec<String> = vec!["rbind".into(), "ro".into()];
        options.extend(MAPS.map(str::to_owned));
        let bind = HostMount::new("bind", &two, &target, &options).unwrap();
        assert_eq!(owner("b"), (100_005, 200_006));
        drop(bind);
        let error = HostMount::new("tmpfs", "t".as_ref(), &target, &options[2..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn takes_plain_layers_alone() {
        let read = |option: &str| layers(&[option.to_owned()]).map(|layers| layers.len());
        assert_eq!(read("lowerdir=/a:/b").unwrap(), 2);
        for wrong in [
            "lowerdir=/a::/b",
            "lowerdir=a",
            "lowerdir=/a\\:b",
            "upperdir=/a",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
