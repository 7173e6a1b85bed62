//! What was measured beside what is promised, and beside what it was.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::results::{Figure, Results};

/// How much worse than it was a figure may be, where nothing else is said: 3 %.
const SLACK: f64 = 0.03;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Promises {
    /// The versions with which `seen` was measured: other ones do other work.
    with: BTreeMap<String, String>,
    figure: Vec<Bounds>,
}

/// What is known of a figure.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bounds {
    /// Of which run it is.
    #[serde(default = "starts")]
    subject: String,
    what: String,
    who: String,
    /// Whose figure of the same run it is divided by.
    of: Option<String>,
    /// What SPECIFICATION.md promises.
    promised: Option<f64>,
    /// What was measured when the line was written.
    seen: f64,
    /// Whether the least of the rounds is compared instead of their median: where what
    /// disturbs a round only adds to it, and often.
    #[serde(default)]
    least: bool,
    /// How much worse it may be, for a figure that differs by more from run to run.
    slack: Option<f64>,
    /// What was seen of the spread, for whoever wants it narrower.
    spread: Option<String>,
}

fn starts() -> String {
    "starts".into()
}

/// What became of a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    /// It is kept.
    Yes,
    /// It was not when the line was written, and is not now.
    NotYet,
    /// It was, and is not.
    Broken,
}

/// What became of a figure since the line was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Since {
    /// As it was, or better.
    AsGood,
    /// Worse than it may be.
    Worse,
    /// Measured on something else.
    Incomparable,
}

/// How many checks ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u32,
    failed: u32,
    skipped: u32,
}

/// Prints what became of each figure, with a summary as cargo's.
///
/// # Errors
/// A promise is broken, or a figure is worse than it may be; or a file can't be read.
pub fn check(results: &Path, promises: &Path) -> Result<()> {
    let results = Results::read(results)?;
    let text =
        fs::read_to_string(promises).with_context(|| format!("read {}", promises.display()))?;
    let promises: Promises = toml::from_str(&text)?;
    let comparable = promises.with == results.about.with;
    if !comparable {
        println!(
            "no figure is compared with what it was, which was measured with {:?}; this is {:?}",
            promises.with, results.about.with
        );
    }
    let mut counts = Counts::default();
    println!("| promise | since | figure | median | promised | was | may be |");
    println!("| --- | --- | --- | ---: | ---: | ---: | --- |");
    let subject = &results.about.subject;
    for bounds in promises
        .figure
        .iter()
        .filter(|bounds| &bounds.subject == subject)
    {
        let value = bounds.value(&results.figures)?;
        let kept = bounds.kept(value);
        let since = if comparable {
            bounds.since(value)
        } else {
            Since::Incomparable
        };
        counts.add(kept, since);
        println!("{}", bounds.line(kept, since, value));
    }
    println!("{}", counts.line());
    ensure!(
        counts.failed == 0,
        "{} figures are worse than they may be",
        counts.failed
    );
    Ok(())
}

impl Counts {
    fn add(&mut self, kept: Option<Kept>, since: Since) {
        match kept {
            Some(Kept::Yes) => self.passed += 1,
            Some(Kept::NotYet) => self.skipped += 1,
            Some(Kept::Broken) => self.failed += 1,
            None => {}
        }
        match since {
            Since::AsGood => self.passed += 1,
            Since::Worse => self.failed += 1,
            Since::Incomparable => self.skipped += 1,
        }
    }

    fn line(self) -> String {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        format!(
            "bench: {passed} passed, {failed} failed, {skipped} skipped (not yet, or measured on something else)"
        )
    }
}

impl Bounds {
    fn value(&self, figures: &[Figure]) -> Result<f64> {
        let of = |who: &str| {
            figures
                .iter()
                .find(|figure| figure.what == self.what && figure.who == who)
                .map(|figure| {
                    if self.least {
                        figure.least()
                    } else {
                        figure.median
                    }
                })
                .with_context(|| format!("{} of {who} was not measured", self.what))
        };
        let own = of(&self.who)?;
        let Some(other) = &self.of else {
            return Ok(own);
        };
        let other = of(other)?;
        ensure!(other > 0.0, "{}: nothing to compare with", self.what);
        Ok(own / other)
    }

    fn kept(&self, value: f64) -> Option<Kept> {
        let promised = self.promised?;
        Some(if value <= promised {
            Kept::Yes
        } else if self.seen > promised {
            Kept::NotYet
        } else {
            Kept::Broken
        })
    }

    fn may_be(&self) -> f64 {
        self.seen * (1.0 + self.slack.unwrap_or(SLACK))
    }

    fn since(&self, value: f64) -> Since {
        if value > self.may_be() {
            Since::Worse
        } else {
            Since::AsGood
        }
    }

    fn line(&self, kept: Option<Kept>, since: Since, value: f64) -> String {
        let kept = match kept {
            None => "",
            Some(Kept::Yes) => "kept",
            Some(Kept::NotYet) => "not yet",
            Some(Kept::Broken) => "BROKEN",
        };
        let since = match since {
            Since::AsGood => "as good",
            Since::Worse => "WORSE",
            Since::Incomparable => "",
        };
        let times = self.of.as_ref().map(|of| format!(" / {of}"));
        let promised = self.promised.map(|bound| bound.to_string());
        let spread = self.spread.as_ref().map(|spread| format!(": {spread}"));
        format!(
            "| {kept} | {since} | {}, {}{} | {value:.2} | {} | {} | {:.2}{} |",
            self.what,
            self.who,
            times.unwrap_or_default(),
            promised.unwrap_or_default(),
            self.seen,
            self.may_be(),
            spread.unwrap_or_default(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(who: &str, median: f64) -> Figure {
        Figure {
            what: "start".into(),
            who: who.into(),
            unit: "ms".into(),
            median,
            values: vec![median],
        }
    }

    fn bounds(of: Option<&str>, promised: Option<f64>, seen: f64) -> Bounds {
        Bounds {
            subject: starts(),
            what: "start".into(),
            who: "husk".into(),
            of: of.map(str::to_owned),
            promised,
            seen,
            least: false,
            slack: None,
            spread: None,
        }
    }

    #[test]
    fn a_promise_and_a_regression_are_told_apart() {
        let figures = [figure("husk", 30.0), figure("runc", 20.0)];
        for (bounds, value, kept, since) in [
            (bounds(None, None, 29.2), 30.0, None, Since::AsGood),
            (bounds(None, None, 29.0), 30.0, None, Since::Worse),
            (
                bounds(None, Some(30.0), 30.0),
                30.0,
                Some(Kept::Yes),
                Since::AsGood,
            ),
            (
                bounds(None, Some(29.5), 29.4),
                30.0,
                Some(Kept::Broken),
                Since::AsGood,
            ),
            (
                bounds(None, Some(28.0), 29.0),
                30.0,
                Some(Kept::NotYet),
                Since::Worse,
            ),
            (
                bounds(Some("runc"), Some(1.5), 1.5),
                1.5,
                Some(Kept::Yes),
                Since::AsGood,
            ),
            (
                bounds(Some("runc"), Some(1.5), 1.4),
                1.5,
                Some(Kept::Yes),
                Since::Worse,
            ),
        ] {
            let seen = bounds.value(&figures).expect("measured");
            assert!((seen - value).abs() < 1e-9, "{seen:?}");
            assert_eq!(bounds.kept(seen), kept, "{bounds:?}");
            assert_eq!(bounds.since(seen), since, "{bounds:?}");
        }
    }

    #[test]
    fn a_figure_that_spreads_may_be_worse_by_more() {
        let wide = Bounds {
            slack: Some(0.1),
            ..bounds(None, None, 100.0)
        };
        assert_eq!(wide.since(109.0), Since::AsGood);
        assert_eq!(wide.since(111.0), Since::Worse);
    }

    #[test]
    fn the_least_of_the_rounds_is_not_disturbed() {
        let disturbed = Figure {
            values: vec![169.0, 203.0, 204.0],
            ..figure("husk", 203.0)
        };
        let least = Bounds {
            least: true,
            ..bounds(None, None, 168.6)
        };
        let seen = least.value(&[disturbed]).expect("measured");
        assert!((seen - 169.0).abs() < 1e-9, "{seen}");
    }

    #[test]
    fn what_is_not_yet_kept_does_not_count_as_passed() {
        let mut counts = Counts::default();
        counts.add(Some(Kept::NotYet), Since::AsGood);
        counts.add(Some(Kept::Yes), Since::Worse);
        counts.add(Some(Kept::Broken), Since::Incomparable);
        let wanted = Counts {
            passed: 2,
            failed: 2,
            skipped: 2,
        };
        assert_eq!(counts, wanted);
    }

    #[test]
    fn bounds_of_something_else_are_an_error() {
        let error = bounds(Some("kata"), None, 1.0).value(&[figure("husk", 1.0)]);
        let error = error.expect_err("not measured").to_string();
        assert_eq!(error, "start of kata was not measured");
    }

    #[test]
    fn the_promises_of_this_tree_can_be_read() {
        let text = include_str!("../promises.toml");
        let promises: Promises = toml::from_str(text).expect("promises.toml");
        assert!(!promises.figure.is_empty() && !promises.with.is_empty());
        for bounds in &promises.figure {
            assert_eq!(
                bounds.slack.is_some(),
                bounds.spread.is_some(),
                "{bounds:?}"
            );
        }
    }
}
