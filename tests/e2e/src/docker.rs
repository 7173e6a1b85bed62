//! `docker` as a user calls it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::image;
use crate::node::{Node, Runtime};
use crate::process::{self, Finished, OnTerminal, Running};

/// Where the daemon listens.
const SOCKET: &str = "/run/docker.sock";

/// Calls of `docker` for one runtime.
#[derive(Clone, Debug)]
pub struct Docker {
    node: Node,
    runtime: Runtime,
}

impl Docker {
    /// Calls against the daemon of this machine.
    pub fn new(node: &Node, runtime: Runtime) -> Self {
        Self {
            node: node.clone(),
            runtime,
        }
    }

    /// Why there are no calls to be made.
    pub fn missing() -> Option<String> {
        let there = Path::new(SOCKET).exists();
        (!there).then(|| format!("no Docker here: there is no {SOCKET}"))
    }

    /// How long one call may take.
    pub fn deadline(&self) -> Duration {
        Duration::from_secs(30) * self.node.slowness
    }

    /// `docker ARGS`, not yet started.
    pub fn command<S: AsRef<str>>(&self, args: &[S]) -> Command {
        let mut command = Command::new("docker");
        command.args(args.iter().map(AsRef::as_ref));
        command
    }

    /// `docker ARGS` to its end.
    pub fn call<S: AsRef<str>>(&self, args: &[S]) -> Result<Finished> {
        process::run(&mut self.command(args), self.deadline())
    }

    /// Standard output of `docker ARGS`, which must work.
    pub fn ask<S: AsRef<str>>(&self, args: &[S]) -> Result<String> {
        Ok(self.call(args)?.ok()?.out())
    }

    /// `docker run --runtime … FLAGS IMAGE COMMAND`. The image's entry point is a
    /// shell, which the command replaces.
    fn run_command(&self, flags: &[&str], command: &[&str]) -> Command {
        let mut args = vec!["run", "--runtime", self.runtime.ctr_name()];
        let (program, arguments) = command.split_first().unwrap_or((&"", &[]));
        args.extend(["--entrypoint", program]);
        args.extend(flags);
        args.push(image::BASE);
        args.extend(arguments);
        self.command(&args)
    }

    /// `docker run --rm` to its end.
    pub fn run(&self, flags: &[&str], command: &[&str]) -> Result<Finished> {
        self.start(flags, command)?.finish(self.deadline())
    }

    /// `docker run --rm`, started, its streams on pipes.
    pub fn start(&self, flags: &[&str], command: &[&str]) -> Result<Running> {
        let flags = [&["--rm"], flags].concat();
        process::start(&mut self.run_command(&flags, command))
    }

    /// `docker run --detach --name NAME`: a container that goes on running.
    pub fn run_detached(&self, name: &str, flags: &[&str], command: &[&str]) -> Result<()> {
        let flags = [&["--detach", "--name", name], flags].concat();
        process::run(&mut self.run_command(&flags, command), self.deadline())?.ok()?;
        Ok(())
    }

    /// `docker run --rm -it` on a terminal.
    pub fn run_on_terminal(&self, flags: &[&str], command: &[&str]) -> Result<OnTerminal> {
        let flags = [&["--rm", "--interactive", "--tty"], flags].concat();
        OnTerminal::start(&mut self.run_command(&flags, command), 30, 100)
    }

    /// `docker exec FLAGS NAME COMMAND` to its end.
    pub fn exec(&self, flags: &[&str], name: &str, command: &[&str]) -> Result<Finished> {
        self.call(&[&["exec"], flags, &[name], command].concat())
    }

    /// What `docker inspect` says at a JSON pointer.
    pub fn inspect(&self, name: &str, pointer: &str) -> Result<Value> {
        let said = self.ask(&["inspect", name])?;
        let said: Value = serde_json::from_str(&said)?;
        let found = said.pointer(&format!("/0{pointer}"));
        found
            .cloned()
            .with_context(|| format!("no {pointer} in {said}"))
    }

    /// The address of a container in its only network.
    pub fn address(&self, name: &str) -> Result<String> {
        let networks = self.inspect(name, "/NetworkSettings/Networks")?;
        let network = networks.as_object().and_then(|all| all.values().next());
        let address = network.and_then(|network| network["IPAddress"].as_str());
        address
            .filter(|address| !address.is_empty())
            .map(str::to_owned)
            .with_context(|| format!("no address in {networks}"))
    }

    /// `docker rm --force --volumes`.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.ask(&["rm", "--force", "--volumes", name]).map(drop)
    }
}

/// Gives the daemon the image, and has it make what stays: its cgroups, its
/// folders.
///
/// # Errors
/// It does not take the image.
pub fn warm_up(node: &Node, runtimes: &[Runtime]) -> Result<()> {
    if Docker::missing().is_some() {
        return Ok(());
    }
    for &runtime in runtimes {
        let docker = Docker::new(node, runtime);
        let archive = image::base_archive(node).display().to_string();
        let loaded = docker.ask(&["load", "--input", &archive])?;
        ensure!(loaded.contains(image::BASE), "{loaded}");
        if let Err(error) = docker.run(&[], &["true"]).and_then(Finished::ok) {
            println!("{}: warming Docker up failed: {error:#}", runtime.name());
        }
    }
    Ok(())
}

/// Removes every container, network and volume.
///
/// # Errors
/// The daemon cannot be asked.
pub fn remove_all(node: &Node) -> Result<()> {
    if Docker::missing().is_some() {
        return Ok(());
    }
    let docker = Docker::new(node, Runtime::Runc);
    let containers = docker.ask(&["ps", "--all", "--quiet"])?;
    for id in containers.split_whitespace() {
        // What can't be removed shows in the comparison that follows.
        docker.call(&["rm", "--force", "--volumes", id])?;
    }
    docker.call(&["network", "prune", "--force"])?;
    docker.call(&["volume", "prune", "--all", "--force"])?;
    Ok(())
}
