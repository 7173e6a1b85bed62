use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};

use super::*;
use crate::host_mount;
use crate::shared_tree::SharedTree;

fn overlay(options: &[&str]) -> TreeMount {
    TreeMount {
        kind: "overlay".to_owned(),
        source: "overlay".into(),
        target: String::new(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
    }
}

fn table() -> BTreeMap<PathBuf, PathBuf> {
    images(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
         40 22 7:0 / /s/1/fs ro,relatime shared:20 - erofs /dev/loop0 ro,user_xattr,acl\n\
         41 22 0:50 / /s/2/fs ro,relatime - erofs /s/2/layer.erofs ro,user_xattr,cache_strategy=readaround\n\
         42 22 0:51 / /s/with\\040space/fs ro - erofs /s/with\\040space/layer.erofs ro\n\
         43 22 0:52 / /s/merged/fs ro - erofs /s/4/image ro,fsoffset=4096\n\
         44 22 7:0 /below /s/part/fs ro - erofs /dev/loop0 ro\n\
         45 22 7:1 / /s/covered/fs ro - erofs /dev/loop1 ro\n\
         46 45 0:53 / /s/covered/fs rw - tmpfs tmpfs rw\n\
         47 22 0:54 / /s/relative/fs ro - erofs none ro\n\
         torn line\n",
    )
}

#[test]
fn finds_images_that_are_mounted_as_they_are() {
    let expected = [
        ("/s/1/fs", "/dev/loop0"),
        ("/s/2/fs", "/s/2/layer.erofs"),
        ("/s/with space/fs", "/s/with space/layer.erofs"),
    ];
    let expected = expected.map(|(at, source)| (at.into(), source.into()));
    assert_eq!(table(), BTreeMap::from(expected));
}

#[test]
fn takes_an_overlay_apart() {
    let mount = overlay(&[
        "workdir=/s/9/work",
        "upperdir=/s/9/fs",
        "lowerdir=/s/2/fs:/s/1/fs",
        "index=off",
    ]);
    let layers = Layers::parse(&mount, &table()).unwrap();
    assert_eq!(
        layers.images,
        [Path::new("/s/2/layer.erofs"), Path::new("/dev/loop0")]
    );
    let id = Id::new("container", "c").unwrap();
    let serials = ["disk-4", "disk-2"].into_iter();
    let written = Some("/run/husk/shared/c/layers");
    let (storages, root) = layers.storages(serials, written, &id);
    assert_eq!(root, "/run/husk/containers/c/rootfs");
    let [first, second, last] = &storages[..] else {
        panic!("{storages:?}");
    };
    assert_eq!(first.block().serial, "disk-4");
    assert_eq!(first.block().fstype, "erofs");
    assert_eq!(
        (&first.options[..], &second.options[..]),
        (&["ro".to_owned()][..], &["ro".to_owned()][..])
    );
    assert_eq!(second.block().serial, "disk-2");
    assert_eq!(last.mount_point, root);
    assert_eq!(last.options, ["index=off"]);
    let made = last.overlay();
    assert_eq!(
        made.lower,
        [first.mount_point.clone(), second.mount_point.clone()]
    );
    assert_eq!(made.upper, "/run/husk/shared/c/layers/fs");
    assert_eq!(made.work, "/run/husk/shared/c/layers/work");

    // One that nobody writes to.
    let layers = Layers::parse(&overlay(&["lowerdir=/s/2/fs:/s/1/fs"]), &table()).unwrap();
    assert_eq!(layers.upper, None);
    let (storages, _) = layers.storages(["a", "b"].into_iter(), None, &id);
    assert_eq!(storages[2].overlay().upper, "");
}

#[test]
fn leaves_other_overlays_to_the_node() {
    for options in [
        &["upperdir=/s/9/fs", "workdir=/s/9/work"][..],
        &["lowerdir=/s/1/fs:/s/3/fs"],
        &["lowerdir=/s/1/fs:/s/merged/fs"],
        &["lowerdir=/s/part/fs"],
        &["lowerdir=/s/covered/fs"],
        &["lowerdir=/s/1/fs::/s/2/fs"],
        &["lowerdir=/s/1/fs", "lowerdir+=/s/2/fs"],
        &["lowerdir=/s/1/fs", "upperdir=/s/9/fs"],
        &[
            "lowerdir=/s/1/fs",
            "upperdir=/s/9/fs",
            "workdir=/other/work",
        ],
        &["lowerdir=/s/1/fs", "upperdir=/", "workdir=/"],
        &["lowerdir=/s/1/fs", "uidmap=0:100000:65536"],
    ] {
        assert_eq!(
            Layers::parse(&overlay(options), &table()),
            None,
            "{options:?}"
        );
    }
    let mut below = overlay(&["lowerdir=/s/1/fs"]);
    below.target = "/usr".to_owned();
    assert_eq!(Layers::find(&below), None);
    let many = ["/s/1/fs"; IMAGES_MOST + 1].join(":");
    assert_eq!(Layers::find(&overlay(&[&format!("lowerdir={many}")])), None);
}

#[test]
fn leaves_images_that_a_guest_could_not_mount_to_the_node() {
    let image = empty_image();
    let head = |at: usize, bytes: &[u8]| -> [u8; SUPER_BLOCK_BYTES] {
        let mut head: [u8; SUPER_BLOCK_BYTES] =
            image[1024..1024 + SUPER_BLOCK_BYTES].try_into().unwrap();
        head[at..at + bytes.len()].copy_from_slice(bytes);
        head
    };
    assert!(is_for_guest(&head(0, &[])));
    // LZ4, alone and with others; a distance in place of the algorithms' names.
    assert!(is_for_guest(&head(80, &[0x03, 0, 0, 0, 1, 0])));
    assert!(!is_for_guest(&head(80, &[0x03, 0, 0, 0, 3, 0])));
    assert!(is_for_guest(&head(80, &[0x01, 0, 0, 0, 0xff, 0xff])));
    // Not an image, one of several files, one of a newer kernel.
    assert!(!is_for_guest(&head(0, &[0])));
    assert!(!is_for_guest(&head(80, &[0x08, 0, 0, 0, 0, 0, 2, 0])));
    assert!(!is_for_guest(&head(80, &[0x80])));
}

/// An EROFS image of an empty directory (`fs/erofs/erofs_fs.h` of Linux).
fn empty_image() -> Vec<u8> {
    const ROOT: usize = 1024 + 128;
    let mut image = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    // The super block: magic, log2 of a block, the root's number, inodes, blocks.
    put(1024, &0xE0F5_E1E2_u32.to_le_bytes());
    put(1024 + 12, &[12]);
    put(1024 + 14, &u16::try_from(ROOT / 32).unwrap().to_le_bytes());
    put(1024 + 16, &1_u64.to_le_bytes());
    put(1024 + 36, &1_u32.to_le_bytes());
    // The root: a short inode with its data behind it; a directory, of 27 bytes.
    put(ROOT, &(2_u16 << 1).to_le_bytes());
    put(ROOT + 4, &0o40_755_u16.to_le_bytes());
    put(ROOT + 6, &2_u16.to_le_bytes());
    put(ROOT + 8, &27_u32.to_le_bytes());
    for (entry, name_at) in [(0, 24_u16), (1, 25)] {
        let at = ROOT + 32 + entry * 12;
        put(at, &u64::try_from(ROOT / 32).unwrap().to_le_bytes());
        put(at + 8, &name_at.to_le_bytes());
        put(at + 10, &[2]);
    }
    put(ROOT + 32 + 24, b"...");
    image
}

/// A snapshotter's directory of so many layers, mounted, and one to write to.
fn snapshots(dir: &Path, layers: usize) -> Option<TreeMount> {
    let mut lower = Vec::new();
    for number in 1..=layers {
        let snapshot = dir.join(number.to_string());
        fs::create_dir_all(snapshot.join("fs")).unwrap();
        let image = snapshot.join("layer.erofs");
        fs::write(&image, empty_image()).unwrap();
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "erofs", "-o", "ro,loop"]);
        let done = mount.arg(&image).arg(snapshot.join("fs")).output().unwrap();
        if !done.status.success() {
            println!("SKIPPED: {}", String::from_utf8_lossy(&done.stderr));
            return None;
        }
        lower.insert(0, snapshot.join("fs").display().to_string());
    }
    for name in ["fs", "work"] {
        fs::create_dir_all(dir.join("9").join(name)).unwrap();
    }
    fs::write(dir.join("9/fs/file"), "").unwrap();
    let option = |name: &str, path: &str| format!("{name}={}", dir.join(path).display());
    Some(overlay(&[
        &option("workdir", "9/work"),
        &option("upperdir", "9/fs"),
        &format!("lowerdir={}", lower.join(":")),
    ]))
}

#[tokio::test]
async fn shares_the_images_that_the_node_has_mounted() {
    if !host_mount::own_namespace() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(asked) = snapshots(dir.path(), 2) else {
        return;
    };
    let shared = SharedTree::create(&dir.path().join("pod/tree")).unwrap();
    let pod = Arc::new(PodDisks::default());
    let serials = |root: &LayeredRoot| -> Vec<_> {
        root.disks
            .iter()
            .map(|disk| disk.serial().to_owned())
            .collect()
    };
    let make = |id: &str| {
        let id = Id::new("container", id).unwrap();
        let mut tree = ContainerTree::create(&shared, &id).unwrap();
        let made = mount(&mut tree, std::slice::from_ref(&asked), &pod, &id);
        (tree, made.unwrap())
    };
    let (mut first, root) = make("a");
    let root = root.unwrap();
    assert_eq!(serials(&root), ["disk-1", "disk-2"]);
    assert_eq!(root.storages.len(), 3);
    // What the guest's overlay writes in is there, and nothing of the images.
    assert!(shared.path().join("a/layers/fs/file").exists());
    assert_eq!(first.give_up(), ["/run/husk/shared/a/layers"]);
    let (second, other) = make("b");
    assert_eq!(serials(&other.unwrap()), ["disk-1", "disk-2"]);
    drop((first, second));
    assert!(!shared.path().join("a").exists());
    assert!(dir.path().join("9/fs/file").exists());

    // Without room, or when an image has gone, the node mounts the root.
    let others: Vec<_> = (0..DISKS_MOST)
        .map(|_| pod.add(File::open("/dev/null").unwrap().into(), true))
        .collect();
    drop(root);
    assert!(make("c").1.is_none());
    drop(others);
    let (tree, root) = make("d");
    assert!(root.is_some());
    drop((tree, root));
    for layer in ["1", "2"] {
        unmount(dir.path().join(layer).join("fs"), UnmountFlags::DETACH).unwrap();
    }
    let (mut tree, none) = make("e");
    assert!(none.is_none());
    let merged = super::super::mount_tree(&mut tree, std::slice::from_ref(&asked)).unwrap();
    assert_eq!(merged, "/run/husk/shared/e/rootfs");
}
