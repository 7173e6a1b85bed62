//! The security context: who a container's processes are and what they may do.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::{Bench, Case, case, husk_case};
use crate::cri::Cri;
use crate::cri::api::{
    Capability, ContainerConfig, Int64Value, LinuxContainerSecurityContext, ProfileType,
    SecurityProfile,
};
use crate::drop_in::DropIn;
use crate::footprint;
use crate::node::Runtime;
use crate::pod::Pod;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("security/user-and-groups", 40, user_and_groups),
    case("security/capabilities", 40, capabilities),
    case("security/no-new-privileges", 40, no_new_privileges),
    case("security/seccomp", 40, seccomp),
    case("security/paths", 40, paths),
    case("security/devices", 40, devices),
    case("security/privileged", 40, privileged),
    husk_case("security/jail", 40, jail),
    husk_case("security/guest-kernel", 60, guest_kernel),
];

/// A container that sleeps, with a security context of its own.
fn sleeper(
    cri: &Cri,
    pod: &Pod,
    change: impl FnOnce(&mut LinuxContainerSecurityContext),
) -> Result<String> {
    pod.start_config(cri, &config(pod, &["sleep", "1000"], change))
}

fn config(
    pod: &Pod,
    command: &[&str],
    change: impl FnOnce(&mut LinuxContainerSecurityContext),
) -> ContainerConfig {
    let mut config = pod.container(command);
    let linux = config.linux.get_or_insert_default();
    change(linux.security_context.get_or_insert_default());
    config
}

/// What a shell in the container prints.
fn shell(cri: &Cri, container: &str, script: &str) -> Result<String> {
    cri.exec_sync(container, &["sh", "-c", script], 10)?
        .ok()
        .with_context(|| script.to_owned())
}

/// A line of `/proc/PID/status`.
fn status(cri: &Cri, container: &str, pid: &str, field: &str) -> Result<String> {
    let script = format!("grep '^{field}:' /proc/{pid}/status");
    let line = shell(cri, container, &script)?;
    let value = line.split_once(':').map(|(_, value)| value.trim());
    Ok(value.context("no value")?.to_owned())
}

fn user_and_groups(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let numbered = sleeper(&cri, &pod, |context| {
        context.run_as_user = Some(Int64Value { value: 1234 });
        context.run_as_group = Some(Int64Value { value: 2345 });
        context.supplemental_groups = vec![3456, 4567];
    })?;
    // Its first process, and those that are added.
    for pid in ["1", "self"] {
        for (field, expected) in [
            ("Uid", "1234\t1234\t1234\t1234"),
            ("Gid", "2345\t2345\t2345\t2345"),
        ] {
            let seen = status(&cri, &numbered, pid, field)?;
            ensure!(seen == expected, "{field} of {pid}: {seen:?}");
        }
        let groups = status(&cri, &numbered, pid, "Groups")?;
        let mut groups: Vec<&str> = groups.split_whitespace().collect();
        groups.sort_unstable();
        groups.retain(|group| *group != "2345");
        ensure!(groups == ["3456", "4567"], "groups of {pid}: {groups:?}");
        // Who is not root gets no capability, though it may come to have some.
        let effective = status(&cri, &numbered, pid, "CapEff")?;
        ensure!(effective == "0000000000000000", "{pid}: {effective}");
    }
    let refused = cri.exec_sync(&numbered, &["touch", "/etc/file"], 10)?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("Permission denied"),
        "{refused:?}"
    );
    // By the image's own /etc/passwd and /etc/group.
    let named = sleeper(&cri, &pod, |context| {
        context.run_as_username = "web".into();
    })?;
    let seen = shell(&cri, &named, "id -un; id -u; id -g; id -G")?;
    let lines: Vec<&str> = seen.lines().collect();
    ensure!(
        lines.len() == 4
            && lines[..3] == ["web", "1000", "1000"]
            && lines[3].split(' ').any(|group| group == "2000"),
        "{seen}"
    );
    pod.remove(&cri)
}

/// Those that containerd gives by default, as a number.
const DEFAULT_CAPABILITIES: &str = "00000000a80425fb";

fn capabilities(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let plain = sleeper(&cri, &pod, |_| {})?;
    for pid in ["1", "self"] {
        for field in ["CapEff", "CapPrm", "CapBnd"] {
            let seen = status(&cri, &plain, pid, field)?;
            ensure!(seen == DEFAULT_CAPABILITIES, "{field} of {pid}: {seen}");
        }
    }
    shell(&cri, &plain, "touch /tmp/file && chown 1000 /tmp/file")?;
    let refused = cri.exec_sync(&plain, &["mount", "-t", "tmpfs", "none", "/mnt"], 10)?;
    ensure!(refused.code != 0, "it may mount: {refused:?}");

    let few = sleeper(&cri, &pod, |context| {
        context.capabilities = Some(Capability {
            drop_capabilities: vec!["ALL".into()],
            add_capabilities: vec!["NET_BIND_SERVICE".into()],
            ..Default::default()
        });
    })?;
    for field in ["CapEff", "CapPrm", "CapBnd"] {
        let seen = status(&cri, &few, "self", field)?;
        ensure!(seen == "0000000000000400", "{field}: {seen}");
    }
    let script = "touch /tmp/file; chown 1000 /tmp/file";
    let refused = cri.exec_sync(&few, &["sh", "-c", script], 10)?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("not permitted"),
        "{refused:?}"
    );

    let more = sleeper(&cri, &pod, |context| {
        context.capabilities = Some(Capability {
            add_capabilities: vec!["SYS_ADMIN".into()],
            ..Default::default()
        });
    })?;
    let script = "mount -t tmpfs none /mnt && touch /mnt/file && umount /mnt && ls /mnt";
    let seen = shell(&cri, &more, script)?;
    ensure!(seen.is_empty(), "{seen}");
    pod.remove(&cri)
}

/// A program that makes its user root, with and without leave to.
fn no_new_privileges(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    for (forbidden, expected) in [(false, "1000 0 "), (true, "1000 1000 ")] {
        // As the first process, and as one that is added.
        let entry = config(&pod, &["setuid-probe", "ids"], |context| {
            context.run_as_user = Some(Int64Value { value: 1000 });
            context.no_new_privs = forbidden;
        });
        let entry = pod.start_config(&cri, &entry)?;
        pod.await_log(&cri, &entry, &format!("stdout F {expected}"))?;
        let container = sleeper(&cri, &pod, |context| {
            context.run_as_user = Some(Int64Value { value: 1000 });
            context.no_new_privs = forbidden;
        })?;
        let seen = shell(&cri, &container, "setuid-probe ids")?;
        ensure!(
            seen.starts_with(expected),
            "{seen:?} where gaining rights is forbidden: {forbidden}"
        );
        let flag = status(&cri, &container, "1", "NoNewPrivs")?;
        ensure!(flag == i32::from(forbidden).to_string(), "{flag}");
    }
    pod.remove(&cri)
}

/// `/proc/PID/status` calls a filter so.
const FILTERED: &str = "2";

fn seccomp(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    // Any user may have a user namespace, but the default profile lets none make
    // one that lacks CAP_SYS_ADMIN.
    let script = "unshare --user true 2>&1; true";
    let with = |kind: ProfileType, reference: &str| {
        sleeper(&cri, &pod, |context| {
            context.seccomp = Some(SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: reference.to_owned(),
            });
        })
    };

    let by_default = with(ProfileType::RuntimeDefault, "")?;
    for pid in ["1", "self"] {
        let mode = status(&cri, &by_default, pid, "Seccomp")?;
        ensure!(mode == FILTERED, "mode {mode} of {pid}");
    }
    let seen = shell(&cri, &by_default, script)?;
    ensure!(seen.contains("not permitted"), "{seen:?}");

    let open = with(ProfileType::Unconfined, "")?;
    for pid in ["1", "self"] {
        let mode = status(&cri, &open, pid, "Seccomp")?;
        ensure!(mode == "0", "mode {mode} of {pid}");
    }
    let seen = shell(&cri, &open, "mkdir /tmp/folder && ls /tmp")?;
    ensure!(seen == "folder", "{seen:?}");

    let profile = bench.folder().join("no-mkdir.json");
    // ENOTEMPTY: an errno that nothing else would give here.
    let rules = r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 39}]}"#;
    fs::write(&profile, rules)?;
    let own = with(ProfileType::Localhost, &profile.display().to_string())?;
    let mode = status(&cri, &own, "1", "Seccomp")?;
    ensure!(mode == FILTERED, "mode {mode}");
    let seen = shell(
        &cri,
        &own,
        "mkdir /tmp/folder 2>&1; touch /tmp/file; ls /tmp",
    )?;
    ensure!(
        seen.contains("Directory not empty") && seen.ends_with("\nfile"),
        "{seen:?}"
    );
    pod.remove(&cri)
}

/// What the kubelet asks for where `procMount` says nothing else.
const MASKED: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Masked and read-only paths: those of `procMount: Default`, and others.
fn paths(bench: &Bench) -> Result<()> {
    const SET: &str = "echo a-domain > /proc/sys/kernel/domainname";
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let plain = sleeper(&cri, &pod, |context| {
        context.masked_paths = MASKED.map(str::to_owned).into();
        context.readonly_paths = READ_ONLY.map(str::to_owned).into();
    })?;
    let script = "for file in kcore keys latency_stats timer_list sched_debug; do \
                    [ ! -e /proc/$file ] || [ \"$(head -c 1 /proc/$file | wc -c)\" = 0 ] || echo $file; \
                  done; \
                  for folder in /proc/acpi /proc/scsi /sys/firmware /sys/devices/virtual/powercap; do \
                    [ ! -d $folder ] || [ -z \"$(ls $folder)\" ] || echo $folder; \
                  done; head -c 1 /proc/interrupts | wc -c";
    let seen = shell(&cri, &plain, script)?;
    ensure!(seen == "1", "not masked: {seen}");
    let refused = cri.exec_sync(&plain, &["sh", "-c", SET], 10)?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("Read-only file system"),
        "{refused:?}"
    );

    let other = sleeper(&cri, &pod, |context| {
        context.masked_paths = vec![
            "/proc/interrupts".into(),
            "/etc/motd".into(),
            "/sys/class".into(),
            "/not/there".into(),
        ];
        context.readonly_paths = vec!["/var".into(), "/not/there/either".into()];
    })?;
    let script = "cat /proc/interrupts /etc/motd; ls -A /sys/class; touch /var/file 2>&1; touch /tmp/file && ls /tmp";
    let seen = shell(&cri, &other, script)?;
    ensure!(
        seen.lines().count() == 2
            && seen.contains("Read-only file system")
            && seen.ends_with("\nfile"),
        "{seen:?}"
    );
    // What is not in the list is as the kernel has it.
    let seen = shell(
        &cri,
        &other,
        &format!("{SET}; cat /proc/sys/kernel/domainname"),
    )?;
    ensure!(seen == "a-domain", "{seen:?}");
    pod.remove(&cri)
}

/// A node for a device can be made by whoever has CAP_MKNOD; whether it can be
/// opened is another question.
fn devices(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = sleeper(&cri, &pod, |_| {})?;
    // On the root as well as in /dev: memory, the kernel's log, the null device.
    for folder in ["/dev", "/tmp"] {
        let script = format!(
            "cd {folder} && mknod a-memory c 1 1 && mknod a-log c 1 11 && mknod a-null c 1 3"
        );
        shell(&cri, &container, &script)?;
        for name in ["a-memory", "a-log"] {
            let script = format!("head -c 1 {folder}/{name}");
            let refused = cri.exec_sync(&container, &["sh", "-c", &script], 10)?;
            ensure!(
                refused.code != 0 && refused.stderr.contains("not permitted"),
                "{folder}/{name}: {refused:?}"
            );
        }
        let seen = shell(
            &cri,
            &container,
            &format!("echo text > {folder}/a-null; wc -c < {folder}/a-null"),
        )?;
        ensure!(seen == "0", "{folder}: {seen:?}");
    }
    // Disks, of the node or of the guest.
    let script = "for disk in 'b 8 0' 'b 254 0' 'b 253 0' 'b 7 0'; do \
                    { mknod /dev/a-disk $disk && head -c 1 /dev/a-disk; } 2>&1; rm -f /dev/a-disk; \
                  done; true";
    let seen = shell(&cri, &container, script)?;
    ensure!(
        seen.lines().count() == 4 && seen.matches("not permitted").count() == 4,
        "{seen:?}"
    );
    let usual = "for name in null zero full random urandom tty ptmx fd stdin stdout stderr; do \
                   ls -d /dev/$name; done | wc -l; ls -A /dev/pts; head -c 4 /dev/urandom | wc -c";
    let seen = shell(&cri, &container, usual)?;
    ensure!(
        seen.starts_with("11\n") && seen.ends_with("\n4"),
        "{seen:?}"
    );
    pod.remove(&cri)
}

fn privileged(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |config| {
        let context = config
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default();
        context.privileged = true;
    })?;
    let container = sleeper(&cri, &pod, |context| {
        context.privileged = true;
        // Overridden by being privileged.
        context.seccomp = Some(SecurityProfile {
            profile_type: ProfileType::RuntimeDefault.into(),
            ..Default::default()
        });
    })?;
    let effective = status(&cri, &container, "self", "CapEff")?;
    let last = shell(&cri, &container, "cat /proc/sys/kernel/cap_last_cap")?;
    let expected = format!("{:016x}", (2_u64 << last.parse::<u32>()?) - 1);
    ensure!(effective == expected, "{effective}, expected {expected}");
    let mode = status(&cri, &container, "1", "Seccomp")?;
    ensure!(mode == "0", "mode {mode}");
    // It may mount, change the kernel's settings and look at all of it.
    let script = "mount -t tmpfs none /mnt && umount /mnt && \
                  dd if=/dev/kmsg of=/dev/null bs=8192 count=1 2> /dev/null && \
                  value=$(cat /proc/sys/vm/overcommit_ratio) && echo $value > /proc/sys/vm/overcommit_ratio && \
                  grep ' /sys ' /proc/mounts";
    let seen = shell(&cri, &container, script)?;
    // An old containerd mounts it read-only for runc.
    ensure!(
        seen.contains(" rw,") || bench.runtime == Runtime::Runc,
        "{seen:?}"
    );
    if bench.runtime == Runtime::Husk {
        // The node's disks have other numbers here, or are none at all.
        let disks = shell(&cri, &container, "find /dev -type b")?;
        ensure!(disks.is_empty(), "block devices: {disks}");
    }
    pod.remove(&cri)
}

/// Where the guest's kernel is linked to be (`_text`).
const LINKED_AT: u64 = 0xffff_ffff_8100_0000;

/// Where it must end at the latest (`KERNEL_IMAGE_SIZE`).
const KERNEL_END: u64 = 0xffff_ffff_c000_0000;

/// Asks the guest's kernel how it protects itself from root of a container.
const PROTECTION: &str = "mount -t securityfs none /mnt && cat /mnt/lockdown && \
     dmesg | grep -o 'heap alloc:on' && sed -n 's/ . _text$//p' /proc/kallsyms";

/// Where the kernel of a pod is that boots, asked by root with every capability.
fn kernel_text(bench: &Bench) -> Result<u64> {
    let id = bench.id();
    let command = ["sh", "-c", PROTECTION];
    let said = bench.ctr.run(&["--privileged"], &id, &command)?;
    let said = said.ok()?.out();
    let lines: Vec<&str> = said.lines().collect();
    let [lockdown, zeroed, text] = lines.as_slice() else {
        anyhow::bail!("{said:?}");
    };
    ensure!(lockdown.ends_with("[confidentiality]"), "{lockdown}");
    ensure!(*zeroed == "heap alloc:on", "{zeroed}");
    Ok(u64::from_str_radix(text, 16)?)
}

/// The kernel of each boot lies elsewhere, gives no memory that was not zeroed, and is
/// not for root to change or read.
fn guest_kernel(bench: &Bench) -> Result<()> {
    let booting = DropIn::with("template_max_age_seconds = 0\n")?;
    let mut places = std::collections::BTreeSet::new();
    for _ in 0..4 {
        let text = kernel_text(bench)?;
        let large_page = text.wrapping_sub(LINKED_AT).is_multiple_of(2 << 20);
        ensure!(
            (LINKED_AT..KERNEL_END).contains(&text) && large_page,
            "{text:#x}"
        );
        places.insert(text);
    }
    // Of some 490.
    ensure!(places.len() > 1, "always at {places:x?}");
    drop(booting);
    let _fixed = DropIn::with("template_max_age_seconds = 0\nkernel_parameters = \"nokaslr\"\n")?;
    let text = kernel_text(bench)?;
    ensure!(text == LINKED_AT, "nokaslr: {text:#x}");
    Ok(())
}

/// What a program's process of a pod is held by.
struct Jail {
    program: &'static str,
    /// Its capabilities, as a number.
    capabilities: &'static str,
    /// Limits that `/proc/PID/limits` has, both soft and hard.
    limits: &'static [(&'static str, &'static str)],
    /// Namespaces that are not the node's.
    namespaces: &'static [&'static str],
}

/// The threads of a VMM depend on its processors, so they are not here.
const JAILS: [Jail; 2] = [
    Jail {
        program: "husk-vmm",
        capabilities: "0000000000000000",
        limits: &[
            ("Max open files", "8192"),
            ("Max locked memory", "1048576"),
            ("Max core file size", "1"),
        ],
        namespaces: &["mnt", "net", "ipc", "uts", "cgroup", "pid", "user"],
    },
    Jail {
        program: "husk-fs",
        capabilities: "00000000880000db",
        limits: &[
            ("Max processes", "1"),
            ("Max locked memory", "0"),
            ("Max core file size", "1"),
        ],
        namespaces: &["mnt", "net", "ipc", "uts", "cgroup", "pid"],
    },
];

/// The processes that the guest speaks to, while it runs: users of their own,
/// namespaces, limits, capabilities, filters.
fn jail(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pods = [
        Pod::run(bench, &cri, |_| {})?,
        Pod::run(bench, &cri, |_| {})?,
    ];
    let mut users = Vec::new();
    for pod in &pods {
        let container = sleeper(&cri, pod, |_| {})?;
        // What the file server does takes its capabilities.
        let script =
            "mknod /tmp/a c 1 3 && chown 1234 /tmp/a && mv /tmp/a /var/b && stat -c %u /var/b";
        let seen = shell(&cri, &container, script)?;
        ensure!(seen == "1234", "{seen:?}");
        let processes = footprint::of_pod(&pod.id)?;
        for jail in &JAILS {
            let found = processes.iter().find(|found| found.name == jail.program);
            let pid = found.with_context(|| format!("no {}", jail.program))?.pid;
            let user = jail.holds(pid).with_context(|| jail.program)?;
            users.push(user);
        }
    }
    let count = users.len();
    users.sort_unstable();
    users.dedup();
    ensure!(
        users.len() == count && users[0] > 65_535,
        "users are shared: {users:?}"
    );
    for pod in pods {
        pod.remove(&cri)?;
    }
    Ok(())
}

impl Jail {
    /// Fails unless the process is held; its user.
    fn holds(&self, pid: i32) -> Result<u32> {
        let proc = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
        let status = proc("status")?;
        let field = |name: &str| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(str::trim).with_context(|| format!("no {name}"))
        };
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            let seen = field(set)?;
            ensure!(seen == self.capabilities, "{set}: {seen}");
        }
        for (name, expected) in [("NoNewPrivs", "1"), ("Seccomp", FILTERED), ("Groups", "")] {
            let seen = field(name)?;
            ensure!(seen == expected, "{name}: {seen}");
        }
        // Real, effective and saved; on files a server acts for others.
        let users: Vec<&str> = field("Uid")?.split_whitespace().collect();
        let groups: Vec<&str> = field("Gid")?.split_whitespace().collect();
        let of_all = users.iter().take(3).chain(groups.iter().take(3));
        let is_same = of_all.clone().all(|id| Some(id) == users.first());
        ensure!(is_same && of_all.count() == 6, "{users:?} {groups:?}");

        let limits = proc("limits")?;
        for (name, most) in self.limits {
            let line = limits.lines().find_map(|line| line.strip_prefix(name));
            let values = line.with_context(|| format!("no {name}"))?;
            let values: Vec<&str> = values.split_whitespace().take(2).collect();
            ensure!(values == [*most; 2], "{name}: {values:?}");
        }
        for name in self.namespaces {
            let theirs = fs::read_link(format!("/proc/{pid}/ns/{name}"))?;
            let ours = fs::read_link(format!("/proc/self/ns/{name}"))?;
            ensure!(theirs != ours, "{name} is the node's");
        }
        Ok(users[0].parse()?)
    }
}
