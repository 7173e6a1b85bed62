//! Docker's daemon.json.

use anyhow::{Context, ensure};
use serde_json::{Map, Value, json};

use super::{Change, Files, Handler};

const FILE: &str = "/etc/docker/daemon.json";

/// The file as it was before the first installation, byte for byte.
const BEFORE: &str = "/etc/docker/daemon.json.before-husk";

const TYPE: &str = "io.containerd.husk.v2";

fn entry() -> Value {
    json!({ "runtimeType": TYPE })
}

fn parse(text: &str) -> anyhow::Result<Map<String, Value>> {
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_str(text).with_context(|| format!("{FILE} is no JSON object"))
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
        changes.push(Change::new(BEFORE, Some(before)).like(FILE));
    }
    changes.push(Change::new(FILE, Some(pretty(&config)?)));
    Ok(changes)
}

/// What has to change so that nothing of ours is left, whatever name it has. The
/// file of before goes last: until then it is needed.
///
/// # Errors
/// The file is not understood.
pub fn uninstall(files: &Files) -> anyhow::Result<Vec<Change>> {
    let before = files.read(BEFORE)?;
    let mut changes = Vec::new();
    if let Some(written) = files.read(FILE)? {
        changes.extend(without_ours(&written, before.as_deref())?);
    }
    if before.is_some() {
        changes.push(Change::new(BEFORE, None));
    }
    Ok(changes)
}

fn without_ours(written: &str, before: Option<&str>) -> anyhow::Result<Option<Change>> {
    let mut config = parse(written)?;
    let runtimes = config.get_mut("runtimes").and_then(Value::as_object_mut);
    let Some(runtimes) = runtimes else {
        return Ok(None);
    };
    let count = runtimes.len();
    runtimes.retain(|_, runtime| runtime.get("runtimeType") != Some(&json!(TYPE)));
    if runtimes.len() == count {
        return Ok(None);
    }
    if runtimes.is_empty() {
        config.remove("runtimes");
    }
    let content = match before {
        // Nobody else has changed anything since.
        Some(before) if same(&parse(before)?, &config) => Some(before.to_owned()),
        None if config.is_empty() => None,
        _ => Some(pretty(&config)?),
    };
    Ok(Some(Change::new(FILE, content)))
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
