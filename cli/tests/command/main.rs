//! The program as an operator calls it: what it prints where, and how it exits.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

mod bench;
mod guest;
mod listen;
mod node;
mod streams;
mod template;
mod traces;

use node::{Node, expect, json, out};

#[test]
fn exit_codes_are_as_documented() {
    let node = Node::new();
    expect(&node.husk(&["ps"]), 0, "");
    expect(&node.husk(&["inspect", "none"]), 3, "husk ps");
    expect(&node.husk(&["surprise"]), 2, "Usage");
    expect(
        &node.husk(&["timeline", "a", "--svg", "--json"]),
        2,
        "--svg",
    );
    let file = node.path().join("new.toml");
    fs::write(&file, "kernle = '/k'").unwrap();
    let checked = node.husk(&["config", "--check", file.to_str().unwrap()]);
    expect(&checked, 4, "");
    assert!(out(&checked).contains("line 1: unknown key `kernle`"));
    node.configure("first_uid = 1");
    expect(&node.husk(&["ps"]), 1, "first_uid");
    let help = node.husk(&["--help"]);
    assert!(out(&help).contains("Exit codes:") && out(&help).contains("3  no such pod"));
}

#[test]
fn an_abandoned_pod_is_shown() {
    let node = Node::new();
    node.pod(
        "0123abc",
        r#"{"shim": {"pid": 1, "start_ticks": 1}, "machine": {"vcpus": 2, "memory_mib": 700},
            "timeline": {"request_ns": 1000000, "vmm_exec_ns": 3000000}}"#,
    );
    // Written by nobody we know.
    node.pod("9999", "not JSON");
    let list = node.husk(&["ps"]);
    expect(&list, 0, "");
    assert_eq!(out(&list).lines().count(), 2, "{}", out(&list));
    assert!(out(&list).contains("0123abc") && out(&list).contains("abandoned"));
    assert_eq!(json(&node.husk(&["ps", "--json"]))[0]["memory_mib"], 700);
    let shown = node.husk(&["inspect", "0123"]);
    assert!(out(&shown).contains("k8s.io/0123abc"), "{}", out(&shown));
    let stages = json(&node.husk(&["--json", "timeline", "0123abc"]));
    assert_eq!(stages["stages"][0]["to_ns"], 2_000_000);
    let drawn = node.husk(&["timeline", "0123abc", "--svg"]);
    assert!(out(&drawn).starts_with("<svg "));
}

#[test]
fn the_configuration_in_effect_is_shown() {
    let node = Node::new();
    node.configure("\nkernel_parameters = 'quiet'\n");
    let shown = json(&node.husk(&["config", "--json"]));
    let keys = shown["keys"].as_array().unwrap();
    let key = |name| keys.iter().find(|key| key["key"] == name).unwrap();
    assert_eq!(key("kernel_parameters")["from"]["line"], 2);
    assert!(key("kernel")["from"].is_null());
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
    let reference = node.husk(&["config", "--reference"]);
    assert_eq!(out(&reference), fs::read_to_string(page).unwrap());
}

#[test]
fn lines_to_be_added_by_hand_are_lines() {
    let node = Node::new();
    let dir = node.path().join("etc/containerd");
    fs::create_dir_all(&dir).unwrap();
    let inline = "version = 2\nplugins = { \"io.containerd.grpc.v1.cri\" = { a = 1 } }\n";
    fs::write(dir.join("config.toml"), inline).unwrap();
    let root = node.path().to_str().unwrap();
    let refused = node.husk(&["install", "--for", "containerd", "--root", root]);
    expect(
        &refused,
        1,
        "by hand:\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.\"husk\"]\n\
         runtime_type = \"io.containerd.husk.v2\"\n",
    );
}

#[test]
fn whoever_reads_may_stop() {
    let node = Node::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
    command
        .args(["config"])
        .env("HUSK_CONFIG", node.path().join("config.toml"));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdout(writer).output().unwrap();
    assert!(output.stderr.is_empty() && output.status.success());
}

#[test]
fn logs_of_one_pod_are_found() {
    let node = Node::new();
    let log = node.path().join("containerd.log");
    let line = |id: &str| {
        let mark = husk_node::pod_log::mark("k8s.io", id);
        format!("time=\"1\" level=info msg=\"guest\"{mark} console=\"of {id}\"\n")
    };
    fs::write(&log, [line("aa1"), line("bb2")].concat()).unwrap();
    let shown = node.husk(&["logs", "aa", "--file", log.to_str().unwrap()]);
    expect(&shown, 0, "");
    assert!(out(&shown).contains("of aa1") && !out(&shown).contains("bb2"));
    let none = node.husk(&["logs", "cc", "--file", log.to_str().unwrap()]);
    expect(&none, 3, "nothing of a pod");
}

#[test]
fn metrics_and_a_bundle_are_written() {
    let node = Node::new();
    node.pod("0123abc", r#"{"machine": {"memory_mib": 700}}"#);
    let file = node.path().join("husk.prom");
    let written = node.husk(&["metrics", "--output", file.to_str().unwrap()]);
    expect(&written, 0, "");
    let page = fs::read_to_string(&file).unwrap();
    assert!(page.contains("husk_pods{status=\"abandoned\"} 1"), "{page}");

    // Nor is what somebody has put in its way written to.
    let other = node.path().join("other");
    fs::write(&other, "theirs").unwrap();
    let planted = node.path().join("husk.prom.new");
    std::os::unix::fs::symlink(&other, &planted).unwrap();
    expect(
        &node.husk(&["metrics", "--output", file.to_str().unwrap()]),
        0,
        "",
    );
    assert_eq!(fs::read_to_string(&other).unwrap(), "theirs");
    assert!(!file.is_symlink() && !planted.is_symlink());
    assert_eq!(fs::read_to_string(&file).unwrap(), page);

    let file = node.path().join("bundle.tar");
    let words = ["support-bundle", "--output", file.to_str().unwrap()];
    expect(&node.husk(&words), 0, "");
    let mut archive = tar::Archive::new(fs::File::open(&file).unwrap());
    let names: Vec<_> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().into_owned())
        .collect();
    for name in [
        "version",
        "check.json",
        "config.json",
        "templates.json",
        "pods/k8s.io-0123abc/inspect.json",
        "pods/k8s.io-0123abc/timeline.json",
        "node/proc/version",
        "containerd/version",
        "husk.log",
    ] {
        let name = Path::new("husk-support").join(name);
        assert!(names.contains(&name), "{names:?} lack {name:?}");
    }
    // What is there is not overwritten.
    expect(&node.husk(&words), 1, "bundle.tar");
}
