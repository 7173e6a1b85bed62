//! `husk support-bundle`: one archive for a bug report.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use toml::{Table, Value};

use husk_node::config::Sources;

use crate::answer::Answer;
use crate::arguments::TemplateCommand;
use crate::memory::Memory;
use crate::{check, config, inspect, logs, pods, template, text, timeline};

/// Lines of logs in it at most.
const LINES: usize = 20_000;

/// What files of the node say about it that matters here.
const FILES: [&str; 9] = [
    "/etc/os-release",
    "/proc/version",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/modules",
    "/proc/pressure/memory",
    "/proc/pressure/cpu",
    "/sys/fs/cgroup/cgroup.controllers",
    "/etc/husk/config.toml",
];

/// Keys of containerd's configuration that may hold a secret, in small letters.
const SECRETS: [&str; 13] = [
    "auth", "pass", "token", "secret", "user", "header", "key", "env", "cred", "bearer", "cert",
    "sig", "args",
];

/// What stands for a secret.
const LEFT_OUT: &str = "(left out)";

/// Writes the archive.
///
/// # Errors
/// It cannot be written. What cannot be found out is told in it instead.
pub fn run(output: Option<PathBuf>, with_logs: bool) -> anyhow::Result<Answer> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let path = output.unwrap_or_else(|| format!("husk-support-{now}.tar").into());
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    let mut bundle = Bundle {
        archive: tar::Builder::new(file),
        now,
    };
    bundle.fill(with_logs)?;
    bundle.archive.into_inner()?.flush()?;
    let path = text::plain(&path.to_string_lossy());
    Ok(Answer::done(format!(
        "{path}: look through it before you pass it on\n"
    )))
}

struct Bundle<W: Write> {
    archive: tar::Builder<W>,
    now: u64,
}

impl Bundle<File> {
    fn fill(&mut self, with_logs: bool) -> anyhow::Result<()> {
        let version = concat!("husk ", env!("CARGO_PKG_VERSION"), "\n");
        self.add("version", version)?;
        self.answer("check.json", check::run(true))?;
        let loaded = Sources::of_node().load().map_err(anyhow::Error::from);
        let shown = loaded.and_then(|loaded| config::show(&loaded, true));
        self.answer("config.json", shown)?;
        let templates = template::run(&TemplateCommand::List, true);
        self.answer("templates.json", templates)?;
        match pods::state_dir().and_then(|dir| pods::all(&dir)) {
            Err(error) => self.add("pods.error", &format!("{error:#}\n"))?,
            Ok(pods) => {
                for pod in pods {
                    let seen = inspect::value(&pod, Memory::of(&pod.state));
                    let stages = timeline::stages(&pod.state.timeline);
                    let start = timeline::value(&pod.id, &stages);
                    let dir = format!("pods/{}-{}", pod.namespace, pod.id);
                    self.answer(&format!("{dir}/inspect.json"), Answer::json(&seen))?;
                    self.answer(&format!("{dir}/timeline.json"), Answer::json(&start))?;
                }
            }
        }
        for path in FILES {
            if let Ok(text) = std::fs::read_to_string(path) {
                self.add(&format!("node{path}"), &text)?;
            }
        }
        self.add("containerd/version", &say("containerd", &["--version"]))?;
        let dump = say("containerd", &["config", "dump"]);
        self.add("containerd/config.toml", &without_secrets(&dump))?;
        if with_logs {
            let lines = logs::journal(None, |log| Ok(logs::last(log, LINES, |_| true)?));
            let text = match lines {
                Ok(lines) => Vec::from(lines).join("\n") + "\n",
                Err(error) => format!("{error:#}\n"),
            };
            self.add("husk.log", &text)?;
        }
        Ok(())
    }
}

impl<W: Write> Bundle<W> {
    fn answer(&mut self, name: &str, answer: anyhow::Result<Answer>) -> io::Result<()> {
        match answer {
            Ok(answer) => self.add(name, &answer.text),
            Err(error) => self.add(&format!("{name}.error"), &format!("{error:#}\n")),
        }
    }

    fn add(&mut self, name: &str, text: &str) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(self.now);
        let path = format!("husk-support/{name}");
        self.archive.append_data(&mut header, path, text.as_bytes())
    }
}

/// What a program prints, or why it does not.
fn say(program: &str, words: &[&str]) -> String {
    match Command::new(program).args(words).output() {
        Err(error) => format!("# {program}: {error}\n"),
        Ok(done) if !done.status.success() => format!("# {program}: {}\n", done.status),
        Ok(done) => String::from_utf8_lossy(&done.stdout).into_owned(),
    }
}

fn without_secrets(config: &str) -> String {
    let Ok(mut table) = config.parse::<Table>() else {
        // What is not understood may have anything in it.
        return format!("# not understood, {} bytes\n", config.len());
    };
    hide(&mut table);
    table.to_string()
}

fn hide(table: &mut Table) {
    for (key, value) in table.iter_mut() {
        let name = key.to_ascii_lowercase();
        if SECRETS.iter().any(|secret| name.contains(secret)) {
            hide_whole(value);
        } else {
            hide_parts(value);
        }
    }
}

/// Tables stay, so that one sees what was said.
fn hide_whole(value: &mut Value) {
    match value {
        Value::Table(table) => table.iter_mut().for_each(|(_, value)| hide_whole(value)),
        Value::Array(list) => list.iter_mut().for_each(hide_whole),
        Value::String(text) if !text.is_empty() => *text = LEFT_OUT.to_owned(),
        _ => {}
    }
}

fn hide_parts(value: &mut Value) {
    match value {
        Value::Table(table) => hide(table),
        Value::Array(list) => list.iter_mut().for_each(hide_parts),
        Value::String(text) if text.contains("://") => hide_parts_of_url(text),
        _ => {}
    }
}

/// A user, and what may be a signature.
fn hide_parts_of_url(text: &mut String) {
    if text.contains('@') {
        *text = LEFT_OUT.to_owned();
    } else if let Some(at) = text.find(['?', '#']) {
        text.truncate(at + 1);
        text.push_str(LEFT_OUT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_secrets_back() {
        let config = r#"version = 2
            [plugins."io.containerd.grpc.v1.cri".registry.configs."r.example".auth]
            username = "alice"
            password = "swordfish1"
            [plugins."io.containerd.grpc.v1.cri".registry.mirrors."r.example"]
            endpoint = ["https://bob:swordfish2@r.example", "https://r.example",
                "https://m.example/v2?sig=swordfish4"]
            [stream_processors."decrypt"]
            args = ["--password", "swordfish5"]
            path = "ctd-decoder"
            [proxy_plugins.x]
            credentials = "swordfish6"
            bearer = "swordfish7"
            [plugins."io.containerd.grpc.v1.cri".registry.headers]
            X-Token = ["swordfish3"]
            [plugins."io.containerd.grpc.v1.cri".containerd]
            snapshotter = "overlayfs""#;
        let kept = without_secrets(config);
        assert!(
            !kept.contains("swordfish") && !kept.contains("alice"),
            "{kept}"
        );
        assert!(kept.contains("overlayfs") && kept.contains("\"https://r.example\""));
        assert!(kept.contains("https://m.example/v2?(left out)") && kept.contains("ctd-decoder"));
        let broken = without_secrets("password = swordfish");
        assert!(!broken.contains("swordfish"), "{broken}");
    }
}
