//! The agent in a guest: our kernel, booted by plain QEMU without KVM. Needs
//! `qemu-system-x86_64`, the guest kernel and busybox-static; says so where
//! they are missing.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const AGENT: &str = env!("CARGO_BIN_EXE_husk-agent");

/// As the first file of an initramfs, as a guest has it.
#[test]
fn without_a_host_it_says_so_and_powers_off() {
    let Some(guest) = Guest::new("alone") else {
        return;
    };
    guest.file("/init", Path::new(AGENT));
    let console = guest.boot("husk.log=info", &[]);
    for line in [
        "husk-agent: cannot dial host port 1024: No such device",
        "husk-agent: power off",
    ] {
        assert!(console.contains(line), "{line:?} is missing in:\n{console}");
    }
}

/// This test binary's own tests that want all cgroup controllers and a disk.
#[test]
fn limits_hold_in_a_guest() {
    let Some(guest) = Guest::new("limits") else {
        return;
    };
    let disk = guest.directory.join("disk.img");
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4"])
        .arg(&disk)
        .arg("8M")
        .status();
    if !made.is_ok_and(|status| status.success()) {
        crate::agent::skip("limits_hold_in_a_guest", "needs mke2fs");
        return;
    }
    guest.file("/init", &guest.script(INIT));
    guest.file("/bin/busybox", &busybox().unwrap());
    guest.file(AGENT, Path::new(AGENT));
    guest.file("/tests", &std::env::current_exe().unwrap());
    let drive = format!("file={},format=raw,if=none,id=disk", disk.display());
    let console = guest.boot(
        "",
        &[
            "-drive",
            &drive,
            "-device",
            "virtio-blk-pci,drive=disk,serial=husk-disk",
        ],
    );
    let line = console.lines().find(|line| line.contains("test result:"));
    let line = line.unwrap_or_else(|| panic!("no result in:\n{console}"));
    assert!(
        line.contains("ok. ") && !line.contains("ok. 0 passed"),
        "{console}"
    );
    assert!(!console.contains("SKIP"), "{console}");
}

/// What debug shells need comes in an archive behind the agent's.
#[test]
fn a_second_archive_is_unpacked_over_the_first() {
    let Some(guest) = Guest::new("archives") else {
        return;
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let second = root.join("target/guest-image/debug.cpio");
    if !second.exists() {
        let reason = "needs debug.cpio (make guest-image)";
        crate::agent::skip("a_second_archive_is_unpacked_over_the_first", reason);
        return;
    }
    let script = "#!/bin/busybox sh\n[ -L /bin/ls ] && ls -l /init /bin/busybox\npoweroff -f\n";
    guest.file("/init", &guest.script(script));
    let console = guest.boot_with("", &[], Some(&second));
    for line in ["/init", "/bin/busybox"] {
        let is_it = |shown: &str| shown.contains("-rwxr-xr-x") && shown.trim().ends_with(line);
        assert!(
            console.lines().any(is_it),
            "{line} is missing in:\n{console}"
        );
    }
}

/// A root that can be left, what the tests expect of a machine, the tests.
const INIT: &str = r#"#!/bin/busybox sh
PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /root.d /proc /sys /dev /tmp /run
mount --bind / /root.d && cd /root.d && mount --move . / && exec chroot . /bin/sh -c '
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/mqueue; mount -t devpts -o ptmxmode=0666 pts /dev/pts
mount -t mqueue mqueue /dev/mqueue; mount -t cgroup2 -o nsdelegate cgroup /sys/fs/cgroup
for name in $(cat /sys/fs/cgroup/cgroup.controllers); do echo +$name > /sys/fs/cgroup/cgroup.subtree_control; done
ip link set lo up
export HUSK_TEST_DISK=1
/tests --nocapture --test-threads 2 limits::
poweroff -f'
"#;

/// What a guest is booted from; gone when dropped.
struct Guest {
    directory: PathBuf,
    qemu: String,
}

impl Guest {
    fn new(name: &str) -> Option<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let kernel = root.join("target/guest-image/vmlinux");
        let missing = [
            (kernel.exists(), "the guest kernel (make guest-image)"),
            (
                Command::new("qemu-system-x86_64")
                    .arg("--version")
                    .output()
                    .is_ok(),
                "qemu-system-x86_64",
            ),
            (busybox().is_some(), "busybox-static"),
        ];
        if let Some((_, what)) = missing.iter().find(|(there, _)| !there) {
            crate::agent::skip(&format!("guest {name}"), &format!("needs {what}"));
            return None;
        }
        let directory =
            std::env::temp_dir().join(format!("husk-guest-{name}-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(
            directory.join("list"),
            "dir /dev\nnode /dev/console c 5 1 600\n",
        )
        .unwrap();
        Some(Self {
            directory,
            qemu: kernel.display().to_string(),
        })
    }

    fn script(&self, text: &str) -> PathBuf {
        let path = self.directory.join("script");
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Adds a file, without its debugging information, and its directories.
    fn file(&self, path: &str, source: &Path) {
        let list = self.directory.join("list");
        let mut text = std::fs::read_to_string(&list).unwrap();
        let parents: Vec<&Path> = Path::new(path).ancestors().skip(1).collect();
        for parent in parents
            .iter()
            .rev()
            .filter(|parent| parent.parent().is_some())
        {
            let line = format!("dir {}\n", parent.display());
            if !text.contains(&line) {
                text.push_str(&line);
            }
        }
        let small = self.directory.join(path.replace('/', "_"));
        let stripped = Command::new("strip")
            .args(["-o"])
            .arg(&small)
            .arg(source)
            .stderr(Stdio::null())
            .status();
        let source = if stripped.is_ok_and(|status| status.success()) {
            &small
        } else {
            source
        };
        text.push_str(&format!("file {path} {} 755\n", source.display()));
        std::fs::write(list, text).unwrap();
    }

    /// Boots, waits for the power-off; what the console said.
    fn boot(&self, command_line: &str, more: &[&str]) -> String {
        self.boot_with(command_line, more, None)
    }

    /// The same, with another archive behind the first.
    fn boot_with(&self, command_line: &str, more: &[&str], second: Option<&Path>) -> String {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let list = std::fs::File::open(self.directory.join("list")).unwrap();
        let initramfs = self.directory.join("initramfs.cpio");
        let made = Command::new(root.join("guest-image/cpio"))
            .stdin(list)
            .stdout(std::fs::File::create(&initramfs).unwrap())
            .status();
        assert!(made.unwrap().success());
        if let Some(second) = second {
            let both = [initramfs.as_path(), second].map(|path| std::fs::read(path).unwrap());
            std::fs::write(&initramfs, both.concat()).unwrap();
        }
        let append = format!("console=ttyS0 quiet panic=-1 {command_line}");
        let output = Command::new("timeout")
            .args([
                "300",
                "qemu-system-x86_64",
                "-accel",
                "tcg",
                "-cpu",
                "max",
                "-m",
                "1024",
            ])
            .args([
                "-nodefaults",
                "-nographic",
                "-no-reboot",
                "-serial",
                "stdio",
            ])
            .args(["-device", "pvpanic-pci", "-kernel", &self.qemu, "-initrd"])
            .arg(&initramfs)
            .args(["-append", &append])
            .args(more)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let console = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{}: {console}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        console
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn busybox() -> Option<PathBuf> {
    let paths = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    paths.into_iter().find(|path| path.exists())
}
