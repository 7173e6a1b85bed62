//! `husk template`: the booted machines from which pods begin.

use std::collections::BTreeMap;
use std::fs::{self, DirEntry, File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

use husk_node::config::{Config, Sources};

use crate::answer::Answer;
use crate::arguments::TemplateCommand;
use crate::check;
use crate::pods::{self, Pod};
use crate::text;

/// As long is a template's name, hexadecimal digits.
const NAME: usize = 32;

/// How often it is looked at how far a template is.
const LOOK: Duration = Duration::from_millis(100);

/// What a machine's maker needs beside the machine's start.
const BESIDE_BOOT: Duration = Duration::from_secs(60);

/// Longest complaint of a maker's that is passed on, bytes.
const COMPLAINT: u64 = 4096;

/// A template.
#[derive(Debug)]
struct Template {
    name: String,
    /// What it takes of the file system.
    bytes: u64,
    age: Option<Duration>,
    is_too_old: bool,
    /// It is made from what is installed and configured now; unknown where the shim
    /// cannot be asked.
    fits: Option<bool>,
    /// Pods that are there and began as its copies.
    pods: usize,
}

/// Does what is asked.
///
/// # Errors
/// It cannot be done.
pub fn run(command: &TemplateCommand, json: bool) -> anyhow::Result<Answer> {
    let config = Sources::of_node().load()?.config;
    match command {
        TemplateCommand::List => list(&config, json),
        TemplateCommand::Drop { name } => drop_some(&config, name.as_deref(), json),
        TemplateCommand::Build => build(&config, json),
    }
}

fn list(config: &Config, json: bool) -> anyhow::Result<Answer> {
    let installed = installed();
    let pods = pods::all(&config.state_dir)?;
    let templates = all(config, installed.as_deref().ok(), &pods)?;
    let failures = failures(config);
    if json {
        let templates: Vec<Value> = templates.iter().map(value).collect();
        return Answer::json(&json!({
            "enabled": is_on(config),
            "directory": config.template_dir,
            "templates": templates,
            "failed": failures,
            "fits_unknown": installed.err().map(|error| format!("{error:#}")),
        }));
    }
    let mut shown = table(&templates);
    if !is_on(config) {
        shown.push_str("templates are off (template_max_age_seconds = 0): every pod boots\n");
    }
    if let Err(error) = installed {
        let error = text::plain(&format!("{error:#}"));
        shown.push_str(&format!("whether they fit is not known: {error}\n"));
    }
    for (name, failure) in failures {
        let failure = text::short(&failure);
        shown.push_str(&format!("{name} could not be made: {failure}\n"));
    }
    Ok(Answer::done(shown))
}

fn value(template: &Template) -> Value {
    json!({
        "name": template.name,
        "bytes": template.bytes,
        "age_seconds": template.age.map(|age| age.as_secs()),
        "too_old": template.is_too_old,
        "fits": template.fits,
        "pods": template.pods,
    })
}

fn table(templates: &[Template]) -> String {
    let row = |template: &Template| {
        let fits = match (template.fits, template.is_too_old) {
            (None, _) => "-",
            (Some(false), _) => "no: made from something else",
            (Some(true), true) => "no: too old",
            (Some(true), false) => "yes",
        };
        vec![
            template.name.clone(),
            text::mib(template.bytes >> 10),
            template.age.map_or_else(|| "-".to_owned(), text::age),
            template.pods.to_string(),
            fits.to_owned(),
        ]
    };
    let rows: Vec<_> = templates.iter().map(row).collect();
    text::table(&["TEMPLATE", "SIZE", "AGE", "PODS", "FITS"], &rows)
}

fn is_on(config: &Config) -> bool {
    config.template_max_age_seconds > 0
}

/// Those that are made, in the order of their names.
fn all(config: &Config, fitting: Option<&[String]>, pods: &[Pod]) -> anyhow::Result<Vec<Template>> {
    let most = Duration::from_secs(config.template_max_age_seconds.into());
    let mut templates = Vec::new();
    for entry in entries(&config.template_dir)? {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !is_name(&name) {
            continue;
        }
        let files = ["state", "memory"].map(|file| fs::symlink_metadata(entry.path().join(file)));
        // It may go at any time.
        let [Ok(state), Ok(memory)] = files else {
            continue;
        };
        let age = state.modified().ok();
        let age = age.and_then(|made| SystemTime::now().duration_since(made).ok());
        templates.push(Template {
            // Blocks of stat(2) are of 512 bytes whatever the file system's are.
            bytes: (state.blocks() + memory.blocks()) * 512,
            age,
            is_too_old: age.is_some_and(|age| age > most),
            fits: fitting.map(|fitting| fitting.contains(&name)),
            pods: pods
                .iter()
                .filter(|pod| began_as(pod) == Some(&name))
                .count(),
            name,
        });
    }
    templates.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(templates)
}

fn began_as(pod: &Pod) -> Option<&String> {
    pod.state.machine.as_ref()?.template.as_ref()
}

fn is_name(name: &str) -> bool {
    name.len() == NAME && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn entries(dir: &Path) -> anyhow::Result<Vec<DirEntry>> {
    match fs::read_dir(dir) {
        Ok(entries) => Ok(entries.filter_map(Result::ok).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("templates below {}", dir.display())),
    }
}

/// Which could not be made, and why.
fn failures(config: &Config) -> BTreeMap<String, String> {
    let entries = entries(&config.template_dir).unwrap_or_default();
    let failure = |entry: &DirEntry| {
        let file = entry.file_name().into_string().ok()?;
        let name = file.strip_suffix(".failed").filter(|name| is_name(name))?;
        let mut why = String::new();
        let file = File::open(entry.path()).ok()?;
        file.take(COMPLAINT).read_to_string(&mut why).ok()?;
        Some((name.to_owned(), why.trim().to_owned()))
    };
    entries.iter().filter_map(failure).collect()
}

/// The shim's program.
fn shim() -> anyhow::Result<PathBuf> {
    check::installed_shim().with_context(|| format!("no {} is installed", check::SHIM))
}

/// The names of the templates from which pods would begin now.
fn installed() -> anyhow::Result<Vec<String>> {
    let output = Command::new(shim()?)
        .args(["template", "names"])
        .current_dir("/")
        .stdin(Stdio::null())
        .output()
        .context(check::SHIM)?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{}: {}", check::SHIM, error.trim());
    let names = String::from_utf8(output.stdout)?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// Forgets them. Whoever runs from one keeps what it has mapped.
fn drop_some(config: &Config, name: Option<&str>, json: bool) -> anyhow::Result<Answer> {
    let mut dropped = Vec::new();
    for template in all(config, None, &[])? {
        if name.is_none_or(|name| template.name.starts_with(name)) {
            dropped.push(template);
        }
    }
    if let Some(name) = name {
        ensure!(
            !dropped.is_empty(),
            "no template {name:?}; see `husk template list`"
        );
        ensure!(
            dropped.len() == 1,
            "{name:?} may be one of {}",
            dropped.len()
        );
    }
    for template in &dropped {
        remove(&config.template_dir.join(&template.name))?;
    }
    if name.is_none() {
        remove_rests(&config.template_dir)?;
    }
    if json {
        let names: Vec<&str> = dropped.iter().map(|template| &*template.name).collect();
        return Answer::json(&json!({ "dropped": names }));
    }
    let lines = dropped.iter().map(|template| {
        let size = text::mib(template.bytes >> 10);
        format!("dropped {}, {size}\n", template.name)
    });
    Ok(Answer::done(lines.collect()))
}

/// At once for whoever is about to open it.
fn remove(dir: &Path) -> anyhow::Result<()> {
    let old = dir.with_extension(format!("dropped-{}", std::process::id()));
    match fs::rename(dir, &old) {
        // Its shim was quicker.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        renamed => renamed.with_context(|| dir.display().to_string())?,
    }
    fs::remove_dir_all(&old).with_context(|| old.display().to_string())
}

/// What somebody was about to remove or to make who was killed: makers remove it, too,
/// but there need not be another.
fn remove_rests(dir: &Path) -> anyhow::Result<()> {
    let Ok(lock) = OpenOptions::new().write(true).open(dir.join("lock")) else {
        return Ok(());
    };
    // A maker's own is among them while it works.
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(());
    }
    for entry in entries(dir)? {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_rest = name.split_once('.').is_some_and(|(key, _)| is_name(key));
        // What is noted of a template is a file, and stays.
        if !is_rest || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        match fs::remove_dir_all(entry.path()) {
            // Whoever has begun to remove it was quicker.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed.with_context(|| entry.path().display().to_string())?,
        }
    }
    Ok(())
}

/// Makes those from which pods would begin now, as shims would have them made.
fn build(config: &Config, json: bool) -> anyhow::Result<Answer> {
    ensure!(
        is_on(config),
        "templates are off: template_max_age_seconds is 0 in the configuration"
    );
    let names = installed()?;
    ensure!(
        !names.is_empty(),
        "a file that templates are made from is missing; see `husk check`"
    );
    let began = Instant::now();
    let is_there = |template: &Template| template.fits == Some(true) && !template.is_too_old;
    let made = || {
        let mut templates = all(config, Some(&names), &[])?;
        templates.retain(is_there);
        anyhow::Ok(templates)
    };
    let before: Vec<String> = made()?.into_iter().map(|made| made.name).collect();
    let missing = names.iter().filter(|name| !before.contains(name)).count();
    if missing > 0 {
        make(config, missing)?;
    }
    let after = made()?;
    let is_made = |name: &&String| after.iter().any(|made| made.name == **name);
    if let Some(name) = names.iter().find(|name| !is_made(name)) {
        let why = failures(config).remove(name);
        bail!("{name}: {}", why.as_deref().unwrap_or("it was not made"));
    }
    let seconds = began.elapsed().as_secs_f64();
    let was_there = |template: &Template| before.contains(&template.name);
    if json {
        let shown = after.iter().map(|template| {
            let mut shown = value(template);
            shown["was_there"] = was_there(template).into();
            shown
        });
        let templates: Vec<Value> = shown.collect();
        return Answer::json(&json!({ "templates": templates, "seconds": seconds }));
    }
    let lines = after.iter().map(|template| {
        let (name, size) = (&template.name, text::mib(template.bytes >> 10));
        match was_there(template) {
            true => format!("{name}, {size}, is there already\n"),
            false => format!("made {name}, {size}, within {seconds:.1} s\n"),
        }
    });
    Ok(Answer::done(lines.collect()))
}

/// Runs the maker of so many, or waits for the one that is at work.
fn make(config: &Config, count: usize) -> anyhow::Result<()> {
    let patience = Duration::from_secs(config.boot_timeout_seconds.into());
    let one = patience + config.patience().of(BESIDE_BOOT);
    let deadline = Instant::now() + one * u32::try_from(count)?;
    let mut progress = Progress::new(config.template_dir.clone());
    let mut maker = Maker(
        Command::new(shim()?)
            .arg("template")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context(check::SHIM)?,
    );
    let status = loop {
        if let Some(status) = maker.0.try_wait()? {
            break status;
        }
        ensure!(
            Instant::now() < deadline,
            "the template's maker does not end"
        );
        progress.look();
        thread::sleep(LOOK);
    };
    // It leaves a maker that was there before alone.
    while is_locked(&config.template_dir) {
        ensure!(Instant::now() < deadline, "another maker does not end");
        progress.look();
        thread::sleep(LOOK);
    }
    progress.end();
    if !status.success() {
        let mut why = String::new();
        if let Some(stderr) = maker.0.stderr.take() {
            stderr.take(COMPLAINT).read_to_string(&mut why)?;
        }
        bail!("{}", why.trim());
    }
    Ok(())
}

/// Ends with the command that waits for it.
struct Maker(Child);

impl Drop for Maker {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

fn is_locked(dir: &Path) -> bool {
    let lock = OpenOptions::new().write(true).open(dir.join("lock"));
    lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err())
}

/// Says on standard error how far it is.
struct Progress {
    /// Where it is made.
    dir: PathBuf,
    began: Instant,
    told: &'static str,
    is_terminal: bool,
}

impl Progress {
    fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            began: Instant::now(),
            told: "",
            is_terminal: io::stderr().is_terminal(),
        }
    }

    fn stage(&self) -> &'static str {
        let is_new = |entry: &DirEntry| entry.path().extension().is_some_and(|is| is == "new");
        let entries = entries(&self.dir).unwrap_or_default();
        let new = entries.iter().find(|entry| is_new(entry));
        let dir = new.map_or_else(|| self.dir.join("new"), DirEntry::path);
        match fs::metadata(dir.join("state")) {
            // It has got its name, or was given up.
            Err(_) if !self.told.is_empty() => self.told,
            Err(_) => "waits for others",
            Ok(state) if state.len() == 0 => "boots",
            Ok(_) => "is saved",
        }
    }

    fn look(&mut self) {
        let stage = self.stage();
        let seconds = self.began.elapsed().as_secs();
        let mut stderr = io::stderr().lock();
        let _ = match (self.is_terminal, stage == self.told) {
            (true, _) => write!(stderr, "\r\x1b[Kthe machine {stage} ({seconds} s)"),
            (false, false) => writeln!(stderr, "the machine {stage}"),
            (false, true) => Ok(()),
        };
        let _ = stderr.flush();
        self.told = stage;
    }

    fn end(&self) {
        if self.is_terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
