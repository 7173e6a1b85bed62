//! containerd's configuration.
//!
//! containerd 1.7 replaces the whole section of a plugin by what an imported file
//! has of it: a drop-in with our handler alone would take the node's other CRI
//! settings away. So in a file of version 2, which 1.7 may read, the handler
//! stands in a marked block of its own at the end. Version 3 is read by
//! containerd 2 alone, which merges; there it is a drop-in.

use anyhow::{Context, bail, ensure};
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::{Change, DIR_TOO, Files, Handler, dirs_made};

const FILE: &str = "/etc/containerd/config.toml";
const DROP_INS: &str = "/etc/containerd/conf.d";
const DROP_IN: &str = "/etc/containerd/conf.d/husk.toml";

/// Begins with the end of a last line that has none.
const BEGIN: &str = "\n# Begin of what `husk install` added.\n";
const END: &str = "# End of what `husk install` added.\n";

/// Said of a file that would not be there otherwise.
const MADE: &str = "# Made by `husk install`, and removed by `husk uninstall`.\n";

/// What else such a file needs.
const VERSION: &str = "version = 2\n";

/// What the plugin that has pods is called, among those that are turned off.
const CRI: [&str; 3] = [
    "cri",
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.runtime",
];

/// The section of the CRI plugin that has handlers, by the file's version.
fn section(version: i64) -> &'static str {
    match version {
        2 => "io.containerd.grpc.v1.cri",
        _ => "io.containerd.cri.v1.runtime",
    }
}

fn handler_lines(version: i64, handler: &Handler) -> String {
    let (section, name) = (section(version), &handler.name);
    let mut lines = format!(
        "[plugins.\"{section}\".containerd.runtimes.\"{name}\"]\n\
         runtime_type = \"io.containerd.husk.v2\"\n"
    );
    if handler.pod_annotations {
        lines.push_str(
            "pod_annotations = [\"io.husk.*\"]\ncontainer_annotations = [\"io.husk.*\"]\n",
        );
    }
    lines
}

fn block(handler: &Handler) -> String {
    format!("{BEGIN}{}{END}", handler_lines(2, handler))
}

/// What has to change so that containerd knows the handler.
///
/// # Errors
/// The configuration is not understood, or has a handler of that name already.
pub fn install(files: &Files, handler: &Handler) -> anyhow::Result<Vec<Change>> {
    let written = files.read(FILE)?;
    // What an earlier run did is done anew, so that it may be changed.
    let clean = written.as_deref().map(without_ours).transpose()?.flatten();
    let mut changes = Vec::new();
    let main = match &clean {
        // containerd 2.2 and later reads drop-ins without a file of its own.
        None if written.is_none() && files.has(DROP_INS) => {
            changes.push(drop_in(files, handler)?);
            None
        }
        None => Some(format!(
            "{MADE}{}{VERSION}{}",
            dirs_made(files, FILE)?,
            block(handler)
        )),
        Some(text) => {
            let parsed: Table = parse(FILE, text)?;
            match parsed.get("version").and_then(Value::as_integer) {
                Some(2) => Some(with_block(files, text, &parsed, handler)?),
                Some(3..) => {
                    refuse_twice(&parsed, 3, handler)?;
                    changes.push(drop_in(files, handler)?);
                    Some(with_import(text, &parsed)?)
                }
                _ => bail!(
                    "{FILE} has no `version = 2` or `version = 3`; such a file is of an older \
                     containerd: run `containerd config migrate` first"
                ),
            }
        }
    };
    if let Some(content) = main {
        changes.push(Change::new(FILE, Some(content)));
    }
    changes_only(files, changes)
}

/// Whether it has pods: its CRI plugin is not turned off. Else it needs to know no
/// handler, and its configuration may be anything.
pub fn serves_pods(files: &Files) -> bool {
    let written = files.read(FILE).ok().flatten();
    let parsed = written.and_then(|text| text.parse::<Table>().ok());
    let disabled = parsed.and_then(|parsed| parsed.get("disabled_plugins")?.as_array().cloned());
    let disabled = disabled.unwrap_or_default();
    let is_cri = |plugin: &Value| plugin.as_str().is_some_and(|name| CRI.contains(&name));
    !disabled.iter().any(is_cri)
}

/// What has to change so that nothing of ours is left.
///
/// # Errors
/// The marks in the configuration have been edited.
pub fn uninstall(files: &Files) -> anyhow::Result<Vec<Change>> {
    let mut changes = Vec::new();
    if let Some(written) = files.read(FILE)? {
        changes.push(Change::new(FILE, without_ours(&written)?));
    }
    if files.has(DROP_IN) {
        changes.push(Change::new(DROP_IN, None));
    }
    changes_only(files, changes)
}

fn drop_in(files: &Files, handler: &Handler) -> anyhow::Result<Change> {
    let content = format!(
        "{MADE}{}version = 3\n\n{}",
        dirs_made(files, DROP_IN)?,
        handler_lines(3, handler)
    );
    Ok(Change::new(DROP_IN, Some(content)))
}

/// Those that change something.
fn changes_only(files: &Files, changes: Vec<Change>) -> anyhow::Result<Vec<Change>> {
    let mut needed = Vec::new();
    for change in changes {
        if files.read(&change.path)? != change.content {
            needed.push(change);
        }
    }
    Ok(needed)
}

fn parse(path: &str, text: &str) -> anyhow::Result<Table> {
    text.parse().with_context(|| format!("{path} is no TOML"))
}

/// The text as it was before us; none when the file would not be there. In a file
/// that we made, what others have added since is theirs.
fn without_ours(text: &str) -> anyhow::Result<Option<String>> {
    let mut text = text.replace(&import_line(), "").replace(&import_item(), "");
    if let Some((before, rest)) = text.split_once(BEGIN) {
        let Some((_, after)) = rest.split_once(END) else {
            bail!("{FILE} has {BEGIN:?} but no {END:?}; remove that part by hand");
        };
        text = format!("{before}{after}");
    }
    let Some(others) = text.strip_prefix(MADE) else {
        return Ok(Some(text));
    };
    let others = others.replace(DIR_TOO, "");
    Ok((others.trim() != VERSION.trim()).then_some(others))
}

fn refuse_twice(parsed: &Table, version: i64, handler: &Handler) -> anyhow::Result<()> {
    let found = || {
        let cri = parsed.get("plugins")?.get(section(version))?;
        cri.get("containerd")?.get("runtimes")?.get(&handler.name)
    };
    ensure!(
        found().is_none(),
        "{FILE} has a handler {:?} already, which `husk install` did not write; remove it, or \
         choose another name with --handler",
        handler.name
    );
    Ok(())
}

/// The text with the handler in a block at its end.
fn with_block(
    files: &Files,
    text: &str,
    parsed: &Table,
    handler: &Handler,
) -> anyhow::Result<String> {
    refuse_twice(parsed, 2, handler)?;
    let imports = parsed.get("imports").and_then(Value::as_array);
    if imports.is_some_and(|imports| !imports.is_empty()) {
        // 1.7 would let that file's section win over the block here.
        for path in files.list(DROP_INS, ".toml") {
            let other = parse(&path, &files.read(&path)?.unwrap_or_default())?;
            let cri = other.get("plugins").and_then(|all| all.get(section(2)));
            ensure!(
                cri.is_none(),
                "{path} has a section plugins.\"{}\", which containerd 1.7 takes instead of that of \
                 {FILE}; add there:\n{}",
                section(2),
                handler_lines(2, handler)
            );
        }
    }
    let new = format!("{text}{}", block(handler));
    // Inline tables cannot be added to.
    parse(FILE, &new).with_context(|| {
        format!(
            "the handler cannot be added at the end; add it by hand:\n{}",
            handler_lines(2, handler)
        )
    })?;
    Ok(new)
}

fn import_line() -> String {
    format!("imports = [\"{DROP_IN}\"] # added by `husk install`\n")
}

fn import_item() -> String {
    format!("\"{DROP_IN}\", ")
}

/// The text, which imports our drop-in.
fn with_import(text: &str, parsed: &Table) -> anyhow::Result<String> {
    let imports = parsed.get("imports").and_then(Value::as_array);
    let Some(imports) = imports else {
        // A key of the whole file stands before the first table.
        return Ok(format!("{}{text}", import_line()));
    };
    let all = format!("{DROP_INS}/*.toml");
    let is_ours = |path: &Value| path.as_str() == Some(DROP_IN) || path.as_str() == Some(&all);
    if imports.iter().any(is_ours) {
        return Ok(text.to_owned());
    }
    let table = DeTable::parse(text).with_context(|| format!("{FILE} is no TOML"))?;
    let found = table.get_ref().iter().find_map(|(name, value)| {
        let is_it = name.get_ref() == "imports" && matches!(value.get_ref(), DeValue::Array(_));
        is_it.then(|| value.span().start + 1)
    });
    let (before, after) = found
        .and_then(|at| text.split_at_checked(at))
        .with_context(|| format!("the imports of {FILE} are not understood"))?;
    let new = format!("{before}{}{after}", import_item());
    parse(FILE, &new)?;
    Ok(new)
}
