//! A container of an OCI spec that a case writes itself, for what `ctr run` has
//! no flag for.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tar::Archive;

use crate::case::Bench;
use crate::node::NAMESPACE;
use crate::process::{self, Finished};

/// A layer is larger than an image's manifests.
const LAYER_MIN_BYTES: u64 = 256 << 10;

/// Runs `command` to its end in a container of containerd's default spec, which
/// `change` may alter, on a root of its own with the test image's files.
pub fn run(bench: &Bench, command: &[&str], change: impl FnOnce(&mut Value)) -> Result<Finished> {
    call(bench, &["--rm"], &bench.id(), command, change)
}

/// The same with a container of this id that goes on.
pub fn start(
    bench: &Bench,
    id: &str,
    command: &[&str],
    change: impl FnOnce(&mut Value),
) -> Result<()> {
    call(bench, &["--detach", "--null-io"], id, command, change)?.ok()?;
    Ok(())
}

fn call(
    bench: &Bench,
    flags: &[&str],
    id: &str,
    command: &[&str],
    change: impl FnOnce(&mut Value),
) -> Result<Finished> {
    let root = bench.folder().join(format!("{id}.root"));
    unpack(&bench.node.work.join("base.tar"), &root)?;
    let shown = bench.ctr.call(&["oci", "spec"])?.ok()?;
    let mut spec: Value = serde_json::from_slice(&shown.stdout).with_context(|| shown.tail())?;
    spec["root"] = json!({ "path": root.display().to_string() });
    spec["process"]["args"] = json!(command);
    spec["process"]["env"] = json!(["PATH=/bin"]);
    spec["linux"]["cgroupsPath"] = json!(format!("/{NAMESPACE}/{id}"));
    let has = |list: &Value, key: &str, value: &str| {
        let mut all = list.as_array().into_iter().flatten();
        all.any(|entry| entry[key] == value)
    };
    // As the CRI and Docker have it: the container sees its own cgroup.
    let namespace = json!({ "type": "cgroup" });
    if !has(&spec["linux"]["namespaces"], "type", "cgroup") {
        push(&mut spec["linux"]["namespaces"], namespace);
    }
    if !has(&spec["mounts"], "destination", "/sys/fs/cgroup") {
        let mount = json!({
            "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"],
        });
        push(&mut spec["mounts"], mount);
    }
    change(&mut spec);
    let file = bench.folder().join(format!("{id}.json"));
    fs::write(&file, serde_json::to_vec_pretty(&spec)?)?;
    let file = file.display().to_string();
    let runtime = bench.runtime.ctr_name();
    let args = ["--runtime", runtime, "--config", &file, id];
    let args = [&["run"], flags, &args].concat();
    let mut command: Command = bench.ctr.command(&args);
    process::run(&mut command, bench.ctr.deadline())
}

/// Adds to a list of a spec.
pub fn push(list: &mut Value, entry: Value) {
    if let Some(list) = list.as_array_mut() {
        list.push(entry);
    }
}

/// Unpacks the layers of an OCI archive that the runner has made.
fn unpack(archive: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(root)?;
    let file = File::open(archive).with_context(|| format!("open {}", archive.display()))?;
    let mut layers = 0;
    for entry in Archive::new(file).entries()? {
        let entry = entry?;
        if entry.path()?.starts_with("blobs") && entry.size() > LAYER_MIN_BYTES {
            Archive::new(entry).unpack(root)?;
            layers += 1;
        }
    }
    ensure!(layers > 0, "no layer in {}", archive.display());
    Ok(())
}
