//! pjdfstest, a public suite of what POSIX and Linux say of files, on what the
//! server serves and on the disk below it. `tests/pjdfstest` builds and runs it.

#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use harness::{Mount, OVERLAY, OWN, SHARED};

/// Users that every Debian has; and how long a step waits so that times differ.
const SETTINGS: &str = "
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
allow_remount = false
[dummy_auth]
entries = [ [\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"] ]
";

/// What may fail on what is served alone. A program that runs is truncated by
/// who opens it for reading and to truncate it: with FUSE that is one request,
/// and the kernel asks only afterwards whether the file is in use.
const KNOWN: &[&str] = &["open::etxtbsy"];

/// The suite's cases that fail in a directory.
fn failures(program: &Path, settings: &Path, dir: &Path) -> BTreeSet<String> {
    let mut command = Command::new(program);
    let command = command.arg("-c").arg(settings).arg("-p").arg(dir);
    let done = command.env("NO_COLOR", "1").output().unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    println!("== {}\n{said}", dir.display());
    let summary = said.lines().find(|line| line.starts_with("Summary: "));
    assert!(
        summary.is_some_and(|line| !line.contains(" 0 passed")),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    said.lines()
        .filter_map(|line| line.strip_suffix(" FAILED"))
        .map(|name| name.trim().to_owned())
        .collect()
}

#[test]
fn what_is_served_is_like_the_disk() {
    let Some(program) = std::env::var_os("HUSK_PJDFSTEST") else {
        println!("SKIPPED: tests/pjdfstest runs it");
        return;
    };
    let program = Path::new(&program);
    let mut wrong = Vec::new();
    for place in [OWN, OVERLAY, SHARED] {
        let Some(mount) = Mount::new(1000) else {
            return;
        };
        let settings = mount.host("").join("settings.toml");
        fs::write(&settings, SETTINGS).unwrap();
        let below = failures(program, &settings, &mount.host(place));
        let served = failures(program, &settings, &mount.guest(place));
        let more = served.difference(&below);
        wrong.extend(
            more.filter(|name| !KNOWN.contains(&name.as_str()))
                .map(|name| format!("{place}: {name}")),
        );
        let better: Vec<_> = below.difference(&served).collect();
        println!("{place}: fails on the disk alone: {better:?}");
    }
    assert!(
        wrong.is_empty(),
        "fails on what is served alone: {wrong:#?}"
    );
}
