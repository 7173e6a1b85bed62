//! The documentation, held against the code and against itself.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .unwrap()
}

/// The files below a directory whose names end so.
fn files(dir: &Path, end: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.to_str().unwrap().ends_with(end) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// What programs say: their sources without tests, each text in one line, with
/// `…` for what differs.
fn sources(dirs: &[&str]) -> Vec<String> {
    let files = dirs.iter().flat_map(|dir| files(&root().join(dir), ".rs"));
    files
        .filter(|path| !path.to_str().unwrap().contains("/tests"))
        .map(|path| plain(&fs::read_to_string(path).unwrap()))
        .collect()
}

fn plain(source: &str) -> String {
    let code = source.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let mut text = String::new();
    let mut rest = code;
    while let Some(at) = rest.find(['\\', '{']) {
        text.push_str(&rest[..at]);
        rest = &rest[at..];
        let inside = |end: usize| !rest[..end].contains(['"', '\n']);
        if let Some(after) = rest.strip_prefix("\\\n") {
            rest = after.trim_start();
        } else if let Some(after) = rest.strip_prefix("\\\"") {
            // As pages quote it.
            text.push('\u{201c}');
            rest = after;
        } else if let Some(end) = rest
            .find('}')
            .filter(|end| inside(*end) && rest.starts_with('{'))
        {
            text.push('…');
            rest = &rest[end + 1..];
        } else {
            text.push_str(&rest[..1]);
            rest = &rest[1..];
        }
    }
    text + rest
}

/// The messages of errors that are declared in a source.
fn declared(source: &str) -> Vec<&str> {
    let after = source.split("#[error(").skip(1);
    let literal = |rest: &'_ str| -> Option<_> {
        let rest = rest.trim_start().strip_prefix('"')?;
        // Lifetimes: the slice is of `source`.
        Some(rest.split_once('"')?.0.len())
    };
    after
        .filter_map(|rest| {
            let length = literal(rest)?;
            let rest = rest.trim_start().strip_prefix('"')?;
            rest.get(..length)
        })
        .filter(|message| message.contains(|c: char| c.is_alphabetic()))
        .collect()
}

/// The messages that a page explains: the code with which the rows of its tables
/// begin.
fn explained(page: &str) -> Vec<String> {
    let message = |line: &str| {
        // Markdown's way for code with a backtick in it.
        let (rest, end) = match line.strip_prefix("| `` ") {
            Some(rest) => (rest, " ``"),
            None => (line.strip_prefix("| `")?, "`"),
        };
        Some(rest.split_once(end).unwrap().0.to_owned())
    };
    page.lines().filter_map(message).collect()
}

/// `…` at the end of what a page has stands for all that follows.
fn is_meant(explained: &str, message: &str) -> bool {
    explained == message
        || explained
            .strip_suffix('…')
            .is_some_and(|begin| begin.ends_with("; ") && message.starts_with(begin))
}

#[test]
fn messages_are_those_of_the_programs() {
    let page = fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let explained = explained(&page);
    assert!(explained.len() > 80, "{explained:?}");
    let said = sources(&["runtime", "vmm", "agent", "fs", "cli"]);
    for message in &explained {
        let literal = match message.strip_suffix("; …") {
            Some(begin) => format!("\"{begin}; "),
            None => format!("\"{message}"),
        };
        assert!(
            said.iter().any(|source| source.contains(&literal)),
            "docs/troubleshooting.md explains {message:?}, which no program says"
        );
    }
    let twice: BTreeSet<_> = explained.iter().collect();
    assert_eq!(twice.len(), explained.len(), "a message is explained twice");
}

#[test]
fn each_error_of_the_shim_is_explained() {
    let page = fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let explained = explained(&page);
    let sources = sources(&["runtime/src", "runtime/node/src"]);
    let declared: Vec<&str> = sources.iter().flat_map(|source| declared(source)).collect();
    assert!(declared.len() > 60, "{declared:?}");
    let missing: Vec<_> = declared
        .iter()
        .filter(|message| {
            !explained
                .iter()
                .any(|explained| is_meant(explained, message))
        })
        .collect();
    assert!(
        missing.is_empty(),
        "docs/troubleshooting.md does not explain {missing:#?}"
    );
}

/// The words in a text that begin so, up to what is no small letter or `_`.
fn names<'a>(text: &'a str, begin: &str) -> BTreeSet<&'a str> {
    let is_in = |c: char| c.is_ascii_lowercase() || c == '_';
    let found = text.match_indices(begin).map(|(at, _)| {
        let word = text[at..].trim_start_matches(['"', '`']);
        let end = word.find(|c| !is_in(c)).unwrap_or(word.len());
        &word[..end]
    });
    found.collect()
}

#[test]
fn each_metric_and_event_is_documented() {
    let page = fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let (events, metrics) = page.split_once("## Metrics").unwrap();
    let sources: String = ["metrics.rs", "metrics/starts.rs"]
        .map(|name| plain(&fs::read_to_string(root().join("cli/src").join(name)).unwrap()))
        .concat();
    let made = names(&sources, "\"husk_");
    assert!(made.len() > 5, "{made:?}");
    assert_eq!(made, names(metrics, "`husk_"));
    // Those of queries, too.
    for name in names(metrics, "husk_") {
        let family = ["_bucket", "_sum", "_count"];
        let family = family.iter().find_map(|end| name.strip_suffix(end));
        assert!(made.contains(family.unwrap_or(name)), "{name}");
    }

    let source = fs::read_to_string(root().join("cli/src/events.rs")).unwrap();
    let (_, words) = source.split_once("pub fn word(self)").unwrap();
    let (words, _) = words.split_once("\n    }\n").unwrap();
    let told: Vec<&str> = words.split('"').skip(1).step_by(2).collect();
    let rows = events.lines().filter_map(|line| line.strip_prefix("| `"));
    let rows: Vec<&str> = rows.map(|row| row.split_once('`').unwrap().0).collect();
    assert_eq!(told, rows);
    assert!(told.len() > 5, "{told:?}");
}

/// The names of all metrics that `husk metrics` has.
fn metrics() -> BTreeSet<String> {
    let sources: String = ["metrics.rs", "metrics/starts.rs"]
        .map(|name| plain(&fs::read_to_string(root().join("cli/src").join(name)).unwrap()))
        .concat();
    let made = names(&sources, "\"husk_");
    made.into_iter().map(str::to_owned).collect()
}

#[test]
fn each_query_of_the_dashboard_has_its_metric() {
    let file = root().join("package/grafana/husk.json");
    let dashboard = fs::read_to_string(file).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    let metrics = metrics();
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let variables = variables.iter().map(|variable| &variable["query"]);
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.len() > 5);
    let targets = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().unwrap());
    let queries = targets.map(|target| &target["expr"]);
    let mut seen = 0;
    for query in queries.chain(variables) {
        let query = query.as_str().unwrap();
        let used = names(query, "husk_");
        assert!(!used.is_empty() || query == "prometheus", "{query}");
        for name in used {
            let family = ["_bucket", "_sum", "_count"];
            let family = family.iter().find_map(|end| name.strip_suffix(end));
            assert!(metrics.contains(family.unwrap_or(name)), "{name}: {query}");
            seen += 1;
        }
    }
    assert!(seen > 8, "{seen}");
}

/// The targets of a page's links, without those to other hosts.
fn links(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut is_code = false;
    for line in page.lines() {
        is_code ^= line.trim_start().starts_with("```");
        if is_code || line.starts_with("    ") {
            continue;
        }
        for part in line.split("](").skip(1) {
            let (target, _) = part.split_once(')').unwrap();
            if !target.contains("://") {
                found.push(target.to_owned());
            }
        }
    }
    found
}

/// Whether a heading of a page has this anchor, as mdBook and GitHub make it.
fn has_anchor(page: &str, anchor: &str) -> bool {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    headings.into_iter().any(|line| {
        let heading = line.trim_start_matches('#').trim().to_lowercase();
        let made: String = heading
            .chars()
            .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect();
        made == anchor
    })
}

/// A path without `.` and `..`.
fn lexical(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir => {}
            part => clean.push(part),
        }
    }
    clean
}

#[test]
fn no_link_is_dead() {
    let root = root();
    let docs = root.join("docs");
    let mut pages = files(&docs, ".md");
    let above = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    pages.extend(above.filter(|path| path.extension().is_some_and(|end| end == "md")));
    let mut count = 0;
    for path in &pages {
        let page = fs::read_to_string(path).unwrap();
        for link in links(&page) {
            count += 1;
            let (file, anchor) = match link.split_once('#') {
                Some((file, anchor)) => (file, Some(anchor)),
                None => (&link[..], None),
            };
            let target = match file {
                "" => path.clone(),
                file => lexical(&path.parent().unwrap().join(file)),
            };
            let place = path.strip_prefix(&root).unwrap().display();
            assert!(
                target.exists(),
                "{place} links to {link}, which is not there"
            );
            // The book has no other files than its own.
            if path.starts_with(&docs) {
                assert!(
                    target.starts_with(&docs),
                    "{place} links to {link} outside of the book"
                );
            }
            if let Some(anchor) = anchor {
                let text = fs::read_to_string(&target).unwrap();
                assert!(
                    has_anchor(&text, anchor),
                    "{place} links to {link}: no such heading"
                );
            }
        }
    }
    assert!(count > 30, "{count} links");
}

#[test]
fn each_page_is_in_the_book_once() {
    let book = fs::read_to_string(root().join("book.toml")).unwrap();
    let book: toml::Table = book.parse().unwrap();
    let docs = root().join(book["book"]["src"].as_str().unwrap());
    let summary = docs.join("SUMMARY.md");
    let contents = fs::read_to_string(&summary).unwrap();
    let mut listed: Vec<_> = links(&contents)
        .iter()
        .map(|link| docs.join(link))
        .collect();
    listed.sort();
    let mut pages = files(&docs, ".md");
    pages.retain(|path| *path != summary);
    assert_eq!(listed, pages);
    // mdBook takes nothing else than a list with links, and titles of parts.
    for line in contents.lines().filter(|line| !line.is_empty()) {
        let is_item = line.trim_start().starts_with("- [") || line.starts_with('[');
        assert!(is_item || line.starts_with("# "), "docs/SUMMARY.md: {line}");
    }
}
