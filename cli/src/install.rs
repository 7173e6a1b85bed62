//! `husk install` and `husk uninstall`: let container engines know Husk's shim,
//! and take exactly that back.
//!
//! What has to change is planned first, from the node's files alone, so that it
//! can be shown, and so that a second run finds nothing to do. Files are replaced
//! in one step.

use std::fs::{self, Metadata, OpenOptions};
use std::io::{self, BufRead, IsTerminal, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::json;

use crate::answer::Answer;
use crate::arguments::{Engine, Place};
use crate::text;

mod containerd;
mod crio;
mod docker;

/// What engines shall know.
#[derive(Clone, Debug)]
pub struct Handler {
    /// Its name in Kubernetes' RuntimeClass, and for `docker run --runtime`.
    pub name: String,
    /// Pods may choose the size of their machine by annotations.
    pub pod_annotations: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Let the engines know Husk.
    Install,
    /// And let pods choose by annotations.
    InstallWithAnnotations,
    /// Take either back.
    Uninstall,
}

/// Stands in a file for which its directory was made; twice where that one's
/// directory was, too.
const DIR_TOO: &str = "# Its directory was made for it.\n";

/// Links that are followed one after another, as many as Linux follows.
const LINKS: usize = 40;

/// A file as it should become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// On the node, its root not counted.
    pub path: String,
    /// None: it goes.
    pub content: Option<String>,
    /// The file whose copy it is: it is for those whom that one is for.
    pub copy_of: Option<&'static str>,
}

impl Change {
    fn new(path: &str, content: Option<String>) -> Self {
        Self {
            path: path.to_owned(),
            content,
            copy_of: None,
        }
    }

    fn like(self, original: &'static str) -> Self {
        Self {
            copy_of: Some(original),
            ..self
        }
    }
}

/// The node's files, below a root.
#[derive(Clone, Debug)]
pub struct Files {
    root: PathBuf,
}

impl Files {
    /// Those of the node whose root this is.
    pub fn at(root: &Path) -> Self {
        let root = root.to_owned();
        Self { root }
    }

    fn at_root(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Where a path of the node is. A link stays one: what it names is meant.
    fn place(&self, path: &str) -> PathBuf {
        let mut place = self.at_root(Path::new(path));
        for _ in 0..LINKS {
            let Ok(target) = fs::read_link(&place) else {
                break;
            };
            place = match target.is_absolute() {
                true => self.at_root(&target),
                false => place.parent().unwrap_or(&self.root).join(target),
            };
        }
        place
    }

    /// What a file says; none where it is not.
    ///
    /// # Errors
    /// It is there and cannot be read.
    pub fn read(&self, path: &str) -> anyhow::Result<Option<String>> {
        match fs::read_to_string(self.place(path)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {path}")),
        }
    }

    /// Something is there.
    pub fn has(&self, path: &str) -> bool {
        self.place(path).exists()
    }

    /// The files of a directory with this ending, in the order of their names.
    pub fn list(&self, dir: &str, ending: &str) -> Vec<String> {
        let entries = fs::read_dir(self.place(dir)).into_iter().flatten();
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| name.ends_with(ending)).collect();
        names.sort();
        names.iter().map(|name| format!("{dir}/{name}")).collect()
    }

    /// Carries a change out.
    fn apply(&self, change: &Change) -> anyhow::Result<()> {
        let place = self.place(&change.path);
        let what = || format!("write {}", change.path);
        let Some(content) = &change.content else {
            let was = fs::read_to_string(&place).unwrap_or_default();
            fs::remove_file(&place).with_context(what)?;
            let made = was.matches(DIR_TOO).count();
            for dir in place.ancestors().skip(1).take(made) {
                // Files of others keep it.
                let _ = fs::remove_dir(dir);
            }
            return Ok(());
        };
        let dir = place.parent().context("no directory")?;
        fs::create_dir_all(dir).with_context(what)?;
        let like = change
            .copy_of
            .map_or(place.clone(), |path| self.place(path));
        let like = fs::metadata(like).ok();
        let mode = like.as_ref().map_or(0o644, Metadata::mode);
        let mut new = place.clone().into_os_string();
        new.push(".husk-new");
        let write = || -> io::Result<()> {
            // One that was cut short has left it.
            let _ = fs::remove_file(&new);
            let mut options = OpenOptions::new();
            options.write(true).create_new(true).mode(0o600);
            let mut file = options.open(&new)?;
            if let Some(like) = &like {
                fchown(&file, Some(like.uid()), Some(like.gid()))?;
            }
            file.set_permissions(fs::Permissions::from_mode(mode & 0o777))?;
            file.write_all(content.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &place)
        };
        write()
            .inspect_err(|_| drop(fs::remove_file(&new)))
            .with_context(what)
    }
}

/// A line for each directory that has to be made for a file of ours, or was when
/// it was written first.
fn dirs_made(files: &Files, path: &str) -> anyhow::Result<String> {
    if let Some(earlier) = files.read(path)? {
        return Ok(DIR_TOO.repeat(earlier.matches(DIR_TOO).count()));
    }
    let dirs = Path::new(path).ancestors().skip(1);
    let made = dirs.take_while(|dir| !files.at_root(dir).exists()).count();
    Ok(DIR_TOO.repeat(made))
}

/// Installs, or takes that back.
///
/// # Errors
/// A file that has to be changed is not understood, or cannot be written.
pub fn run(asked: &Place, what: Task, json: bool) -> anyhow::Result<Answer> {
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        !asked.handler.is_empty() && asked.handler.chars().all(is_name),
        "handler {:?} must have lower case letters, digits and '-' alone",
        asked.handler
    );
    let files = Files::at(&asked.root);
    let handler = Handler {
        name: asked.handler.clone(),
        pod_annotations: what == Task::InstallWithAnnotations,
    };
    let remove = what == Task::Uninstall;
    let mut engines = engines(&files, &asked.engines);
    if asked.engines.is_empty() && !remove {
        // Docker's packages bring one that serves nobody but Docker.
        engines.retain(|engine| *engine != Engine::Containerd || containerd::serves_pods(&files));
    }
    ensure!(
        !engines.is_empty() || remove,
        "neither containerd with its CRI plugin nor Docker nor CRI-O is on this node; --for says \
         which to prepare for"
    );
    let mut done = Vec::new();
    for engine in engines {
        let changes = match (engine, remove) {
            (Engine::Containerd, false) => containerd::install(&files, &handler)?,
            (Engine::Containerd, true) => containerd::uninstall(&files)?,
            (Engine::Docker, false) => docker::install(&files, &handler)?,
            (Engine::Docker, true) => docker::uninstall(&files)?,
            (Engine::Crio, false) => crio::install(&files, &handler)?,
            (Engine::Crio, true) => crio::uninstall(&files)?,
        };
        if !asked.dry_run {
            changes.iter().try_for_each(|change| files.apply(change))?;
        }
        let restart = match changes.is_empty() || asked.dry_run {
            true => Restart::NotNeeded,
            false => restart(engine, asked),
        };
        done.push((engine, changes, restart));
    }
    report(&done, asked.dry_run, json)
}

/// Those that were named, or those that are there.
fn engines(files: &Files, named: &[Engine]) -> Vec<Engine> {
    if !named.is_empty() {
        return named.to_vec();
    }
    let signs = [
        (
            Engine::Containerd,
            ["/etc/containerd", "/usr/bin/containerd"],
        ),
        (Engine::Docker, ["/etc/docker", "/usr/bin/dockerd"]),
        (Engine::Crio, ["/etc/crio", "/usr/bin/crio"]),
    ];
    let there = signs
        .iter()
        .filter(|(_, signs)| signs.iter().any(|path| files.has(path)));
    there.map(|(engine, _)| *engine).collect()
}

/// What became of an engine that has to read its configuration again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restart {
    NotNeeded,
    Done,
    /// Not running, not allowed, or not of this root.
    Left,
}

/// Has an engine read its configuration again, when whoever is there agrees.
/// Containers go on running: their shims do.
fn restart(engine: Engine, asked: &Place) -> Restart {
    let unit = engine.unit();
    let systemctl = |words: &[&str]| {
        let mut command = Command::new("systemctl");
        let quiet = command
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        quiet.status().is_ok_and(|status| status.success())
    };
    if asked.root != Path::new("/") || asked.no_restart {
        return Restart::Left;
    }
    if !systemctl(&["is-active", "--quiet", unit]) || !agreed(engine, asked.yes) {
        return Restart::Left;
    }
    match systemctl(&[engine.verb(), unit]) {
        true => Restart::Done,
        false => Restart::Left,
    }
}

fn agreed(engine: Engine, yes: bool) -> bool {
    if yes {
        return true;
    }
    if !io::stdin().is_terminal() {
        return false;
    }
    let (verb, unit) = (engine.verb(), engine.unit());
    eprint!("systemctl {verb} {unit}? Its containers go on running. [y/N] ");
    let mut line = String::new();
    let read = io::stdin().lock().read_line(&mut line);
    read.is_ok() && matches!(line.trim(), "y" | "Y" | "yes")
}

fn report(
    done: &[(Engine, Vec<Change>, Restart)],
    dry_run: bool,
    json: bool,
) -> anyhow::Result<Answer> {
    if json {
        let engines: Vec<_> = done
            .iter()
            .map(|(engine, changes, restart)| {
                let changes: Vec<_> = changes
                    .iter()
                    .map(|change| json!({ "file": change.path, "removed": change.content.is_none() }))
                    .collect();
                json!({
                    "engine": engine.unit(),
                    "changes": changes,
                    "restart_needed": *restart == Restart::Left,
                })
            })
            .collect();
        return Answer::json(&json!({ "dry_run": dry_run, "engines": engines }));
    }
    let mut report = String::new();
    if done.is_empty() {
        report.push_str("nothing to do: neither containerd nor Docker nor CRI-O is on this node\n");
    }
    for (engine, changes, restart) in done {
        let (unit, verb) = (engine.unit(), engine.verb());
        if changes.is_empty() {
            report.push_str(&format!("{unit}: nothing to do\n"));
        }
        for change in changes {
            let path = text::plain(&change.path);
            let verb = match (&change.content, dry_run) {
                (Some(_), false) => "wrote",
                (None, false) => "removed",
                (Some(_), true) => "would write",
                (None, true) => "would remove",
            };
            report.push_str(&format!("{unit}: {verb} {path}\n"));
        }
        match restart {
            Restart::Done => report.push_str(&format!("{unit}: {verb} done\n")),
            Restart::Left => {
                report.push_str(&format!(
                    "{unit}: takes effect with: systemctl {verb} {unit}\n"
                ));
            }
            Restart::NotNeeded => {}
        }
    }
    Ok(Answer::done(report))
}

#[cfg(test)]
mod tests;
