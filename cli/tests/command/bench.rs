//! Starts that are measured, with a pretended `ctr` that writes what a shim would.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use super::node::{Node, expect, json, out};

/// The first start, which is not counted, takes 900 ms; then a machine boots in
/// 300 ms, and copies take 100 and 200 ms.
const CTR: &str = r#"#!/bin/sh
cd "$NODE" || exit
echo "$*" >> calls
namespace=$2
shift 2
case "$1 $2" in
    "run --detach")
        image=$6 id=$7
        [ "$image" != missing ] || { echo 'ctr: image "missing": not found' >&2; exit 1; }
        [ "$5" = io.containerd.husk.v2 ] || exit 0
        mkdir -p "state/$namespace/$id"
        [ "$image" != silent ] || exit 0
        echo >> starts
        case $(wc -l < starts) in
            1) took=900 copy=false ;;
            2) took=300 copy=false ;;
            3) took=100 copy=true ;;
            *) took=200 copy=true ;;
        esac
        echo "{\"machine\": {\"from_template\": $copy}, \"timeline\": {\"request_ns\": 1000000,
            \"vmm_exec_ns\": 2000000, \"container_started_ns\": $((took + 1))000000}}" \
            > "state/$namespace/$id/state.json"
        ;;
    "task delete") rm -r "state/$namespace/$4" 2> /dev/null || { echo "ctr: no task $4" >&2; exit 1; } ;;
    "container delete") ;;
    *) exit 9 ;;
esac
"#;

fn bench(node: &Node, words: &[&str]) -> Output {
    let bin = node.path().join("bin");
    fs::create_dir_all(&bin).unwrap();
    fs::write(bin.join("ctr"), CTR).unwrap();
    fs::set_permissions(bin.join("ctr"), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = node.command(&[&["bench"], words].concat());
    let usual = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{usual}", bin.display()));
    command.env("NODE", node.path()).output().unwrap()
}

/// How `ctr` was called, without the names of containers.
fn calls(node: &Node) -> Vec<String> {
    let calls = fs::read_to_string(node.path().join("calls")).unwrap();
    let words = |line: &str| -> Vec<String> {
        let words = line.split(' ').skip(2);
        let words = words.filter(|word| !word.starts_with("husk-bench-"));
        words.map(str::to_owned).collect()
    };
    calls.lines().map(|line| words(line).join(" ")).collect()
}

#[test]
fn starts_are_measured_in_turns() {
    let node = Node::new();
    let words = [
        "--rounds", "3", "--runc", "--json", "busybox", "--", "sleep", "9",
    ];
    let told = bench(&node, &words);
    expect(&told, 0, "");
    let told = json(&told);
    let contenders = told["contenders"].as_array().unwrap();
    let seen: Vec<_> = contenders
        .iter()
        .map(|it| (it["from_template"].as_bool(), it["starts"].as_u64()))
        .collect();
    assert_eq!(
        seen,
        [
            (Some(true), Some(2)),
            (Some(false), Some(1)),
            (None, Some(3))
        ],
        "{told}"
    );
    // From the VMM's exec, 1 ms after the request, to the start.
    let stage = &contenders[0]["stages"][1];
    assert_eq!(stage["took"]["median_ns"], 149_000_000, "{told}");
    assert_eq!(stage["took"]["least_ns"], 99_000_000, "{told}");
    for contender in contenders {
        let of = |what: &str| contender[what]["median_ns"].as_u64();
        assert!(of("started") > Some(0) && of("removed") > Some(0), "{told}");
    }

    let run = |runtime| format!("run --detach --null-io --runtime {runtime} busybox sleep 9");
    let round = ["io.containerd.husk.v2", "io.containerd.runc.v2"].map(|runtime| {
        let removal = ["task delete --force", "container delete"];
        [run(runtime), removal[0].to_owned(), removal[1].to_owned()]
    });
    assert_eq!(
        calls(&node),
        [
            round.concat(),
            round.concat(),
            round.concat(),
            round.concat()
        ]
        .concat()
    );
}

#[test]
fn a_table_says_how_pods_began() {
    let node = Node::new();
    let told = bench(&node, &["-n", "2", "busybox"]);
    expect(&told, 0, "");
    let heading = out(&told).lines().next().unwrap();
    assert!(heading.contains("HUSK, COPY  HUSK, BOOT") && !heading.contains("RUNC"));
    assert!(out(&told).contains("99.0 ms") && out(&told).contains("299.0 ms"));
    assert!(!out(&told).contains("899.0 ms"), "{}", out(&told));
}

#[test]
fn what_cannot_be_started_says_why_and_leaves_nothing() {
    let node = Node::new();
    let missing = bench(&node, &["--namespace", "k8s.io", "missing"]);
    expect(&missing, 1, "image \"missing\": not found");
    let made = fs::read_to_string(node.path().join("calls")).unwrap();
    let lines: Vec<_> = made.lines().collect();
    assert_eq!(lines.len(), 3, "{made}");
    assert!(
        lines
            .iter()
            .all(|line| line.starts_with("--namespace k8s.io "))
    );
    assert!(lines[2].contains("container delete husk-bench-"), "{made}");

    let silent = bench(&node, &["silent"]);
    expect(&silent, 1, "what the shim writes");
    let left = fs::read_dir(node.path().join("state/default")).unwrap();
    assert_eq!(left.count(), 0);

    expect(&bench(&node, &["--rounds", "0", "busybox"]), 2, "--rounds");
}
