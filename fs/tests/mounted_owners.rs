//! Owners, modes, access control lists and attributes, through a mount of the
//! server.

#![allow(clippy::unwrap_used)]

mod harness;

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{
    DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink,
};
use std::path::Path;

use harness::{Place, everywhere};
use rustix::fs::{FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

const USER: u32 = 1234;
const GROUP: u32 = 2345;
const OTHER_GROUP: u32 = 3456;

/// Runs as another user, on a thread of its own.
fn as_user<T: Send>(groups: &[u32], action: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let groups: Vec<_> = groups.iter().map(|id| Gid::from_raw(*id)).collect();
                let (user, group) = (Uid::from_raw(USER), Gid::from_raw(GROUP));
                rustix::thread::set_thread_groups(&groups).unwrap();
                rustix::thread::set_thread_res_gid(group, group, group).unwrap();
                rustix::thread::set_thread_res_uid(user, user, user).unwrap();
                action()
            })
            .join()
            .unwrap()
    })
}

/// Type, permissions, user and group as guest and host see them.
fn owner(place: &Place, name: &str) -> (u32, u32, u32) {
    let told = |path: &Path| {
        let metadata = fs::symlink_metadata(path).unwrap();
        (metadata.mode() & 0o7777, metadata.uid(), metadata.gid())
    };
    let guest = told(&place.guest.join(name));
    assert_eq!(guest, told(&place.host.join(name)), "{name}");
    guest
}

fn open_to_all(place: &Place, name: &str, mode: u32) {
    let path = place.guest.join(name);
    if !path.exists() {
        fs::create_dir(&path).unwrap();
    }
    fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn new_files_belong_to_their_maker() {
    everywhere(|place| {
        open_to_all(place, "", 0o777);
        let at = |name: &str| place.guest.join(name);
        as_user(&[], || {
            // The working directory and umask are shared by the test's threads
            // unless one asks for its own.
            // SAFETY: this thread has opened nothing.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }.unwrap();
            rustix::process::umask(Mode::from_raw_mode(0o027));
            File::create(at("file")).unwrap();
            fs::create_dir(at("dir")).unwrap();
            symlink("x", at("link")).unwrap();
            let fifo = FileType::Fifo;
            rustix::fs::mknodat(
                rustix::fs::CWD,
                at("fifo"),
                fifo,
                Mode::from_raw_mode(0o666),
                0,
            )
            .unwrap();
            let file = File::options()
                .write(true)
                .custom_flags(libc::O_TMPFILE)
                .mode(0o666)
                .open(at("dir"))
                .unwrap();
            let metadata = file.metadata().unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (USER, GROUP));
            assert_eq!(metadata.mode() & 0o7777, 0o640);
        });
        assert_eq!(owner(place, "file"), (0o640, USER, GROUP));
        assert_eq!(owner(place, "dir"), (0o750, USER, GROUP));
        assert_eq!(owner(place, "link"), (0o777, USER, GROUP));
        assert_eq!(owner(place, "fifo"), (0o640, USER, GROUP));
        // Back to root.
        fs::DirBuilder::new()
            .mode(0o700)
            .create(at("root"))
            .unwrap();
        assert_eq!(owner(place, "root"), (0o700, 0, 0));
    });
}

#[test]
fn permissions_are_the_guests_to_check() {
    everywhere(|place| {
        let at = |name: &str| place.guest.join(name);
        open_to_all(place, "", 0o777);
        fs::write(at("private"), "x").unwrap();
        fs::set_permissions(at("private"), Permissions::from_mode(0o600)).unwrap();
        fs::write(at("group"), "x").unwrap();
        fs::set_permissions(at("group"), Permissions::from_mode(0o660)).unwrap();
        chown(at("group"), Some(0), Some(OTHER_GROUP)).unwrap();
        open_to_all(place, "sticky", 0o1777);
        fs::write(at("sticky/root"), "x").unwrap();
        as_user(&[OTHER_GROUP], || {
            let denied = |result: std::io::Result<()>| {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
            };
            denied(fs::read(at("private")).map(|_| ()));
            denied(fs::set_permissions(
                at("private"),
                Permissions::from_mode(0o666),
            ));
            denied(chown(at("private"), Some(USER), None));
            denied(fs::remove_file(at("sticky/root")));
            // By a supplementary group, of which the server knows nothing.
            fs::write(at("group"), "by group").unwrap();
        });
        assert_eq!(fs::read(at("group")).unwrap(), b"by group");
        let mode = fs::metadata(at("private")).unwrap();
        assert_eq!(mode.permissions().mode() & 0o7777, 0o600);
    });
}

#[test]
fn set_group_id_directories_pass_their_group_on() {
    everywhere(|place| {
        let at = |name: &str| place.guest.join(name);
        open_to_all(place, "", 0o777);
        open_to_all(place, "shared", 0o777);
        chown(at("shared"), None, Some(OTHER_GROUP)).unwrap();
        open_to_all(place, "shared", 0o2777);
        as_user(&[], || {
            File::create(at("shared/file")).unwrap();
            fs::create_dir(at("shared/dir")).unwrap();
        });
        assert_eq!(owner(place, "shared/file").1, USER);
        assert_eq!(owner(place, "shared/file").2, OTHER_GROUP);
        let (mode, user, group) = owner(place, "shared/dir");
        assert_eq!((mode & 0o2000, user, group), (0o2000, USER, OTHER_GROUP));
    });
}

#[test]
fn set_id_bits_go_when_a_file_changes() {
    everywhere(|place| {
        let path = place.guest.join("program");
        open_to_all(place, "", 0o777);
        let reset = || {
            fs::write(&path, "#!").unwrap();
            chown(&path, Some(0), Some(0)).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o6777)).unwrap();
            assert_eq!(owner(place, "program").0, 0o6777);
        };
        let open = || File::options().write(true).open(&path).unwrap();

        reset();
        open().write_all(b"root keeps them").unwrap();
        assert_eq!(owner(place, "program").0, 0o6777);
        as_user(&[], || open().write_all(b"others do not").unwrap());
        assert_eq!(owner(place, "program").0, 0o777);

        reset();
        as_user(&[], || open().set_len(1).unwrap());
        assert_eq!(owner(place, "program").0, 0o777);

        reset();
        as_user(&[], || {
            File::options()
                .write(true)
                .truncate(true)
                .open(&path)
                .unwrap();
        });
        assert_eq!(owner(place, "program").0, 0o777);

        reset();
        as_user(&[], || {
            let file = open();
            let keep = rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, keep, 0, 8192).unwrap();
        });
        assert_eq!(owner(place, "program").0, 0o777);

        // Giving it away takes them off even for root, directories apart.
        reset();
        chown(&path, Some(USER), None).unwrap();
        assert_eq!(owner(place, "program"), (0o777, USER, 0));
        open_to_all(place, "dir", 0o6755);
        chown(place.guest.join("dir"), Some(USER), Some(GROUP)).unwrap();
        assert_eq!(owner(place, "dir"), (0o6755, USER, GROUP));
        symlink("nowhere", place.guest.join("link")).unwrap();
        std::os::unix::fs::lchown(place.guest.join("link"), Some(USER), Some(GROUP)).unwrap();
        assert_eq!(owner(place, "link"), (0o777, USER, GROUP));
    });
}

fn set(path: &Path, name: &str, value: &[u8]) -> Result<(), Errno> {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
}

fn get(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; rustix::fs::lgetxattr_query(path, name)?];
    let size = rustix::fs::lgetxattr(path, name, value.as_mut_slice())?;
    value.truncate(size);
    Ok(value)
}

#[test]
fn extended_attributes() {
    everywhere(|place| {
        let path = place.guest.join("file");
        let host = place.host.join("file");
        fs::write(&path, "").unwrap();
        set(&path, "user.colour", b"green").unwrap();
        set(&path, "user.empty", b"").unwrap();
        assert_eq!(get(&host, "user.colour").unwrap(), b"green");
        assert_eq!(get(&path, "user.empty").unwrap(), b"");
        assert_eq!(get(&path, "user.none"), Err(Errno::NODATA));
        let create = rustix::fs::lsetxattr(&path, "user.colour", b"red", XattrFlags::CREATE);
        assert_eq!(create, Err(Errno::EXIST));
        let mut small = [0; 3];
        let read = rustix::fs::lgetxattr(&path, "user.colour", small.as_mut_slice());
        assert_eq!(read, Err(Errno::RANGE));

        // What is the host's stays there.
        set(&host, "trusted.overlay.opaque", b"y").unwrap();
        assert_eq!(get(&path, "trusted.overlay.opaque"), Err(Errno::NODATA));
        // The guest has its own, which are no trusted ones on the host.
        set(&path, "trusted.mine", b"y").unwrap();
        assert_eq!(get(&path, "trusted.mine").unwrap(), b"y");
        assert_eq!(get(&host, "trusted.mine"), Err(Errno::NODATA));
        assert_eq!(get(&host, "user.husk.trusted.mine").unwrap(), b"y");
        let kept = "user.husk.trusted.mine";
        assert_eq!(get(&path, kept), Err(Errno::OPNOTSUPP));
        assert_eq!(set(&path, kept, b"z"), Err(Errno::OPNOTSUPP));
        assert_eq!(set(&path, "security.selinux", b"y"), Err(Errno::OPNOTSUPP));
        let mut names = vec![0; rustix::fs::llistxattr_query(&path).unwrap()];
        let size = rustix::fs::llistxattr(&path, names.as_mut_slice()).unwrap();
        assert_eq!(size, names.len());
        let mut names: Vec<_> = names
            .split(|byte| *byte == 0)
            .filter(|n| !n.is_empty())
            .collect();
        names.sort();
        assert_eq!(names, [&b"trusted.mine"[..], b"user.colour", b"user.empty"]);
        rustix::fs::lremovexattr(&path, "trusted.mine").unwrap();
        assert_eq!(get(&host, "user.husk.trusted.mine"), Err(Errno::NODATA));

        rustix::fs::lremovexattr(&path, "user.colour").unwrap();
        assert_eq!(get(&host, "user.colour"), Err(Errno::NODATA));
        // Not on links, as the host's kernel has it.
        symlink("file", place.guest.join("link")).unwrap();
        assert_eq!(
            set(&place.guest.join("link"), "user.x", b""),
            Err(Errno::PERM)
        );
        let long = format!("user.{}", "x".repeat(251));
        assert!(set(&path, &long, b"").is_err());
    });
}

#[test]
fn file_capabilities_are_kept_and_go_with_a_change() {
    everywhere(|place| {
        let path = place.guest.join("ping");
        fs::write(&path, "program").unwrap();
        // Version 2, effective, CAP_NET_RAW permitted.
        let mut capability = [0u8; 20];
        capability[..4].copy_from_slice(&0x0200_0001u32.to_le_bytes());
        capability[4..8].copy_from_slice(&(1u32 << 13).to_le_bytes());
        let name = "security.capability";
        for change in [
            (|path| {
                File::options()
                    .write(true)
                    .open(path)
                    .unwrap()
                    .write_all(b"x")
                    .unwrap()
            }) as fn(&Path),
            |path| chown(path, Some(USER), None).unwrap(),
            |path| {
                File::options()
                    .write(true)
                    .open(path)
                    .unwrap()
                    .set_len(0)
                    .unwrap()
            },
        ] {
            set(&path, name, &capability).unwrap();
            assert_eq!(get(&path, name).unwrap(), capability);
            assert_eq!(get(&place.host.join("ping"), name).unwrap(), capability);
            change(&path);
            assert_eq!(get(&place.host.join("ping"), name), Err(Errno::NODATA));
            assert_eq!(get(&path, name), Err(Errno::NODATA));
        }
    });
}

/// An access control list: owner, one user, group, mask and others.
fn acl(user: u32, permissions: u16) -> Vec<u8> {
    let none = u32::MAX;
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (0x01u16, 6u16, none),
        (0x02, permissions, user),
        (0x04, 0, none),
        (0x10, 7, none),
        (0x20, 0, none),
    ] {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

#[test]
fn access_control_lists_are_obeyed() {
    everywhere(|place| {
        open_to_all(place, "", 0o755);
        let path = place.guest.join("file");
        fs::write(&path, "for one").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        as_user(&[], || assert!(File::open(&path).is_err()));
        set(&path, "system.posix_acl_access", &acl(USER, 4)).unwrap();
        as_user(&[], || {
            assert_eq!(fs::read(&path).unwrap(), b"for one");
            assert!(File::options().write(true).open(&path).is_err());
        });
        // A default list is passed on, instead of the umask.
        open_to_all(place, "dir", 0o755);
        set(
            &place.guest.join("dir"),
            "system.posix_acl_default",
            &acl(USER, 6),
        )
        .unwrap();
        let inherited = place.guest.join("dir/file");
        let file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o666)
            .open(&inherited)
            .unwrap();
        file.write_all_at(b"passed on", 0).unwrap();
        assert_eq!(
            get(&place.host.join("dir/file"), "system.posix_acl_access").unwrap()[..4],
            2u32.to_le_bytes()
        );
        as_user(&[], || {
            assert_eq!(fs::read(&inherited).unwrap(), b"passed on")
        });
    });
}

#[test]
fn whole_file_systems() {
    everywhere(|place| {
        let guest = rustix::fs::statvfs(&place.guest).unwrap();
        let host = rustix::fs::statvfs(&place.host).unwrap();
        assert_eq!(
            (guest.f_blocks, guest.f_frsize),
            (host.f_blocks, host.f_frsize)
        );
        assert_eq!(
            (guest.f_files, guest.f_namemax),
            (host.f_files, host.f_namemax)
        );
        let path = CString::new(place.guest.to_str().unwrap()).unwrap();
        let dir = rustix::fs::open(path, OFlags::RDONLY, Mode::empty()).unwrap();
        rustix::fs::syncfs(&dir).unwrap();
    });
}
