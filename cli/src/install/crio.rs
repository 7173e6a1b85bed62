//! CRI-O's drop-in; it merges handlers one by one.

use super::{Change, Files, Handler, dirs_made};

const FILE: &str = "/etc/crio/crio.conf.d/50-husk.conf";

/// What has to change so that CRI-O knows the handler.
///
/// # Errors
/// The drop-in cannot be read.
pub fn install(files: &Files, handler: &Handler) -> anyhow::Result<Vec<Change>> {
    let annotations = match handler.pod_annotations {
        true => "allowed_annotations = [\"io.husk\"]\n",
        false => "",
    };
    let content = format!(
        "# Made by `husk install`, and removed by `husk uninstall`.\n\
         {}\
         [crio.runtime.runtimes.{}]\n\
         runtime_path = \"/usr/bin/containerd-shim-husk-v2\"\n\
         runtime_type = \"vm\"\n\
         runtime_root = \"/run/crio-husk\"\n\
         {annotations}",
        dirs_made(files, FILE)?,
        handler.name
    );
    if files.read(FILE)?.as_ref() == Some(&content) {
        return Ok(Vec::new());
    }
    Ok(vec![Change::new(FILE, Some(content))])
}

/// What has to change so that nothing of ours is left.
///
/// # Errors
/// The drop-in cannot be read.
pub fn uninstall(files: &Files) -> anyhow::Result<Vec<Change>> {
    let there = files.read(FILE)?;
    Ok(there.map(|_| Change::new(FILE, None)).into_iter().collect())
}
