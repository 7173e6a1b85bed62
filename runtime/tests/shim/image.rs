//! What a machine boots from is what `SHA256SUMS` says, or nothing boots.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::time::Duration;

use husk_node::sums::{self, Hash, identity};
use husk_node::verified;
use serde_json::Value;
use ttrpc::Code;

use crate::Case;
use crate::case::{Node, block_on};
use crate::errors::expect;
use crate::lifecycle::{finish, kill, running};
use crate::template;

pub const CASES: &[Case] = &[
    ("image_that_was_changed_is_not_booted", changed),
    ("image_without_sums_is_not_booted", without_sums),
    ("image_is_hashed_once", hashed_once),
    (
        "image_is_hashed_again_where_the_record_is_no_use",
        no_record,
    ),
    ("image_that_was_changed_has_no_template", no_template),
];

/// So long after a change a file is one that may be remembered.
const SETTLED: Duration = Duration::from_millis(2200);

/// A pod, from its start to its end.
async fn pod(node: &Node, id: &str) {
    let (_, shim) = running(node, id, &["sleep"]).await;
    kill(&shim, id, "", 9).await.unwrap();
    shim.wait(id, "").await.unwrap();
    finish(node, &shim, id).await;
}

/// A pod that is refused in these words.
async fn refused(node: &Node, words: &str) {
    expect(node, &node.bundle("r", &["sleep"]), Code::UNKNOWN, words).await;
}

/// Changes one byte of a file and nothing else that can be set.
fn flip(node: &Node, name: &str) {
    let path = node.path("image").join(name);
    let file = fs::File::options().read(true).write(true).open(path);
    let file = file.unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 3).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 3).unwrap();
    file.set_modified(modified).unwrap();
}

fn hash(node: &Node, name: &str) -> Hash {
    let file = fs::File::open(node.path("image").join(name)).unwrap();
    Hash::of(&file).unwrap().0
}

fn record(node: &Node) -> String {
    let record = node.path("templates").join(verified::FILE);
    fs::read_to_string(record).unwrap_or_default()
}

/// Which file the record is: another each time that it is written.
fn record_inode(node: &Node) -> u64 {
    let record = node.path("templates").join(verified::FILE);
    fs::metadata(record).unwrap().ino()
}

fn changed() {
    block_on(async {
        let node = Node::new().await;
        pod(&node, "a").await;
        for name in ["initramfs.cpio", "vmlinux"] {
            let expected = hash(&node, name);
            flip(&node, name);
            let found = hash(&node, name);
            let image = node.path("image").display().to_string();
            let words = format!(
                "{image}/{name} is not booted, as its sha256 is {found} and in {image}/{} {expected}; \
                 install the package again",
                sums::FILE
            );
            refused(&node, &words).await;
            assert!(!record(&node).contains(&found.to_string()));
            flip(&node, name);
            pod(&node, "b").await;
        }
    });
}

fn without_sums() {
    block_on(async {
        let node = Node::new().await;
        let sums = node.path("image").join(sums::FILE);
        let said = fs::read_to_string(&sums).unwrap();
        fs::remove_file(&sums).unwrap();
        let path = sums.display().to_string();
        let words = format!(
            "as there is no {path}; for a file of your own, `sha256sum vmlinux > SHA256SUMS`"
        );
        refused(&node, &words).await;
        let half: Vec<_> = said
            .lines()
            .filter(|line| line.contains("vmlinux"))
            .collect();
        fs::write(&sums, half.concat()).unwrap();
        let words = format!(
            "{path} has no line for it; for a file of your own, add its line (sha256sum initramfs.cpio"
        );
        refused(&node, &words).await;
        fs::write(&sums, "").unwrap();
        refused(&node, "vmlinux is not booted").await;
        fs::remove_file(&sums).unwrap();
        fs::create_dir(&sums).unwrap();
        refused(&node, "SHA256SUMS could not be read: Is a directory").await;
        fs::remove_dir(&sums).unwrap();
        // A pipe has no end, and no size.
        fs::write(&sums, said.replace("vmlinux", "pipe")).unwrap();
        node.configure("kernel = '/dev/zero'\n");
        refused(
            &node,
            "/dev/zero is not booted, as there is no /dev/SHA256SUMS",
        )
        .await;
        fs::write(&sums, said).unwrap();
        node.configure("");
        pod(&node, "a").await;
    });
}

fn hashed_once() {
    block_on(async {
        let node = Node::new().await;
        pod(&node, "a").await;
        assert_eq!(record(&node), "", "they might still be changed unseen");
        tokio::time::sleep(SETTLED).await;
        pod(&node, "b").await;
        for name in ["vmlinux", "initramfs.cpio"] {
            let file = fs::metadata(node.path("image").join(name)).unwrap();
            let line = format!("{} {}\n", hash(&node, name), identity(&file));
            assert!(record(&node).contains(&line), "{}", record(&node));
        }
        let before = record_inode(&node);
        pod(&node, "c").await;
        assert_eq!(record_inode(&node), before);

        // It is what is read, and root's word is taken for it; not for what was
        // changed since.
        let kernel = node.path("image/vmlinux");
        let right = hash(&node, "vmlinux");
        flip(&node, "vmlinux");
        refused(&node, "vmlinux is not booted").await;
        tokio::time::sleep(SETTLED).await;
        refused(&node, "vmlinux is not booted").await;
        let file = fs::metadata(&kernel).unwrap();
        let path = node.path("templates").join(verified::FILE);
        let forged = format!("{right} {}\n", identity(&file));
        fs::write(&path, record(&node) + &forged).unwrap();
        pod(&node, "d").await;
        // Others' word is not.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        refused(&node, "vmlinux is not booted").await;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(&path, Some(1), None).unwrap();
        refused(&node, "vmlinux is not booted").await;
    });
}

fn no_record() {
    block_on(async {
        let node = Node::new().await;
        tokio::time::sleep(SETTLED).await;
        pod(&node, "a").await;
        let whole = record(&node);
        assert_eq!(whole.lines().count(), 2, "{whole}");
        let path = node.path("templates").join(verified::FILE);
        let wrong = whole.replace(&hash(&node, "vmlinux").to_string(), &"0".repeat(64));
        for garbage in [
            b"\xff\xff\xff".to_vec(),
            b"nonsense\n\n0 0 0\n".to_vec(),
            whole.as_bytes()[..100].to_vec(),
            wrong.into_bytes(),
        ] {
            fs::write(&path, &garbage).unwrap();
            pod(&node, "b").await;
            let again = record(&node);
            let is_right = |line: &&str| whole.lines().any(|right| right == *line);
            assert_eq!(again.lines().filter(is_right).count(), 2, "{again}");
        }
        // None can be written, and none is missed.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        pod(&node, "c").await;
        fs::remove_dir(&path).unwrap();
        let dir = node.path("templates");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        pod(&node, "d").await;
        assert_eq!(record(&node), "");
    });
}

/// A pod that could begin as a copy must not where it could not boot.
fn no_template() {
    block_on(async {
        let node = Node::new().await;
        template::configure(&node, "");
        pod(&node, "a").await;
        template::made(&node).await;
        let (_, shim) = running(&node, "b", &["sleep"]).await;
        let file = node.state_dir().join("test/b/state.json");
        let state: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        assert_eq!(state["machine"]["from_template"], true);
        kill(&shim, "b", "", 9).await.unwrap();
        shim.wait("b", "").await.unwrap();
        finish(&node, &shim, "b").await;
        flip(&node, "initramfs.cpio");
        refused(&node, "initramfs.cpio is not booted").await;
        // And none is made of that.
        let maker = node.shim(&["template", "512"], &node.path(""), b"");
        let said = String::from_utf8_lossy(&maker.stderr).into_owned();
        assert!(
            !maker.status.success() && said.contains("initramfs.cpio is not booted"),
            "{said}"
        );
        fs::remove_file(node.path("image").join(sums::FILE)).unwrap();
        refused(&node, "as there is no").await;
    });
}
