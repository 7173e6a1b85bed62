//! Content of files, through a mount of the server.

#![allow(clippy::unwrap_used)]

mod harness;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::time::{Duration, SystemTime};

use harness::everywhere;

#[test]
fn files_keep_their_content() {
    everywhere(|mount| {
        let path = mount.guest.join("file");
        fs::write(&path, "hello").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"hello");
        assert_eq!(fs::read(mount.host.join("file")).unwrap(), b"hello");
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b", world").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "hello, world");
        let big: Vec<u8> = (0..5_000_003u32).map(|i| (i % 251) as u8).collect();
        fs::write(&path, &big).unwrap();
        assert!(fs::read(&path).unwrap() == big);
        assert!(fs::read(mount.host.join("file")).unwrap() == big);
        let mut tail = [0; 10];
        let file = File::open(&path).unwrap();
        assert_eq!(file.read_at(&mut tail, 5_000_000).unwrap(), 3);
        assert_eq!(file.read_at(&mut tail, 6_000_000).unwrap(), 0);
        fs::remove_file(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(!mount.host.join("file").exists());
    });
}

#[test]
fn appending_goes_to_the_end() {
    everywhere(|mount| {
        let path = mount.guest.join("log");
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .unwrap();
        file.write_all(b"one ").unwrap();
        // Another writer, whom the guest's kernel does not see.
        let mut other = File::options()
            .append(true)
            .open(mount.host.join("log"))
            .unwrap();
        other.write_all(b"two ").unwrap();
        file.write_all(b"three ").unwrap();
        // The flag may come and go.
        set_status_flags(&file, 0);
        file.write_all_at(b"ONE", 0).unwrap();
        set_status_flags(&file, libc::O_APPEND);
        file.write_all(b"four").unwrap();
        let text = fs::read_to_string(mount.host.join("log")).unwrap();
        assert_eq!(text, "ONE two three four");
    });
}

fn set_status_flags(file: &File, flags: libc::c_int) {
    // SAFETY: the call takes integers.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) };
    assert_eq!(result, 0);
}

#[test]
fn truncation_and_holes() {
    everywhere(|mount| {
        let path = mount.guest.join("sparse");
        let mut file = File::create_new(&path).unwrap();
        assert_eq!(
            File::create_new(&path).unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        file.write_all_at(b"end", 10 << 20).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), (10 << 20) + 3);
        assert!(metadata.blocks() * 512 < 1 << 20, "{}", metadata.blocks());
        let seek = |to, whence| {
            // SAFETY: the call takes integers.
            unsafe { libc::lseek(file.as_raw_fd(), to, whence) }
        };
        assert_eq!(seek(0, libc::SEEK_HOLE), 0);
        assert_eq!(seek(0, libc::SEEK_DATA), 10 << 20);
        assert_eq!(seek(20 << 20, libc::SEEK_DATA), -1);
        // SAFETY: the call takes integers.
        let punched = unsafe {
            libc::fallocate(
                file.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                10 << 20,
                2,
            )
        };
        assert_eq!(punched, 0);
        let mut end = [1; 4];
        assert_eq!(file.read_at(&mut end, 10 << 20).unwrap(), 3);
        assert_eq!(&end[..3], b"\0\0d");

        file.set_len(5).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [0; 5]);
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(b"abc").unwrap();
        drop(
            File::options()
                .write(true)
                .truncate(true)
                .open(&path)
                .unwrap(),
        );
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        // SAFETY: the path is a C string for the call.
        let truncated = unsafe {
            let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
            libc::truncate(path.as_ptr(), 77)
        };
        assert_eq!(truncated, 0);
        assert_eq!(fs::metadata(mount.host.join("sparse")).unwrap().len(), 77);
    });
}

#[test]
fn shared_mappings_reach_the_file() {
    everywhere(|mount| {
        let path = mount.guest.join("mapped");
        fs::write(&path, vec![b'.'; 3 * 4096]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        // SAFETY: a fresh mapping of 12 KiB, used within its bounds only.
        unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                3 * 4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            let bytes = at.cast::<u8>();
            assert_eq!(bytes.add(5000).read(), b'.');
            bytes.add(5000).write(b'!');
            assert_eq!(libc::msync(at, 3 * 4096, libc::MS_SYNC), 0);
            assert_eq!(libc::munmap(at, 3 * 4096), 0);
        }
        assert_eq!(fs::read(mount.host.join("mapped")).unwrap()[5000], b'!');
    });
}

#[test]
fn direct_and_synchronous_io() {
    everywhere(|mount| {
        let path = mount.guest.join("direct");
        for flags in [
            libc::O_DIRECT,
            libc::O_SYNC,
            libc::O_DSYNC,
            libc::O_DIRECT | libc::O_SYNC,
        ] {
            let mut file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .custom_flags(flags)
                .open(&path)
                .unwrap();
            // Aligned for the guest's kernel.
            let mut buffer = vec![0u8; 3 * 4096];
            let start = buffer.as_ptr().align_offset(4096);
            let page = &mut buffer[start..start + 8192];
            page.fill(flags as u8 | 1);
            file.write_all(page).unwrap();
            file.sync_all().unwrap();
            file.sync_data().unwrap();
            page.fill(0);
            assert_eq!(file.read_at(page, 0).unwrap(), 8192);
            assert!(page.iter().all(|byte| *byte == flags as u8 | 1));
        }
        File::open(&mount.guest).unwrap().sync_all().unwrap();
    });
}

#[test]
fn unlinked_files_live_while_open() {
    everywhere(|mount| {
        let path = mount.guest.join("gone");
        fs::write(&path, "still here").unwrap();
        let mut file = File::options().read(true).write(true).open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        // Others take the room of its reference.
        for index in 0..20 {
            fs::write(mount.guest.join(format!("other-{index}")), "x").unwrap();
        }
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "still here");
        file.write_all(b"!").unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.nlink()), (11, 0));
        file.set_len(3).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3);
    });
}

#[test]
fn files_without_a_name() {
    everywhere(|mount| {
        let open = |flags| {
            File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_TMPFILE | flags)
                .open(&mount.guest)
        };
        let mut file = open(0).unwrap();
        file.write_all(b"anonymous").unwrap();
        for index in 0..20 {
            fs::write(mount.guest.join(format!("other-{index}")), "x").unwrap();
        }
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        let link = |file: &File| {
            let from = format!("/proc/self/fd/{}", file.as_raw_fd());
            let to = mount.guest.join("named");
            let follow = rustix::fs::AtFlags::SYMLINK_FOLLOW;
            rustix::fs::linkat(rustix::fs::CWD, from, rustix::fs::CWD, to, follow)
        };
        link(&file).unwrap();
        assert_eq!(fs::read(mount.host.join("named")).unwrap(), b"anonymous");
        assert!(link(&open(libc::O_EXCL).unwrap()).is_err());
    });
}

#[test]
fn copies_within_the_server() {
    everywhere(|mount| {
        let from = mount.guest.join("from");
        let to = mount.guest.join("to");
        let big: Vec<u8> = (0..3_000_000u32).map(|i| (i % 241) as u8).collect();
        fs::write(&from, &big).unwrap();
        // Uses copy_file_range.
        assert_eq!(fs::copy(&from, &to).unwrap(), 3_000_000);
        assert!(fs::read(&to).unwrap() == big);
    });
}

#[test]
fn locks_hold_within_the_guest() {
    everywhere(|mount| {
        let path = mount.guest.join("lock");
        let first = File::create(&path).unwrap();
        let second = File::open(&path).unwrap();
        first.lock().unwrap();
        assert!(second.try_lock().is_err());
        first.unlock().unwrap();
        second.try_lock().unwrap();
    });
}

#[test]
fn times_are_kept() {
    everywhere(|mount| {
        let path = mount.guest.join("timed");
        let file = File::create(&path).unwrap();
        let before = SystemTime::UNIX_EPOCH - Duration::new(1000, 5);
        let after = SystemTime::UNIX_EPOCH + Duration::new(1 << 32, 999_999_999);
        file.set_times(
            fs::FileTimes::new()
                .set_accessed(before)
                .set_modified(after),
        )
        .unwrap();
        for path in [&path, &mount.host.join("timed")] {
            let metadata = fs::metadata(path).unwrap();
            assert_eq!(metadata.accessed().unwrap(), before);
            assert_eq!(metadata.modified().unwrap(), after);
        }
        rustix::fs::utimensat(
            rustix::fs::CWD,
            &path,
            &rustix::fs::Timestamps {
                last_access: rustix::fs::Timespec {
                    tv_sec: 0,
                    tv_nsec: rustix::fs::UTIME_OMIT,
                },
                last_modification: rustix::fs::Timespec {
                    tv_sec: 0,
                    tv_nsec: rustix::fs::UTIME_NOW,
                },
            },
            rustix::fs::AtFlags::empty(),
        )
        .unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.accessed().unwrap(), before);
        let age = metadata.modified().unwrap().elapsed().unwrap_or_default();
        assert!(age < Duration::from_mins(1));
        let created = metadata.created().unwrap();
        assert_eq!(
            created,
            fs::metadata(mount.host.join("timed"))
                .unwrap()
                .created()
                .unwrap()
        );
    });
}

#[test]
fn changes_on_the_host_show_in_volumes() {
    everywhere(|mount| {
        if mount.is_own {
            return;
        }
        // As the kubelet updates a ConfigMap.
        let host = &mount.host;
        let publish = |version: &str| {
            fs::create_dir(host.join(version)).unwrap();
            fs::write(host.join(version).join("key"), version).unwrap();
            std::os::unix::fs::symlink(version, host.join("..tmp")).unwrap();
            fs::rename(host.join("..tmp"), host.join("..data")).unwrap();
        };
        publish("v1");
        std::os::unix::fs::symlink("..data/key", host.join("key")).unwrap();
        fs::write(host.join("plain"), "short").unwrap();
        assert_eq!(fs::read_to_string(mount.guest.join("key")).unwrap(), "v1");
        assert_eq!(
            fs::read_to_string(mount.guest.join("plain")).unwrap(),
            "short"
        );
        assert!(!mount.guest.join("late").exists());
        publish("version-2");
        fs::write(host.join("plain"), "a longer text").unwrap();
        fs::write(host.join("late"), "").unwrap();
        std::thread::sleep(Duration::from_millis(1100));
        assert_eq!(
            fs::read_to_string(mount.guest.join("key")).unwrap(),
            "version-2"
        );
        assert_eq!(
            fs::read_to_string(mount.guest.join("plain")).unwrap(),
            "a longer text"
        );
        assert!(mount.guest.join("late").exists());
        fs::remove_file(host.join("plain")).unwrap();
        std::thread::sleep(Duration::from_millis(1100));
        assert!(!mount.guest.join("plain").exists());
    });
}

#[test]
fn the_kernels_own_files_are_read_whole() {
    everywhere(|mount| {
        if mount.is_own {
            return;
        }
        rustix::mount::mount_bind_recursive("/proc", &mount.host).unwrap();
        std::thread::sleep(Duration::from_millis(1100));
        let version = fs::read_to_string(mount.guest.join("version")).unwrap();
        assert_eq!(version, fs::read_to_string("/proc/version").unwrap());
        let text = fs::read_to_string(mount.guest.join("cpuinfo")).unwrap();
        assert!(text.contains("processor\t: 0"));
        // A magic link is a link like any other and leads nowhere here.
        let link = mount.guest.join("1/root");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    });
}

#[test]
fn files_of_lower_layers_are_copied_up() {
    let Some(mount) = harness::Mount::new(2) else {
        return;
    };
    let dir = mount.guest(harness::OVERLAY);
    let path = dir.join("below/file");
    let before = fs::metadata(&path).unwrap();
    let mut reader = File::open(&path).unwrap();
    File::options()
        .append(true)
        .open(&path)
        .unwrap()
        .write_all(b", changed")
        .unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "from below, changed");
    let after = fs::metadata(&path).unwrap();
    assert_eq!((before.ino(), before.dev()), (after.ino(), after.dev()));
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("from below"));
    fs::rename(&path, dir.join("file")).unwrap();
    assert!(!path.exists());
    fs::remove_dir(dir.join("below")).unwrap();
    fs::create_dir(dir.join("below")).unwrap();
    assert_eq!(fs::read_dir(dir.join("below")).unwrap().count(), 0);
    assert_eq!(
        fs::read_to_string(dir.join("file")).unwrap(),
        "from below, changed"
    );
}
