//! What was measured beside what is promised.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

/// How much worse than what was seen last a figure may be.
const SLACK: f64 = 1.03;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Promises {
    promise: Vec<Promise>,
}

/// One bound of a figure's median.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Promise {
    what: String,
    who: String,
    /// Whose figure of the same run it is divided by.
    of: Option<String>,
    /// What is promised.
    at_most: f64,
    /// What was measured when the line was written.
    seen: f64,
}

#[derive(Debug, Deserialize)]
struct Results {
    figures: Vec<Figure>,
}

#[derive(Debug, Deserialize)]
struct Figure {
    what: String,
    who: String,
    median: f64,
}

/// Prints each promise with what became of it.
///
/// # Errors
/// One is broken, or is more than 3 % worse than it was; or a file can't be read.
pub fn check(results: &Path, promises: &Path) -> Result<()> {
    let read =
        |path: &Path| fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
    let results: Value = serde_json::from_str(&read(results)?)?;
    let results: Results = serde_json::from_value(results)?;
    let promises: Promises = toml::from_str(&read(promises)?)?;
    let mut broken = 0;
    for promise in &promises.promise {
        let value = promise.value(&results.figures)?;
        let verdict = promise.verdict(value);
        broken += u32::from(verdict != "ok");
        println!("{verdict:<10} {}", promise.line(value));
    }
    ensure!(broken == 0, "{broken} figures are worse than they may be");
    Ok(())
}

impl Promise {
    fn value(&self, figures: &[Figure]) -> Result<f64> {
        let of = |who: &str| {
            figures
                .iter()
                .find(|figure| figure.what == self.what && figure.who == who)
                .map(|figure| figure.median)
                .with_context(|| format!("{} of {who} was not measured", self.what))
        };
        let own = of(&self.who)?;
        match &self.of {
            None => Ok(own),
            Some(other) => {
                let other = of(other)?;
                ensure!(other > 0.0, "{}: nothing to compare with", self.what);
                Ok(own / other)
            }
        }
    }

    fn verdict(&self, value: f64) -> &'static str {
        if value > self.at_most {
            "broken"
        } else if value > self.seen * SLACK {
            "worse"
        } else {
            "ok"
        }
    }

    fn line(&self, value: f64) -> String {
        let times = self.of.as_ref().map(|of| format!(" times {of}"));
        let Self { what, who, .. } = self;
        format!(
            "{what}, {who}: {value:.2}{} (promised {}, seen {})",
            times.unwrap_or_default(),
            self.at_most,
            self.seen
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(who: &str, median: f64) -> Figure {
        let what = "start".into();
        let who = who.into();
        Figure { what, who, median }
    }

    fn promise(of: Option<&str>, at_most: f64, seen: f64) -> Promise {
        Promise {
            what: "start".into(),
            who: "husk".into(),
            of: of.map(str::to_owned),
            at_most,
            seen,
        }
    }

    #[test]
    fn a_figure_is_compared_with_the_promise_and_with_what_it_was() {
        let figures = [figure("husk", 30.0), figure("runc", 20.0)];
        for (promise, value, verdict) in [
            (promise(None, 40.0, 30.0), 30.0, "ok"),
            (promise(None, 40.0, 29.2), 30.0, "ok"),
            (promise(None, 40.0, 29.0), 30.0, "worse"),
            (promise(None, 29.0, 30.0), 30.0, "broken"),
            (promise(Some("runc"), 1.5, 1.5), 1.5, "ok"),
            (promise(Some("runc"), 1.4, 1.4), 1.5, "broken"),
        ] {
            let measured = promise.value(&figures).expect("measured");
            assert!((measured - value).abs() < 1e-9, "{measured}");
            assert_eq!(promise.verdict(measured), verdict, "{promise:?}");
        }
    }

    #[test]
    fn a_promise_about_something_else_is_an_error() {
        let error = promise(Some("kata"), 1.0, 1.0).value(&[figure("husk", 1.0)]);
        let error = error.expect_err("not measured").to_string();
        assert_eq!(error, "start of kata was not measured");
    }

    #[test]
    fn the_promises_of_this_tree_can_be_read() {
        let text = include_str!("../promises.toml");
        let promises: Promises = toml::from_str(text).expect("promises.toml");
        assert!(!promises.promise.is_empty());
        for promise in &promises.promise {
            assert!(promise.seen <= promise.at_most, "{promise:?}");
        }
    }
}
