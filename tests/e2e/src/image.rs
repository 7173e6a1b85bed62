//! The images that the cases run, made offline: busybox, the probe and a few
//! files as an OCI archive.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::cri::Cri;
use crate::cri::api::StatusResponse;
use crate::node::{CRI_NAMESPACE, NAMESPACE, Node};
use crate::process;

/// The image that most cases run.
pub const BASE: &str = "husk.test/base:1";

const FILES: &[(&str, &str)] = &[
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000:web:/home/web:/bin/sh\n",
    ),
    ("etc/group", "root:x:0:\nweb:x:1000:\nextra:x:2000:web\n"),
    ("etc/motd", "a file of the image\n"),
];

/// Makes the images and gives them to both namespaces of `node`; the sandbox
/// image that the CRI is configured with only where it is missing. containerd 2
/// does not tell its name: there the node must have it.
pub fn install_for(node: &Node, probe: &Path, busybox: &Path) -> Result<()> {
    let cri = Cri::connect(node.socket.clone(), Duration::from_secs(30) * node.slowness)?;
    let pause_name = pause_name(&cri.status()?);
    let base = base_archive(node);
    archive(&base, BASE, &[base_layer(probe, busybox)?], &["/bin/sh"])?;
    import(node, NAMESPACE, &base)?;
    import(node, CRI_NAMESPACE, &base)?;
    let known = ctr(
        node,
        CRI_NAMESPACE,
        &["images".as_ref(), "list".as_ref(), "--quiet".as_ref()],
    )?;
    if let Some(pause_name) = pause_name
        && !known.lines().any(|name| name == pause_name)
    {
        let pause = node.work.join("pause.tar");
        archive(
            &pause,
            &pause_name,
            &[pause_layer(probe)?],
            &["/probe", "pause"],
        )?;
        import(node, CRI_NAMESPACE, &pause)?;
    }
    Ok(())
}

/// The archive of [`BASE`], once it is installed.
pub fn base_archive(node: &Node) -> PathBuf {
    node.work.join("base.tar")
}

/// Gives the cases' namespace an image without layers.
pub fn install_empty(node: &Node, name: &str) -> Result<()> {
    let file = node.work.join("empty.tar");
    archive(&file, name, &[], &["/nothing"])?;
    let imported = import(node, NAMESPACE, &file);
    fs::remove_file(&file)?;
    imported
}

/// Gives the cases' namespace an image of the probe and `count` layers more, each
/// with one file in `/layers`.
pub fn install_layers(node: &Node, name: &str, count: usize) -> Result<()> {
    let mut layers = vec![pause_layer(&node.work.join("probe"))?];
    for number in 0..count {
        let mut layer = Builder::new(Vec::new());
        let path = format!("layers/{number}");
        entry(&mut layer, &path, EntryType::Regular, 0o644, &[])?;
        layers.push(layer.into_inner()?);
    }
    let file = node.work.join("layers.tar");
    archive(&file, name, &layers, &["/probe"])?;
    let imported = import(node, NAMESPACE, &file);
    fs::remove_file(&file)?;
    imported
}

fn import(node: &Node, namespace: &str, file: &Path) -> Result<()> {
    ctr(
        node,
        namespace,
        &["images".as_ref(), "import".as_ref(), file.as_os_str()],
    )
    .map(drop)
}

fn ctr(node: &Node, namespace: &str, args: &[&OsStr]) -> Result<String> {
    let mut command = Command::new("ctr");
    command
        .arg("--address")
        .arg(&node.socket)
        .args(["--namespace", namespace])
        .args(args);
    Ok(
        process::run(&mut command, Duration::from_secs(60) * node.slowness)?
            .ok()?
            .out(),
    )
}

/// The sandbox image that containerd is configured with.
fn pause_name(status: &StatusResponse) -> Option<String> {
    let config: Value = serde_json::from_str(status.info.get("config")?).ok()?;
    ["/sandboxImage", "/pinnedImages/sandbox"]
        .iter()
        .find_map(|path| config.pointer(path)?.as_str().map(str::to_owned))
}

fn base_layer(probe: &Path, busybox: &Path) -> Result<Vec<u8>> {
    let mut layer = Builder::new(Vec::new());
    for folder in [
        "bin", "dev", "etc", "home", "mnt", "proc", "root", "run", "sys", "usr", "var",
    ] {
        entry(&mut layer, folder, EntryType::Directory, 0o755, &[])?;
    }
    entry(&mut layer, "tmp", EntryType::Directory, 0o1777, &[])?;
    for (path, text) in FILES {
        entry(&mut layer, path, EntryType::Regular, 0o644, text.as_bytes())?;
    }
    entry(
        &mut layer,
        "bin/not-executable",
        EntryType::Regular,
        0o644,
        b"#!/bin/sh\n",
    )?;
    entry(
        &mut layer,
        "bin/busybox",
        EntryType::Regular,
        0o755,
        &read(busybox)?,
    )?;
    entry(
        &mut layer,
        "bin/probe",
        EntryType::Regular,
        0o755,
        &read(probe)?,
    )?;
    // Who executes it becomes root, unless that is forbidden.
    entry(
        &mut layer,
        "bin/setuid-probe",
        EntryType::Regular,
        0o4755,
        &read(probe)?,
    )?;
    let applets = process::run(Command::new(busybox).arg("--list"), Duration::from_secs(30))?
        .ok()?
        .out();
    for applet in applets.lines().filter(|name| *name != "busybox") {
        link(&mut layer, &format!("bin/{applet}"), "busybox")?;
    }
    Ok(layer.into_inner()?)
}

fn pause_layer(probe: &Path) -> Result<Vec<u8>> {
    let mut layer = Builder::new(Vec::new());
    entry(
        &mut layer,
        "probe",
        EntryType::Regular,
        0o755,
        &read(probe)?,
    )?;
    Ok(layer.into_inner()?)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn entry(
    tar: &mut Builder<Vec<u8>>,
    path: &str,
    kind: EntryType,
    mode: u32,
    bytes: &[u8],
) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    Ok(tar.append_data(&mut header, path, bytes)?)
}

fn link(tar: &mut Builder<Vec<u8>>, path: &str, target: &str) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Symlink);
    header.set_mode(0o777);
    header.set_size(0);
    Ok(tar.append_link(&mut header, path, target)?)
}

/// Writes an OCI image layout as a tar archive.
fn archive(file: &Path, name: &str, layers: &[Vec<u8>], entrypoint: &[&str]) -> Result<()> {
    let diff_ids: Vec<_> = layers.iter().map(|layer| digest(layer)).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Entrypoint": entrypoint,
            "Env": ["PATH=/bin", "FROM_IMAGE=yes"],
            "WorkingDir": "/",
        },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = serde_json::to_vec(&config)?;
    let of_layer = |layer: &Vec<u8>| descriptor("application/vnd.oci.image.layer.v1.tar", layer);
    let layer_descriptors: Vec<_> = layers.iter().map(of_layer).collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": layer_descriptors,
    });
    let manifest = serde_json::to_vec(&manifest)?;
    let mut in_index = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    in_index["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    in_index["annotations"] = json!({ "io.containerd.image.name": name });
    let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": [in_index] }))?;

    // The same, as Docker loads it.
    let blob_path = |blob: &[u8]| {
        let digest = digest(blob);
        format!("blobs/sha256/{}", digest.trim_start_matches("sha256:"))
    };
    let layer_paths: Vec<_> = layers.iter().map(|layer| blob_path(layer)).collect();
    let for_docker = serde_json::to_vec(&json!([{
        "Config": blob_path(&config),
        "RepoTags": [name],
        "Layers": layer_paths,
    }]))?;

    let mut tar = Builder::new(Vec::new());
    entry(
        &mut tar,
        "oci-layout",
        EntryType::Regular,
        0o644,
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    entry(&mut tar, "index.json", EntryType::Regular, 0o644, &index)?;
    entry(
        &mut tar,
        "manifest.json",
        EntryType::Regular,
        0o644,
        &for_docker,
    )?;
    for blob in layers.iter().chain([&config, &manifest]) {
        entry(&mut tar, &blob_path(blob), EntryType::Regular, 0o644, blob)?;
    }
    let bytes = tar.into_inner()?;
    fs::File::create(file)
        .and_then(|mut file| file.write_all(&bytes))
        .with_context(|| format!("write {}", file.display()))
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(blob), "size": blob.len() })
}

/// SHA-256 in hexadecimal.
pub fn sha256(blob: &[u8]) -> String {
    Sha256::digest(blob)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn digest(blob: &[u8]) -> String {
    format!("sha256:{}", sha256(blob))
}
