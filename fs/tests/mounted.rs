//! Real file operations through a mount of the server.

mod harness;

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use harness::Mount;

/// Runs a test in both areas, with room for all references and for almost none.
fn everywhere(test: impl Fn(&Mount, &Path, &Path)) {
    for budget in [1000, 2] {
        for area in ["web/rootfs", "web/mounts/0"] {
            let Some(mount) = Mount::new(budget) else {
                return;
            };
            test(&mount, &mount.guest(area), &mount.host(area));
        }
    }
}

#[test]
fn files_keep_their_content() {
    everywhere(|_, dir, host| {
        let path = dir.join("file");
        fs::write(&path, "hello").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"hello");
        assert_eq!(fs::read(host.join("file")).unwrap(), b"hello");
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b", world").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "hello, world");
        let big: Vec<u8> = (0..5_000_003u32).map(|i| (i % 251) as u8).collect();
        fs::write(&path, &big).unwrap();
        assert!(fs::read(&path).unwrap() == big);
        assert!(fs::read(host.join("file")).unwrap() == big);
        let mut tail = [0; 10];
        let file = File::open(&path).unwrap();
        assert_eq!(file.read_at(&mut tail, 5_000_000).unwrap(), 3);
        assert_eq!(file.read_at(&mut tail, 6_000_000).unwrap(), 0);
        fs::remove_file(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(!host.join("file").exists());
    });
}
