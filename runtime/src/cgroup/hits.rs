//! What the limits of a pod's cgroup have cost it.

use std::fs;
use std::path::{Path, PathBuf};

use super::CgroupDir;

/// What counts, by file and keys (cgroup-v2.rst): memory that was not to be had,
/// processes that were ended for it, and others that could not begin.
const OWN: Counted = [
    ("memory.events", &["oom", "oom_kill"]),
    ("pids.events", &["max"]),
];

/// The same of a cgroup around it, which may have others' below it: hits of its own
/// limits alone. Kernels that have no such file of processes count in the pod's.
const AROUND: Counted = [
    ("memory.events.local", &["oom", "oom_kill"]),
    ("pids.events.local", &["max"]),
];

type Counted = [(&'static str, &'static [&'static str]); 2];

/// How often the pod's limits were in the way so far.
#[derive(Debug)]
pub struct LimitHits {
    own: Option<PathBuf>,
    before: u64,
}

impl LimitHits {
    /// Those of a pod's cgroup and of the one around it, which the kubelet limits.
    pub fn so_far(cgroup: Option<&CgroupDir>) -> Self {
        Self::of(cgroup.map(|cgroup| cgroup.path.clone()))
    }

    /// Those of this cgroup and of the one around it.
    pub fn of(own: Option<PathBuf>) -> Self {
        let before = count(own.as_deref());
        Self { own, before }
    }

    /// There are more now.
    pub fn have_grown(&self) -> bool {
        count(self.own.as_deref()) > self.before
    }
}

fn count(own: Option<&Path>) -> u64 {
    let around = own.and_then(Path::parent);
    let files = [(own, OWN), (around, AROUND)];
    let files = files
        .into_iter()
        .filter_map(|(dir, files)| Some((dir?, files)));
    let mut all = 0_u64;
    for (dir, (file, keys)) in files.flat_map(|(dir, files)| files.map(|one| (dir, one))) {
        let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        for (_, count) in lines.filter(|(key, _)| keys.contains(key)) {
            all = all.saturating_add(count.parse().unwrap_or(0));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_limits_cost() {
        let around = tempfile::tempdir().unwrap();
        let own = around.path().join("pod");
        fs::create_dir(&own).unwrap();
        let hits = || LimitHits::of(Some(own.clone()));
        let write = |file: &str, text: &str| fs::write(own.join(file), text).unwrap();
        let write_around = |file: &str, text: &str| {
            fs::write(around.path().join(file), text).unwrap();
        };
        let none = hits();
        assert!(!none.have_grown());
        let text = "low 0\nhigh 9\nmax 7\noom 0\noom_kill 0\n";
        write("memory.events", text);
        write_around("memory.events.local", text);
        // Of others that it is around as well.
        write_around("memory.events", "oom 1\noom_kill 1\n");
        write_around("pids.events", "max 1\n");
        assert!(!none.have_grown());
        write_around("pids.events.local", "max 1\n");
        assert!(none.have_grown());
        let one = hits();
        assert!(!one.have_grown());
        write_around("memory.events.local", "max 8\noom 1\noom_kill 0\n");
        assert!(one.have_grown());
        let two = hits();
        write("memory.events", "oom 0\noom_kill 1\n");
        assert!(two.have_grown());
        let three = hits();
        write("pids.events", "max 1\n");
        assert!(three.have_grown());
    }
}
