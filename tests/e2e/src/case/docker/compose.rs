//! A file of Compose whose services name the runtime.

use std::fs;

use anyhow::{Result, ensure};

use super::{Bench, Case, Skip, case, docker};
use crate::image;
use crate::process::eventually;

/// The cases of this theme.
pub const CASES: &[Case] = &[case("docker/compose", 90, compose)];

/// A server that finishes what it is sent, and who finds it by its name.
fn file(runtime: &str) -> String {
    let service = format!("image: {}\n    runtime: {runtime}\n", image::BASE);
    format!(
        "services:\n  \
           server:\n    {service}    volumes: ['kept:/data']\n    \
             entrypoint: ['probe', 'echo', '0.0.0.0:7000']\n  \
           client:\n    {service}    volumes: ['kept:/data']\n    depends_on: ['server']\n    \
             entrypoint: ['sh', '-c']\n    command:\n    \
             - |\n      \
               until probe fetch server:7000 hello; do sleep 0.2; done\n      \
               echo kept > /data/file\n      \
               exec sleep 1000\n\
         volumes:\n  kept:\n"
    )
}

/// Two services with a network and a volume of theirs: up, looked at, restarted, down.
fn compose(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    if docker.call(&["compose", "version"])?.code() != 0 {
        return Err(Skip("no docker-compose here".into()).into());
    }
    let path = bench.folder().join("compose.yaml");
    fs::write(&path, file(bench.runtime.ctr_name()))?;
    let (path, project) = (path.display().to_string(), bench.id());
    let ask = |args: &[&str]| {
        let project = ["compose", "--project-name", &project, "--file", &path];
        docker.ask(&[&project[..], args].concat())
    };
    ask(&["up", "--detach"])?;
    eventually("an answer of the server", bench.seconds(20), || {
        let log = ask(&["logs", "--no-log-prefix", "client"])?;
        Ok(log.contains("hello").then_some(()))
    })?;
    let read = || ask(&["exec", "-T", "server", "cat", "/data/file"]);
    eventually("the client's file", bench.seconds(10), || {
        Ok(read().is_ok_and(|file| file == "kept\n").then_some(()))
    })?;
    ask(&["restart", "--timeout", "1", "server"])?;
    let file = read()?;
    ensure!(file == "kept\n", "{file:?}");
    ask(&[
        "exec",
        "-T",
        "client",
        "probe",
        "fetch",
        "server:7000",
        "again",
    ])?;
    let running = ask(&["ps", "--services", "--status", "running"])?;
    let mut running: Vec<&str> = running.lines().collect();
    running.sort_unstable();
    ensure!(running == ["client", "server"], "{running:?}");
    ask(&["down", "--volumes", "--timeout", "1"])?;
    let left = docker.ask(&[
        "ps",
        "--all",
        "--quiet",
        "--filter",
        &format!("name={project}"),
    ])?;
    ensure!(left.is_empty(), "{left}");
    Ok(())
}
