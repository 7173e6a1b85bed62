//! A network namespace that a case builds itself, as a CNI plugin or Docker
//! would have.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::{self, eventually};

/// How long a change of the network may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// A namespace that lives as long as this, and interfaces of the node that go
/// with it.
pub struct Netns {
    holder: Child,
    links: Vec<String>,
}

impl Netns {
    /// Makes an empty one, its loopback up.
    pub fn make() -> Result<Self> {
        let holder = Command::new("unshare")
            .args(["--net", "sleep", "100000"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("start unshare")?;
        let netns = Self {
            holder,
            links: Vec::new(),
        };
        let own = fs::read_link("/proc/self/ns/net")?;
        eventually("a network namespace", DEADLINE, || {
            Ok((fs::read_link(netns.path())? != own).then_some(()))
        })?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Where it is.
    pub fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.holder.id())
    }

    /// Value of ctr's `--with-ns`.
    pub fn flag(&self) -> String {
        format!("network:{}", self.path())
    }

    /// The process that holds it, as ip(8) names namespaces.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// `ip ARGUMENTS` in it.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.path()))
            .arg("ip")
            .args(arguments.split_whitespace());
        finished(command, arguments)
    }

    /// Remembers an interface of the node's that goes with the namespace.
    pub fn owns(&mut self, link: &str) {
        self.links.push(link.to_owned());
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // What stays is found by the check for leftovers.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        for link in &self.links {
            let _ = node_ip(&format!("link delete {link}"));
        }
    }
}

/// `ip ARGUMENTS` on the node.
pub fn node_ip(arguments: &str) -> Result<String> {
    let mut command = Command::new("ip");
    command.args(arguments.split_whitespace());
    finished(command, arguments)
}

fn finished(mut command: Command, arguments: &str) -> Result<String> {
    let done = process::run(&mut command, DEADLINE)?;
    let done = done.ok().with_context(|| format!("ip {arguments}"))?;
    Ok(done.out())
}
