//! Templates, with a pretended shim that makes them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use super::node::{Node, expect, json, out};

const NAME: &str = "0123456789abcdef0123456789abcdef";
const SECOND: &str = "89abcdef0123456789abcdef01234567";
const OTHER: &str = "fedcba9876543210fedcba9876543210";

/// A node with such a shim, which runs `maker` to make a template.
fn node(maker: &str, age: u32) -> Node {
    let node = Node::new();
    let state = node.path().join("state");
    let templates = node.path().join("templates");
    node.configure(&format!(
        "state_dir = '{}'\ntemplate_dir = '{}'\ntemplate_max_age_seconds = {age}\n",
        state.display(),
        templates.display()
    ));
    fs::create_dir(node.path().join("bin")).unwrap();
    let shim = node.path().join("bin/containerd-shim-husk-v2");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = template ] || exit 9\n\
         [ \"$2\" != names ] || {{ echo {NAME}; echo {SECOND}; exit; }}\n\
         cd {} || exit\n{maker}\n",
        node.path().display()
    );
    fs::write(&shim, script).unwrap();
    fs::set_permissions(&shim, fs::Permissions::from_mode(0o755)).unwrap();
    node
}

fn husk(node: &Node, words: &[&str]) -> Output {
    let own = node.path().join("bin").display().to_string();
    let usual = std::env::var("PATH").unwrap();
    let mut command = node.command(words);
    command.env("PATH", format!("{own}:{usual}"));
    command.output().unwrap()
}

fn put(node: &Node, name: &str) {
    let dir = node.path().join("templates").join(name);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("state"), "state").unwrap();
    fs::write(dir.join("memory"), vec![1; 8192]).unwrap();
}

#[test]
fn templates_are_listed_with_what_they_are_good_for() {
    let node = node("", 3600);
    let none = husk(&node, &["template", "list"]);
    expect(&none, 0, "");
    assert_eq!(out(&none).lines().count(), 1, "{}", out(&none));
    for name in [NAME, OTHER, "0123.new", "lock"] {
        put(&node, name);
    }
    node.pod("a", &format!(r#"{{"machine": {{"template": "{OTHER}"}}}}"#));
    let failed = node.path().join(format!("templates/{SECOND}.failed"));
    fs::write(failed, "no \x1bKVM\n").unwrap();
    let shown = husk(&node, &["template", "list"]);
    let lines: Vec<&str> = out(&shown).lines().collect();
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert!(
        lines[1].starts_with(NAME) && lines[1].ends_with("  0     yes"),
        "{lines:?}"
    );
    assert!(
        lines[2].ends_with("  1     no: made from something else"),
        "{lines:?}"
    );
    let failure = format!("{SECOND} could not be made: no \\u{{1b}}KVM");
    assert_eq!(lines[3], failure);
    let told = json(&husk(&node, &["template", "list", "--json"]));
    assert_eq!(told["enabled"], true);
    assert_eq!(told["templates"][0]["fits"], true);
    assert!(
        told["templates"][0]["bytes"].as_u64() >= Some(8192),
        "{told}"
    );
    assert_eq!(told["templates"][1]["pods"], 1);
    assert_eq!(told["failed"][SECOND], "no \x1bKVM");
}

#[test]
fn dropped_templates_are_gone_and_nothing_else() {
    let node = node("", 3600);
    for name in [NAME, OTHER, "0123.new"] {
        put(&node, name);
    }
    expect(
        &husk(&node, &["template", "drop", "7"]),
        1,
        "husk template list",
    );
    let one = husk(&node, &["template", "drop", "fedc"]);
    expect(&one, 0, "");
    assert!(
        out(&one).starts_with(&format!("dropped {OTHER}, ")),
        "{}",
        out(&one)
    );
    let rest = json(&husk(&node, &["template", "drop", "--json"]));
    assert_eq!(rest["dropped"], serde_json::json!([NAME]));
    let left = fs::read_dir(node.path().join("templates")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["0123.new"]);
    assert_eq!(out(&husk(&node, &["template", "drop"])), "");
}

#[test]
fn a_drop_of_all_takes_what_others_have_left() {
    let node = node("", 3600);
    let dir = node.path().join("templates");
    let rests = ["dropped-7", "77", "new"].map(|rest| format!("{NAME}.{rest}"));
    for name in &rests {
        put(&node, name);
    }
    let failed = dir.join(format!("{NAME}.failed"));
    fs::write(&failed, "no KVM\n").unwrap();
    let lock = fs::File::create(dir.join("lock")).unwrap();
    let are_there = || rests.each_ref().map(|name| dir.join(name).exists());
    // A maker is at work.
    lock.lock().unwrap();
    expect(&husk(&node, &["template", "drop"]), 0, "");
    assert_eq!(are_there(), [true; 3]);
    lock.unlock().unwrap();
    expect(&husk(&node, &["template", "drop"]), 0, "");
    assert_eq!(are_there(), [false; 3]);
    assert!(failed.exists());
}

#[test]
fn those_are_made_that_are_not_there() {
    let maker = format!(
        "mkdir -p templates/{NAME}.new && cd templates || exit\n\
         : > {NAME}.new/state; sleep 0.5; echo > {NAME}.new/state; sleep 0.5\n\
         echo > {NAME}.new/memory; mv {NAME}.new {NAME}"
    );
    let node = node(&maker, 3600);
    // One of two.
    let half = husk(&node, &["template", "build"]);
    expect(&half, 1, &format!("{SECOND}: it was not made"));
    fs::remove_dir_all(node.path().join("templates").join(NAME)).unwrap();
    put(&node, SECOND);
    let made = husk(&node, &["template", "build"]);
    let told = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "{told}");
    assert!(
        told.ends_with("the machine boots\nthe machine is saved\n"),
        "{told}"
    );
    let lines: Vec<&str> = out(&made).lines().collect();
    assert!(lines[0].starts_with(&format!("made {NAME}, ")), "{lines:?}");
    assert!(lines[1].starts_with(SECOND), "{lines:?}");
    assert!(lines[1].ends_with("is there already"), "{lines:?}");
    let again = husk(&node, &["template", "build"]);
    expect(&again, 0, "");
    assert_eq!(out(&again).matches("is there already").count(), 2);
    let told = json(&husk(&node, &["template", "build", "--json"]));
    assert_eq!(told["templates"][0]["was_there"], true);
}

#[test]
fn what_cannot_be_made_says_why() {
    let failing = node("echo 'no /dev/kvm' >&2; exit 1", 3600);
    expect(
        &husk(&failing, &["template", "build"]),
        1,
        "husk: no /dev/kvm",
    );
    // It leaves without a word where another is at work; here none is.
    let silent = node("exit 0", 3600);
    expect(
        &husk(&silent, &["template", "build"]),
        1,
        &format!("{NAME}: it was not made"),
    );
    let off = node("", 0);
    expect(
        &husk(&off, &["template", "build"]),
        1,
        "template_max_age_seconds is 0",
    );
    let listed = husk(&off, &["template", "list"]);
    assert!(
        out(&listed).contains("templates are off"),
        "{}",
        out(&listed)
    );
}
