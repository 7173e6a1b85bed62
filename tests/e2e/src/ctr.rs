//! `ctr` as a user calls it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::node::{NAMESPACE, Node, Runtime};
use crate::process::{self, Finished, OnTerminal, Running, eventually};
use crate::tasks::Tasks;
use crate::tasks::api::Process;

/// Calls of `ctr` for one runtime in the cases' namespace.
#[derive(Clone, Debug)]
pub struct Ctr {
    node: Node,
    runtime: Runtime,
    image: &'static str,
}

impl Ctr {
    /// Calls against `node` with `runtime`.
    pub fn new(node: &Node, runtime: Runtime) -> Self {
        Self {
            node: node.clone(),
            runtime,
            image: crate::image::BASE,
        }
    }

    /// The same with another image.
    pub fn with_image(&self, image: &'static str) -> Self {
        Self {
            image,
            ..self.clone()
        }
    }

    /// How long one call may take.
    pub fn deadline(&self) -> Duration {
        Duration::from_secs(20) * self.node.slowness
    }

    /// `ctr ARGS`, not yet started.
    pub fn command<S: AsRef<str>>(&self, args: &[S]) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("--address")
            .arg(&self.node.socket)
            .args(["--namespace", NAMESPACE]);
        command.args(args.iter().map(AsRef::as_ref));
        command
    }

    /// `ctr ARGS` to its end.
    pub fn call<S: AsRef<str>>(&self, args: &[S]) -> Result<Finished> {
        process::run(&mut self.command(args), self.deadline())
    }

    /// `ctr run --runtime … FLAGS IMAGE ID COMMAND`, not yet started.
    pub fn run_command(&self, flags: &[&str], id: &str, command: &[&str]) -> Command {
        let mut args = vec!["run", "--runtime", self.runtime.ctr_name()];
        args.extend(flags);
        args.extend([self.image, id]);
        args.extend(command);
        self.command(&args)
    }

    /// `ctr run --rm` to its end.
    pub fn run(&self, flags: &[&str], id: &str, command: &[&str]) -> Result<Finished> {
        process::run(
            &mut self.run_rm_command(flags, id, command),
            self.deadline(),
        )
    }

    /// `ctr run --rm`, not yet started.
    pub fn run_rm_command(&self, flags: &[&str], id: &str, command: &[&str]) -> Command {
        let mut all = vec!["--rm"];
        all.extend(flags);
        self.run_command(&all, id, command)
    }

    /// `ctr run --rm`, started, its streams on pipes.
    pub fn start(&self, flags: &[&str], id: &str, command: &[&str]) -> Result<Running> {
        process::start(&mut self.run_rm_command(flags, id, command))
    }

    /// `ctr run --detach`: a container that goes on running.
    pub fn run_detached(&self, flags: &[&str], id: &str, command: &[&str]) -> Result<Finished> {
        // --detach keeps ctr's own streams for the container, so they must
        // not be pipes that somebody waits for.
        let mut all = vec!["--detach", "--null-io"];
        all.extend(flags);
        process::run(&mut self.run_command(&all, id, command), self.deadline())?.ok()
    }

    /// `ctr run -t --rm` on a terminal.
    pub fn run_on_terminal(
        &self,
        flags: &[&str],
        id: &str,
        command: &[&str],
    ) -> Result<OnTerminal> {
        let mut all = vec!["--tty"];
        all.extend(flags);
        OnTerminal::start(&mut self.run_rm_command(&all, id, command), 30, 100)
    }

    /// `ctr task exec` to its end.
    pub fn exec(&self, flags: &[&str], id: &str, exec: &str, command: &[&str]) -> Result<Finished> {
        process::run(
            &mut self.exec_command(flags, id, exec, command),
            self.deadline(),
        )
    }

    /// `ctr task exec`, not yet started.
    pub fn exec_command(&self, flags: &[&str], id: &str, exec: &str, command: &[&str]) -> Command {
        let mut args = vec!["task", "exec", "--exec-id", exec];
        args.extend(flags);
        args.push(id);
        args.extend(command);
        self.command(&args)
    }

    /// What containerd says of a task; `None` when there is none.
    pub fn task(&self, id: &str) -> Result<Option<Process>> {
        let tasks = Tasks::connect(self.node.socket.clone(), self.deadline())?;
        Ok(tasks.list()?.into_iter().find(|task| task.id == id))
    }

    /// The task's state as `ctr task ls` shows it; `None` when there is none.
    pub fn state(&self, id: &str) -> Result<Option<&'static str>> {
        Ok(self.task(id)?.map(|task| task.status().as_str_name()))
    }

    /// The task's process id.
    pub fn pid(&self, id: &str) -> Result<u32> {
        Ok(self.task(id)?.with_context(|| format!("no task {id}"))?.pid)
    }

    /// Waits until the task is in `state`.
    pub fn await_state(&self, id: &str, state: &str, deadline: Duration) -> Result<()> {
        eventually(&format!("{id} is {state}"), deadline, || {
            Ok((self.state(id)? == Some(state)).then_some(()))
        })
    }

    /// `ctr task delete` of a stopped task, which must know its exit code. ctr
    /// says it in a warning, its own exit code is 0.
    pub fn delete_task(&self, id: &str, code: i32) -> Result<()> {
        let done = self.call(&["task", "delete", id])?.ok()?;
        let said = done.err();
        anyhow::ensure!(
            (code == 0 && said.is_empty()) || said.contains(&format!("exit code {code}")),
            "expected exit code {code}: {}",
            done.tail()
        );
        Ok(())
    }

    /// Kills, deletes and forgets a container; a task that is gone is fine.
    pub fn remove(&self, id: &str) -> Result<()> {
        if self.state(id)?.is_some() {
            self.call(&["task", "delete", "--force", id])?;
        }
        self.call(&["container", "delete", id])?.ok()?;
        Ok(())
    }
}
