//! What a run leaves: its figures, and what they were measured with.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::measure::Measured;

/// One run.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Results {
    /// How the figures came about, and when.
    #[serde(flatten)]
    pub about: About,
    /// The figures of each thing and contender together, things in the order in
    /// which they were first measured.
    pub figures: Vec<Figure>,
}

/// How figures came about.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct About {
    /// `starts`, `io` or `many`.
    pub subject: String,
    /// How time was counted.
    pub method: String,
    /// The day, as 2026-11-23.
    pub date: String,
    /// What was measured.
    pub build: String,
    /// Versions of what it ran on and beside.
    pub with: BTreeMap<String, String>,
}

/// The values of one thing and contender.
#[derive(Debug, Deserialize, Serialize)]
pub struct Figure {
    /// What was measured.
    pub what: String,
    /// Of whom.
    pub who: String,
    /// Unit of the values.
    pub unit: String,
    /// In the middle of the values.
    pub median: f64,
    /// One a round, sorted.
    pub values: Vec<f64>,
}

impl Figure {
    /// The smallest value.
    pub fn least(&self) -> f64 {
        self.values.first().copied().unwrap_or_default()
    }

    /// The largest value.
    pub fn most(&self) -> f64 {
        self.values.last().copied().unwrap_or_default()
    }
}

impl Results {
    /// Groups what was measured.
    pub fn of(all: &[Measured], about: About) -> Self {
        let mut figures: Vec<Figure> = Vec::new();
        for measured in all {
            match figures
                .iter_mut()
                .find(|figure| figure.what == measured.what && figure.who == measured.who)
            {
                Some(figure) => figure.values.push(measured.value),
                None => figures.push(Figure {
                    what: measured.what.clone(),
                    who: measured.who.clone(),
                    unit: measured.unit.to_owned(),
                    median: 0.0,
                    values: vec![measured.value],
                }),
            }
        }
        for figure in &mut figures {
            figure.values.sort_by(f64::total_cmp);
            figure.median = median(&figure.values);
        }
        figures.sort_by_key(|figure| all.iter().position(|measured| measured.what == figure.what));
        Self { about, figures }
    }

    /// What `write` has left.
    ///
    /// # Errors
    /// The file can't be read, or is something else.
    pub fn read(file: &Path) -> Result<Self> {
        let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("read {}", file.display()))
    }

    /// Writes everything as JSON.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        fs::write(file, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("write {}", file.display()))
    }
}

/// Versions of the node's programs.
///
/// # Errors
/// One is not there.
pub fn versions() -> Result<BTreeMap<String, String>> {
    let release = "/proc/sys/kernel/osrelease";
    let kernel = fs::read_to_string(release).with_context(|| format!("read {release}"))?;
    let mut all = BTreeMap::from([("linux".to_owned(), kernel.trim().to_owned())]);
    for program in ["containerd", "runc"] {
        let said = Command::new(program).arg("--version").output();
        let said = said.with_context(|| format!("start {program}"))?.stdout;
        let said = String::from_utf8_lossy(&said);
        let version = version_of(&said).with_context(|| format!("{program} says {said}"))?;
        all.insert(program.to_owned(), version.to_owned());
    }
    Ok(all)
}

/// The first word that begins with a digit, or with one behind a `v`.
fn version_of(said: &str) -> Option<&str> {
    said.split_whitespace()
        .map(|word| word.strip_prefix('v').unwrap_or(word))
        .find(|word| word.starts_with(|first: char| first.is_ascii_digit()))
}

/// Of sorted values; of an even number, between the two in the middle.
fn median(sorted: &[f64]) -> f64 {
    let middle = |index: usize| sorted.get(index).copied().unwrap_or_default();
    let half = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) {
        f64::midpoint(middle(half.saturating_sub(1)), middle(half))
    } else {
        middle(half)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        for (values, wanted) in [
            (vec![], 0.0),
            (vec![3.0], 3.0),
            (vec![1.0, 4.0], 2.5),
            (vec![1.0, 2.0, 9.0], 2.0),
        ] {
            assert!((median(&values) - wanted).abs() < 1e-9, "{values:?}");
        }
    }

    #[test]
    fn versions_are_found_in_what_programs_say() {
        let containerd = "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6";
        assert_eq!(version_of(containerd), Some("1.7.24~ds1"));
        let runc = "runc version 1.1.15+ds1\ncommit: 1.1.15\n";
        assert_eq!(version_of(runc), Some("1.1.15+ds1"));
        assert_eq!(version_of("containerd x v2.1.9 abc"), Some("2.1.9"));
        assert_eq!(version_of("none"), None);
    }

    #[test]
    fn values_are_grouped_and_read_again() {
        let measured = |what: &str, who: &str, value| Measured {
            what: what.into(),
            who: who.into(),
            value,
            unit: "ms",
        };
        let all = [
            measured("start", "husk", 2.0),
            measured("end", "husk", 5.0),
            measured("start", "runc", 3.0),
            measured("start", "husk", 1.0),
        ];
        let results = Results::of(&all, About::default());
        let text = serde_json::to_string(&results).expect("JSON");
        let again: Results = serde_json::from_str(&text).expect("the same");
        let seen: Vec<_> = again
            .figures
            .iter()
            .map(|figure| {
                (
                    figure.what.as_str(),
                    figure.who.as_str(),
                    figure.least(),
                    figure.most(),
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("start", "husk", 1.0, 2.0),
                ("start", "runc", 3.0, 3.0),
                ("end", "husk", 5.0, 5.0)
            ]
        );
    }
}
