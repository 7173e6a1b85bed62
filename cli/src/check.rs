//! `husk check`: whether this node can run pods, and what to do where it cannot.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;

use husk_node::config::Sources;

use crate::answer::{Answer, WRONG};
use crate::text;

mod containerd;
mod files;
mod kernel;
mod kvm;
mod limits;
mod remains;

pub use files::{SHIM, installed_shim};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub about: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What was seen.
    pub found: String,
    /// What to do; empty where all is well.
    pub advice: String,
}

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Pods run, but something is missing or slow.
    Warning,
    /// No pod runs.
    Problem,
}

/// A node, by its files.
#[derive(Clone, Debug)]
pub struct Node {
    root: PathBuf,
}

impl Finding {
    fn ok(about: &'static str, found: impl Into<String>) -> Self {
        Self::new(about, Verdict::Ok, found, "")
    }

    fn warning(about: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(about, Verdict::Warning, found, advice)
    }

    fn problem(about: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(about, Verdict::Problem, found, advice)
    }

    fn new(
        about: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            about,
            verdict,
            found: text::short(&found.into()),
            advice: advice.into(),
        }
    }
}

impl Node {
    /// The one whose root this is.
    pub fn at(root: &Path) -> Self {
        let root = root.to_owned();
        Self { root }
    }

    /// Where a path of the node is.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// What a file says.
    pub fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.path(path)).ok()
    }

    /// A file with nothing but a number.
    pub fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.trim().parse().ok()
    }
}

/// Looks at everything.
///
/// # Errors
/// The answer cannot be written as JSON.
pub fn run(json: bool) -> anyhow::Result<Answer> {
    let node = Node::at(Path::new("/"));
    let loaded = Sources::of_node().load();
    let config = loaded.as_ref().map(|loaded| loaded.config.clone());
    let config = config.unwrap_or_default();
    let mut findings = kvm::check(&node);
    findings.extend(kernel::check(&node));
    findings.extend(files::check(&node, loaded));
    findings.extend(containerd::check(&node, &containerd::Installed::ask()));
    findings.extend(limits::check(&node, &config));
    findings.extend(remains::check(&node, &config));
    answer(&findings, json)
}

fn answer(findings: &[Finding], json: bool) -> anyhow::Result<Answer> {
    let is_wrong = |finding: &&Finding| finding.verdict == Verdict::Problem;
    let problems = findings.iter().filter(is_wrong).count();
    let warnings = findings
        .iter()
        .filter(|one| one.verdict == Verdict::Warning);
    let warnings = warnings.count();
    let code = if problems > 0 { WRONG } else { 0 };
    if json {
        let value = json!({
            "problems": problems, "warnings": warnings, "findings": findings,
        });
        return Ok(Answer::json(&value)?.with_code(code));
    }
    let mut text = String::new();
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok     ",
            Verdict::Warning => "warning",
            Verdict::Problem => "PROBLEM",
        };
        text.push_str(&format!(
            "{verdict}  {}: {}\n",
            finding.about, finding.found
        ));
        if !finding.advice.is_empty() {
            text.push_str(&format!("         {}\n", finding.advice));
        }
    }
    text.push_str(&match (problems, warnings) {
        (0, 0) => "This node can run pods.\n".to_owned(),
        (0, warnings) => format!("This node can run pods; warnings: {warnings}.\n"),
        (problems, _) => format!("This node cannot run pods; problems: {problems}.\n"),
    });
    Ok(Answer::done(text).with_code(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_decides() {
        let ok = Finding::ok("kernel", "6.12");
        let warning = Finding::warning("inotify", "8", "more");
        let problem = Finding::problem("KVM", "no\x1b[0m", "load it");
        let answer = |findings: &[Finding]| answer(findings, false).unwrap();
        assert_eq!(answer(std::slice::from_ref(&ok)).code, 0);
        assert_eq!(answer(&[ok.clone(), warning.clone()]).code, 0);
        let all = answer(&[ok.clone(), warning, problem.clone()]);
        assert_eq!(all.code, WRONG);
        assert!(
            all.text
                .contains("PROBLEM  KVM: no\\u{1b}[0m\n         load it\n")
        );
        let json = super::answer(&[ok, problem], true).unwrap();
        let value: serde_json::Value = serde_json::from_str(&json.text).unwrap();
        assert_eq!((json.code, &value["problems"]), (WRONG, &json!(1)));
        assert_eq!(value["findings"][1]["verdict"], "problem");
    }
}
