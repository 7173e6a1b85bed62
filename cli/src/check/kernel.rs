//! The node's kernel: version, cgroups, devices, confinement.

use super::{Finding, Node};

/// The oldest kernel that runs pods.
const OLDEST: (u32, u32) = (5, 15);

/// Controllers that pods of Kubernetes have limits of.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];

pub fn check(node: &Node) -> Vec<Finding> {
    vec![
        version(node),
        cgroups(node),
        tun(node),
        seccomp(node),
        overlay(node),
    ]
}

fn version(node: &Node) -> Finding {
    const ABOUT: &str = "kernel";
    let (oldest_major, oldest_minor) = OLDEST;
    let advice = format!("Husk needs Linux {oldest_major}.{oldest_minor} or newer");
    let release = node.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse::<u32>().ok();
    match (number(), number()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST => Finding::ok(ABOUT, release),
        (Some(_), Some(_)) => Finding::problem(ABOUT, release, advice),
        _ => Finding::warning(ABOUT, format!("release {release:?}"), advice),
    }
}

fn cgroups(node: &Node) -> Finding {
    const ABOUT: &str = "cgroups";
    let Some(list) = node.read("/sys/fs/cgroup/cgroup.controllers") else {
        return Finding::warning(
            ABOUT,
            "no cgroup v2 at /sys/fs/cgroup",
            "pods run, but the node does not count and limit them: boot with \
             systemd.unified_cgroup_hierarchy=1",
        );
    };
    let has = |name: &&str| list.split_whitespace().any(|word| word == *name);
    let missing: Vec<_> = CONTROLLERS.into_iter().filter(|name| !has(name)).collect();
    if missing.is_empty() {
        return Finding::ok(ABOUT, "version 2");
    }
    Finding::warning(
        ABOUT,
        format!("version 2 without {}", missing.join(", ")),
        "something mounts cgroup v1 beside it and holds these; use cgroup v2 alone",
    )
}

fn tun(node: &Node) -> Finding {
    if node.path("/dev/net/tun").exists() {
        return Finding::ok("network", "/dev/net/tun is there");
    }
    Finding::problem("network", "no /dev/net/tun", "modprobe tun")
}

fn seccomp(node: &Node) -> Finding {
    const ABOUT: &str = "seccomp";
    let actions = node.read("/proc/sys/kernel/seccomp/actions_avail");
    match actions {
        Some(actions) if actions.contains("kill_process") => Finding::ok(ABOUT, "there"),
        _ => Finding::problem(
            ABOUT,
            "not there",
            "the VMM does not run unconfined; the kernel needs CONFIG_SECCOMP_FILTER",
        ),
    }
}

fn overlay(node: &Node) -> Finding {
    const ABOUT: &str = "overlay file system";
    let known = node.read("/proc/filesystems").unwrap_or_default();
    match known
        .lines()
        .any(|line| line.trim_end().ends_with("\toverlay"))
    {
        true => Finding::ok(ABOUT, "there"),
        false => Finding::warning(
            ABOUT,
            "not loaded",
            "the overlayfs snapshotter needs it: modprobe overlay",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;
    use std::fs;

    #[test]
    fn reads_a_node() {
        let dir = tempfile::tempdir().unwrap();
        let node = Node::at(dir.path());
        let put = |path: &str, text: &str| {
            let path = node.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let verdicts = |node: &Node| check(node).iter().map(|f| f.verdict).collect::<Vec<_>>();
        use Verdict::{Ok, Problem, Warning};
        assert_eq!(
            verdicts(&node),
            [Warning, Warning, Problem, Problem, Warning]
        );
        put("/proc/sys/kernel/osrelease", "5.15.0-91-generic\n");
        put(
            "/sys/fs/cgroup/cgroup.controllers",
            "cpuset cpu io memory hugetlb pids\n",
        );
        put("/dev/net/tun", "");
        put(
            "/proc/sys/kernel/seccomp/actions_avail",
            "kill_process kill_thread trap\n",
        );
        put(
            "/proc/filesystems",
            "nodev\tsysfs\n\text4\nnodev\toverlay\n",
        );
        assert_eq!(verdicts(&node), [Ok; 5]);
        put("/proc/sys/kernel/osrelease", "5.10.0-28-amd64\n");
        put("/sys/fs/cgroup/cgroup.controllers", "cpuset\n");
        assert_eq!(verdicts(&node)[..2], [Problem, Warning]);
        assert!(
            cgroups(&node)
                .found
                .ends_with("without cpu, memory, pids, io")
        );
    }
}
