//! Docker's daemon.json.

use anyhow::{Context, ensure};
use serde_json::{Map, Value, json};

use super::{Change, Files, Handler};

const FILE: &str = "/etc/docker/daemon.json";

/// The file as it was before the first installation, byte for byte.
const BEFORE: &str = "/etc/docker/daemon.json.before-husk";

fn entry() -> Value {
    json!({ "runtimeType": "io.containerd.husk.v2" })
}

fn parse(text: &str) -> anyhow::Result<Map<String, Value>> {
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_str(text).with_context(|| format!("{FILE} is no JSON object"))
}

fn write(path: &str, content: Option<String>) -> Change {
    let path = path.to_owned();
    Change { path, content }
}

/// What has to change so that `docker run --runtime` knows the handler.
///
/// # Errors
/// The file is not understood, or has another runtime of that name.
pub fn install(files: &Files, handler: &Handler) -> anyhow::Result<Vec<Change>> {
    let written = files.read(FILE)?;
    let mut config = parse(written.as_deref().unwrap_or_default())?;
    let runtimes = config.entry("runtimes").or_insert_with(|| json!({}));
    let runtimes = runtimes
        .as_object_mut()
        .with_context(|| format!("`runtimes` in {FILE} is no object"))?;
    if let Some(there) = runtimes.get(&handler.name) {
        ensure!(
            *there == entry(),
            "{FILE} has a runtime {:?} already, which is another; choose a name with --handler",
            handler.name
        );
        return Ok(Vec::new());
    }
    runtimes.insert(handler.name.clone(), entry());
    let mut changes = Vec::new();
    if let Some(before) = written.filter(|_| !files.has(BEFORE)) {
        changes.push(write(BEFORE, Some(before)));
    }
    changes.push(write(FILE, Some(pretty(&config)?)));
    Ok(changes)
}

/// What has to change so that nothing of ours is left.
///
/// # Errors
/// The file is not understood.
pub fn uninstall(files: &Files, handler: &Handler) -> anyhow::Result<Vec<Change>> {
    let before = files.read(BEFORE)?;
    let mut changes = Vec::new();
    if before.is_some() {
        changes.push(write(BEFORE, None));
    }
    let Some(written) = files.read(FILE)? else {
        return Ok(changes);
    };
    let mut config = parse(&written)?;
    let runtimes = config.get_mut("runtimes").and_then(Value::as_object_mut);
    let is_there = runtimes
        .as_ref()
        .is_some_and(|runtimes| runtimes.get(&handler.name) == Some(&entry()));
    let Some(runtimes) = runtimes.filter(|_| is_there) else {
        return Ok(changes);
    };
    runtimes.remove(&handler.name);
    if runtimes.is_empty() {
        config.remove("runtimes");
    }
    let was = before.as_deref().map(parse).transpose()?;
    let content = match (was, before) {
        // Nobody else has changed anything since.
        (Some(was), Some(before)) if same(&was, &config) => Some(before),
        (None, _) if config.is_empty() => None,
        _ => Some(pretty(&config)?),
    };
    changes.push(write(FILE, content));
    Ok(changes)
}

/// Equal but for an empty list of runtimes.
fn same(one: &Map<String, Value>, other: &Map<String, Value>) -> bool {
    let bare = |config: &Map<String, Value>| {
        let mut config = config.clone();
        if config.get("runtimes") == Some(&json!({})) {
            config.remove("runtimes");
        }
        config
    };
    bare(one) == bare(other)
}

fn pretty(config: &Map<String, Value>) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(config)? + "\n")
}
