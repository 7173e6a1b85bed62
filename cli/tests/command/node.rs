//! A node of a test's own, and what the command says there.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output};

use husk_node::process::Process;
use serde_json::{Value, json};

/// A node's configuration and state directory of its own.
pub struct Node(tempfile::TempDir);

impl Node {
    pub fn new() -> Self {
        let node = Self(tempfile::tempdir().unwrap());
        let state = node.path().join("state");
        node.configure(&format!("state_dir = '{}'\n", state.display()));
        node
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn configure(&self, text: &str) {
        fs::write(self.path().join("config.toml"), text).unwrap();
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
        command
            .args(words)
            .env("HUSK_CONFIG", self.path().join("config.toml"));
        command
    }

    pub fn husk(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Writes a pod's state in one step, as its shim does.
    pub fn pod(&self, id: &str, state: &str) {
        let dir = self.path().join("state/k8s.io").join(id);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("state.new"), state).unwrap();
        fs::rename(dir.join("state.new"), dir.join("state.json")).unwrap();
    }

    /// Removes what there is of the last pod, as its shim does.
    pub fn remove_last(&self, id: &str) {
        let namespace = self.path().join("state/k8s.io");
        fs::remove_file(namespace.join(id).join("state.json")).unwrap();
        fs::remove_dir(namespace.join(id)).unwrap();
        fs::remove_dir(&namespace).unwrap();
        fs::remove_dir(self.path().join("state")).unwrap();
    }
}

/// A process that stands for one of a pod's.
pub struct Part(Child);

impl Part {
    pub fn start(words: &[&str]) -> Self {
        let mut command = Command::new(words[0]);
        Self(command.args(&words[1..]).spawn().unwrap())
    }

    /// As the state file has it.
    pub fn value(&self) -> Value {
        let process = Process::find(self.0.id()).unwrap();
        json!({ "pid": process.pid, "start_ticks": process.start_ticks })
    }

    pub fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.end();
    }
}

pub fn out(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

pub fn json(output: &Output) -> Value {
    serde_json::from_str(out(output)).unwrap()
}

#[track_caller]
pub fn expect(output: &Output, code: i32, complaint: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(error.contains(complaint), "{error:?} lacks {complaint:?}");
    assert_eq!(error.is_empty(), complaint.is_empty(), "{error}");
}
