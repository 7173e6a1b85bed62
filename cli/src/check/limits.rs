//! Limits of the node that many pods reach.

use husk_node::config::{Config, UIDS};

use super::{Finding, Node};

/// A pod with watched volumes has one instance, and containerd, the kubelet and
/// others of root's have some.
const INOTIFY_INSTANCES: u64 = 512;

/// One a watched directory.
const INOTIFY_WATCHES: u64 = 65_536;

pub fn check(node: &Node, config: &Config) -> Vec<Finding> {
    let inotify = [
        ("max_user_instances", INOTIFY_INSTANCES),
        ("max_user_watches", INOTIFY_WATCHES),
    ];
    let mut findings: Vec<_> = inotify
        .into_iter()
        .filter_map(|(name, least)| inotify_limit(node, name, least))
        .collect();
    findings.push(uids(node, config));
    findings.extend(overcommit(node));
    findings
}

fn inotify_limit(node: &Node, name: &'static str, least: u64) -> Option<Finding> {
    const ABOUT: &str = "inotify";
    let limit = node.number(&format!("/proc/sys/fs/inotify/{name}"))?;
    let found = format!("fs.inotify.{name} is {limit}");
    if limit >= least {
        return Some(Finding::ok(ABOUT, found));
    }
    let advice = format!(
        "with many pods, changes of their ConfigMaps and Secrets come late or not at all: \
         sysctl -w fs.inotify.{name}={least}, and the same in /etc/sysctl.d"
    );
    Some(Finding::warning(ABOUT, found, advice))
}

/// Whether somebody else has user ids of those that VMMs and file servers run under.
fn uids(node: &Node, config: &Config) -> Finding {
    const ABOUT: &str = "user ids";
    let first = u64::from(config.first_uid);
    let ours = first..first + u64::from(UIDS);
    let range = format!("{} to {}", ours.start, ours.end);
    for file in ["/etc/passwd", "/etc/group", "/etc/subuid", "/etc/subgid"] {
        let text = node.read(file).unwrap_or_default();
        let is_sub = file.contains("/sub");
        for line in text.lines() {
            let fields: Vec<_> = line.split(':').collect();
            let number = |at: usize| fields.get(at).and_then(|text| text.parse::<u64>().ok());
            let theirs = match is_sub {
                true => number(1).zip(number(2)),
                false => number(2).map(|id| (id, 1)),
            };
            let Some((start, count)) = theirs else {
                continue;
            };
            if start < ours.end && ours.start < start.saturating_add(count) {
                let who = fields.first().copied().unwrap_or_default();
                let advice = format!(
                    "choose another first_uid, whose {UIDS} ids nobody has, or move {who}'s"
                );
                let found = format!("{file} gives {who} some of {range}, which pods use");
                return Finding::warning(ABOUT, found, advice);
            }
        }
    }
    Finding::ok(ABOUT, format!("{range} are nobody else's"))
}

fn overcommit(node: &Node) -> Option<Finding> {
    const ABOUT: &str = "memory";
    let mode = node.number("/proc/sys/vm/overcommit_memory")?;
    Some(match mode {
        2 => Finding::warning(
            ABOUT,
            "vm.overcommit_memory is 2",
            "each machine counts as if it used all its memory; 0 is usual",
        ),
        _ => Finding::ok(ABOUT, format!("vm.overcommit_memory is {mode}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;
    use std::fs;

    #[test]
    fn finds_who_else_has_the_ids() {
        let dir = tempfile::tempdir().unwrap();
        let node = Node::at(dir.path());
        fs::create_dir(dir.path().join("etc")).unwrap();
        let config = Config::default();
        for (file, text, verdict) in [
            ("passwd", "root:x:0:0::/:/bin/sh\nodd\n:::::\n", Verdict::Ok),
            ("subuid", "a:100000:65536\n", Verdict::Ok),
            ("subuid", "a:1009999999:1\n", Verdict::Ok),
            ("subuid", "a:1009999999:2\n", Verdict::Warning),
            ("subuid", "a:0:18446744073709551615\n", Verdict::Warning),
            ("subuid", "", Verdict::Ok),
            ("passwd", "b:x:1010000001:1::/:/bin/sh\n", Verdict::Warning),
            ("passwd", "b:x:1018388607:1::/:/bin/sh\n", Verdict::Warning),
            ("passwd", "b:x:1018388608:1::/:/bin/sh\n", Verdict::Ok),
        ] {
            fs::write(dir.path().join("etc").join(file), text).unwrap();
            let finding = uids(&node, &config);
            assert_eq!(finding.verdict, verdict, "{text:?}: {finding:?}");
        }
    }

    #[test]
    fn reads_sysctls() {
        let dir = tempfile::tempdir().unwrap();
        let node = Node::at(dir.path());
        assert_eq!(check(&node, &Config::default()).len(), 1);
        let inotify = dir.path().join("proc/sys/fs/inotify");
        fs::create_dir_all(&inotify).unwrap();
        fs::create_dir_all(dir.path().join("proc/sys/vm")).unwrap();
        fs::write(inotify.join("max_user_instances"), "128\n").unwrap();
        fs::write(inotify.join("max_user_watches"), "500000\n").unwrap();
        fs::write(dir.path().join("proc/sys/vm/overcommit_memory"), "2\n").unwrap();
        let verdicts: Vec<_> = check(&node, &Config::default())
            .iter()
            .map(|finding| finding.verdict)
            .collect();
        use Verdict::{Ok, Warning};
        assert_eq!(verdicts, [Warning, Ok, Ok, Warning]);
    }
}
