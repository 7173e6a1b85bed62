//! The figures as a table and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::measure::Measured;

/// The figures of one thing and contender.
pub struct Series<'a> {
    /// What was measured.
    pub what: &'a str,
    /// Of whom.
    pub who: &'a str,
    /// Unit of the values.
    pub unit: &'a str,
    /// One a round, sorted.
    pub values: Vec<f64>,
}

impl Series<'_> {
    /// The value in the middle.
    pub fn median(&self) -> f64 {
        self.values
            .get(self.values.len() / 2)
            .copied()
            .unwrap_or_default()
    }
}

/// Groups the figures, in the order of their first appearance.
pub fn series(all: &[Measured]) -> Vec<Series<'_>> {
    let mut found: Vec<Series<'_>> = Vec::new();
    for measured in all {
        match found
            .iter_mut()
            .find(|series| series.what == measured.what && series.who == measured.who)
        {
            Some(series) => series.values.push(measured.value),
            None => found.push(Series {
                what: &measured.what,
                who: &measured.who,
                unit: measured.unit,
                values: vec![measured.value],
            }),
        }
    }
    for series in &mut found {
        series.values.sort_by(f64::total_cmp);
    }
    found.sort_by_key(|series| all.iter().position(|measured| measured.what == series.what));
    found
}

/// A table in Markdown.
pub fn as_text(all: &[Measured], method: &str) -> String {
    let mut text = format!(
        "Medians; time: {method}.\n\n| what | of | median | least | most | unit |\n| --- | --- | ---: | ---: | ---: | --- |\n"
    );
    for series in series(all) {
        let (least, most) = (series.values.first(), series.values.last());
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "| {} | {} | {:.1} | {:.1} | {:.1} | {} |",
            series.what,
            series.who,
            series.median(),
            least.copied().unwrap_or_default(),
            most.copied().unwrap_or_default(),
            series.unit
        );
    }
    text
}

/// Every value.
pub fn as_json(all: &[Measured], method: &str) -> Value {
    let figures: Vec<Value> = series(all)
        .into_iter()
        .map(|series| {
            json!({
                "what": series.what,
                "who": series.who,
                "unit": series.unit,
                "median": series.median(),
                "values": series.values,
            })
        })
        .collect();
    json!({ "method": method, "figures": figures })
}
