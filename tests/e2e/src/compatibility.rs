//! `docs/compatibility.md`: what has passed, made from what runs printed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use crate::case;

/// What one run said of one case.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Ok,
    Failed,
    Skipped,
}

/// containerd's version and the runtime.
type Column = (String, String);

/// What runs have said; a later one counts.
#[derive(Debug, Default)]
pub struct Compatibility {
    said: BTreeMap<(String, Column), Said>,
}

impl Compatibility {
    /// Takes what `tests/e2e/run` printed.
    pub fn read(&mut self, log: &str) {
        let mut versions: BTreeMap<&str, String> = BTreeMap::new();
        for line in log.lines() {
            let Some((lab, rest)) = line.split_once(": ") else {
                continue;
            };
            let words: Vec<&str> = rest.split_whitespace().collect();
            match words[..] {
                ["containerd", version, _, "cases"] => {
                    versions.insert(lab, short(version));
                }
                [name, runtime @ ("husk" | "runc"), _, "s", verdict, ..] => {
                    let said = match verdict {
                        "ok" => Said::Ok,
                        "FAILED" => Said::Failed,
                        _ => Said::Skipped,
                    };
                    if let Some(version) = versions.get(lab) {
                        let column = (version.clone(), runtime.to_owned());
                        self.said.insert((name.to_owned(), column), said);
                    }
                }
                _ => {}
            }
        }
    }

    /// The page.
    pub fn page(&self) -> String {
        let columns: BTreeSet<&Column> = self.said.keys().map(|(_, column)| column).collect();
        let mut page = String::from(
            "# Compatibility\n\n\
             Made by `husk-e2e --report` from what `tests/e2e/run` printed; not to be edited.\n\
             Each case drives containerd as a user does, and proves itself with runc. \
             [differences.md](differences.md)\nsays what is not the same.\n\n| case |",
        );
        for (version, runtime) in &columns {
            let _ = write!(page, " containerd {version}, {runtime} |");
        }
        page.push_str("\n| --- |");
        page.push_str(&" --- |".repeat(columns.len()));
        for case in case::all() {
            let _ = write!(page, "\n| {} |", case.name);
            for column in &columns {
                let key = (case.name.to_owned(), (*column).clone());
                let word = match self.said.get(&key) {
                    Some(Said::Ok) => "ok",
                    Some(Said::Failed) => "**failed**",
                    Some(Said::Skipped) => "skipped",
                    None => "",
                };
                let _ = write!(page, " {word} |");
            }
        }
        page.push('\n');
        page
    }
}

/// `1.7.24~ds1` as `1.7.24`, `2.1.9+unknown` as `2.1.9`.
fn short(version: &str) -> String {
    let end = version.find(|c: char| !c.is_ascii_digit() && c != '.');
    version[..end.unwrap_or(version.len())].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_run_counts() {
        let mut compatibility = Compatibility::default();
        compatibility.read(
            "lab 1: containerd 1.7.24~ds1, 2 cases\n\
             lab 1: run/output                   husk     13.8 s  FAILED\n\
             lab 1:         | husk  1 s  ok\n\
             lab 2: run/stderr-apart             husk     11.1 s  ok\n",
        );
        assert!(
            compatibility
                .page()
                .contains("\n| run/output | **failed** |\n")
        );
        compatibility.read(
            "lab 2: containerd 1.7.24~ds1, 2 cases\n\
             lab 2: run/output                   husk      1.8 s  ok\n\
             lab 2: run/output                   runc      1.8 s  skipped: no reason\n",
        );
        let page = compatibility.page();
        assert!(page.contains("| containerd 1.7.24, husk | containerd 1.7.24, runc |"));
        assert!(page.contains("\n| run/output | ok | skipped |\n"), "{page}");
        // Nobody said which containerd that was.
        assert!(page.contains("\n| run/stderr-apart |  |  |\n"), "{page}");
    }

    #[test]
    fn the_page_names_every_case() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/compatibility.md");
        let page = std::fs::read_to_string(path).unwrap();
        for case in case::all() {
            let row = format!("\n| {} |", case.name);
            assert!(
                page.contains(&row),
                "docs/compatibility.md has no {}",
                case.name
            );
        }
    }
}
