//! What of a node can be seen from outside the pods: taken before and after a
//! case, it must be equal.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::node::Node;
use crate::template;

/// A multiset of lines, each beginning with the kind of thing it names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState(BTreeMap<String, usize>);

impl HostState {
    /// Looks at everything.
    pub fn capture(node: &Node) -> Self {
        let mut state = Self::default();
        state.processes();
        state.mounts();
        state.names("link", Path::new("/sys/class/net"));
        state.names("block device", Path::new("/sys/block"));
        state.cgroups(Path::new("/sys/fs/cgroup"));
        state.sockets();
        state.firewall();
        for folder in ["/run", "/tmp", "/dev/shm", "/var/lib/cni", "/var/run/netns"] {
            state.files(Path::new(folder), node);
        }
        state.files(&node.root, node);
        state.files(&node.state, node);
        state
    }

    fn add(&mut self, kind: &str, name: impl AsRef<str>) {
        *self
            .0
            .entry(format!("{kind} {}", name.as_ref()))
            .or_default() += 1;
    }

    /// Processes but for the kernel's, this one's ancestors and its children;
    /// and how many namespaces of each type they live in.
    fn processes(&mut self) {
        let mut namespaces: BTreeMap<&str, std::collections::BTreeSet<String>> = BTreeMap::new();
        let own_session = session_of("self");
        for pid in
            names_in(Path::new("/proc")).filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        {
            let folder = Path::new("/proc").join(&pid);
            let command = fs::read(folder.join("cmdline")).unwrap_or_default();
            let (parent, session) = (parent_of(&pid), session_of(&pid));
            if parent == Some(2) || pid == "2" || session == own_session {
                continue;
            }
            for kind in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
                if let Ok(namespace) = fs::read_link(folder.join("ns").join(kind)) {
                    namespaces
                        .entry(kind)
                        .or_default()
                        .insert(namespace.display().to_string());
                }
            }
            let mut command = String::from_utf8_lossy(&command).replace('\0', " ");
            if command.is_empty() {
                let name = fs::read_to_string(folder.join("comm")).unwrap_or_default();
                command = format!("[{}]", name.trim());
            }
            self.add("process", command.trim());
        }
        for (kind, found) in namespaces {
            self.0
                .insert(format!("namespaces of type {kind}"), found.len());
        }
    }

    fn mounts(&mut self) {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for line in table.lines() {
            let mut fields = line.split(' ');
            let target = fields.nth(4).unwrap_or_default().to_owned();
            let kind = fields
                .skip_while(|field| *field != "-")
                .nth(1)
                .unwrap_or_default();
            self.add("mount", format!("{target} ({kind})"));
        }
    }

    fn names(&mut self, kind: &str, folder: &Path) {
        // Snapshots are disks of the device mapper with one snapshotter of
        // containerd's, which collects them when it pleases.
        for name in names_in(folder).filter(|name| !name.starts_with("dm-")) {
            self.add(kind, name);
        }
    }

    fn cgroups(&mut self, folder: &Path) {
        for name in names_in(folder) {
            let path = folder.join(name);
            if path.is_dir() && !path.is_symlink() {
                self.add("cgroup", path.display().to_string());
                self.cgroups(&path);
            }
        }
    }

    /// Named and abstract unix sockets, and TCP ports that are listened on.
    fn sockets(&mut self) {
        for line in fs::read_to_string("/proc/net/unix")
            .unwrap_or_default()
            .lines()
            .skip(1)
        {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // Accepted connections repeat their listener's name; flag 0x10000
            // marks the listener itself.
            if let (Some(name), Some(&"00010000")) = (fields.get(7), fields.get(3)) {
                self.add("unix socket", name);
            }
        }
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            for line in fs::read_to_string(table)
                .unwrap_or_default()
                .lines()
                .skip(1)
            {
                let fields: Vec<&str> = line.split_whitespace().collect();
                if let (Some(address), Some(&"0A")) = (fields.get(1), fields.get(3)) {
                    // containerd takes another port each time it starts.
                    let address = address.split(':').next().unwrap_or_default();
                    self.add("listening on", address);
                }
            }
        }
    }

    fn firewall(&mut self) {
        let Ok(rules) = Command::new("nft")
            .args(["--stateless", "list", "ruleset"])
            .output()
        else {
            return;
        };
        for line in String::from_utf8_lossy(&rules.stdout).lines() {
            self.add("firewall", line.trim());
        }
    }

    fn files(&mut self, folder: &Path, node: &Node) {
        for name in names_in(folder) {
            let path = folder.join(name);
            let shown = path.display().to_string();
            // The runner's own; the content store, which the images fill; and
            // snapshots, which containerd collects when it pleases.
            let ours = path.starts_with(&node.work);
            // Docker's daemon drops what it tried at its start when it pleases.
            let dockers = shown.starts_with("/run/docker/netns/");
            // A template that is made, or given up, is the node's and not a pod's.
            let templates = path.starts_with(template::FOLDER);
            if ours
                || dockers
                || templates
                || shown.ends_with(".content")
                || shown.ends_with("/snapshots")
            {
                continue;
            }
            if path.is_dir() && !path.is_symlink() {
                self.files(&path, node);
            }
            self.add("file", shown);
        }
    }

    /// What was added (`+`) and what went away (`-`) since `before`.
    pub fn difference(&self, before: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for (name, count) in &self.0 {
            let earlier = before.0.get(name).copied().unwrap_or(0);
            if *count > earlier {
                lines.push(format!("+{} {name}", count - earlier));
            }
        }
        for (name, count) in &before.0 {
            let now = self.0.get(name).copied().unwrap_or(0);
            if *count > now {
                lines.push(format!("-{} {name}", count - now));
            }
        }
        lines
    }

    /// Waits until the node looks as it did, but for what does not count.
    pub fn await_same(
        &self,
        node: &Node,
        patience: Duration,
        counts: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let begun = Instant::now();
        loop {
            let mut left = Self::capture(node).difference(self);
            left.retain(|line| counts(line));
            if left.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > patience {
                let shown: Vec<&str> = left.iter().take(30).map(String::as_str).collect();
                bail!(
                    "{} things differ from before:\n{}",
                    left.len(),
                    shown.join("\n")
                );
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Waits until the node no longer changes: containerd collects its garbage a
/// while after a removal.
pub fn await_rest(node: &Node, patience: Duration) -> Result<()> {
    let begun = Instant::now();
    let mut last = HostState::capture(node);
    loop {
        std::thread::sleep(Duration::from_secs(2));
        let now = HostState::capture(node);
        let moved = now.difference(&last);
        if moved.is_empty() {
            return Ok(());
        }
        ensure!(
            begun.elapsed() < patience,
            "the node does not come to rest: {moved:?}"
        );
        last = now;
    }
}

fn names_in(folder: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

/// Fields of /proc/PID/stat after the command, which may hold anything.
fn stat_field(pid: &str, index: usize) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(index)?.parse().ok()
}

fn parent_of(pid: &str) -> Option<i32> {
    stat_field(pid, 1)
}

fn session_of(pid: &str) -> Option<i32> {
    stat_field(pid, 3)
}
