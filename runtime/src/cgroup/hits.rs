//! What the limits of a pod's cgroup have cost it.

use std::fs;
use std::path::{Path, PathBuf};

use super::{own_path, under_mount};

/// What counts, by file and keys (cgroup-v2.rst): memory that was not to be had,
/// processes that were ended for it, and others that could not begin.
const COUNTED: [(&str, &[&str]); 2] = [
    ("memory.events", &["oom", "oom_kill"]),
    ("pids.events", &["max"]),
];

/// How often the pod's limits were in the way so far.
#[derive(Debug)]
pub struct LimitHits {
    dirs: Vec<PathBuf>,
    before: u64,
}

impl LimitHits {
    /// Those of this process's cgroup, which is the pod's, and of the one around it:
    /// the kubelet limits that, and newer kernels count there.
    pub fn so_far() -> Self {
        let own = own_path().map(|path| under_mount(&path));
        let around = own.as_deref().and_then(Path::parent).map(Path::to_owned);
        Self::of(own.into_iter().chain(around).collect())
    }

    /// Those of these cgroups.
    pub fn of(dirs: Vec<PathBuf>) -> Self {
        let before = count(&dirs);
        Self { dirs, before }
    }

    /// There are more now.
    pub fn have_grown(&self) -> bool {
        count(&self.dirs) > self.before
    }
}

fn count(dirs: &[PathBuf]) -> u64 {
    let mut all = 0_u64;
    for (dir, (file, keys)) in dirs.iter().flat_map(|dir| COUNTED.map(|one| (dir, one))) {
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
        let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let hits = || LimitHits::of(dirs.iter().map(|dir| dir.path().to_owned()).collect());
        let write = |dir: usize, file: &str, text: &str| {
            fs::write(dirs[dir].path().join(file), text).unwrap();
        };
        let none = hits();
        assert!(!none.have_grown());
        write(
            0,
            "memory.events",
            "low 0\nhigh 9\nmax 7\noom 0\noom_kill 0\n",
        );
        assert!(!none.have_grown());
        write(1, "pids.events", "max 1\n");
        assert!(none.have_grown());
        let one = hits();
        assert!(!one.have_grown());
        write(
            0,
            "memory.events",
            "low 0\nhigh 9\nmax 7\noom 1\noom_kill 0\n",
        );
        assert!(one.have_grown());
        write(0, "memory.events", "oom 0\noom_kill 1\n");
        assert!(one.have_grown());
    }
}
