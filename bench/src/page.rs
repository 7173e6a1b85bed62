//! The page of documentation that tells what was measured: its prose is written by
//! hand, what stands between two comments is written from a run.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::contender::Contender;
use crate::measure::FILE_SIZE;
use crate::results::{Figure, Results};

const MICROVM: &str = "qemu microvm";

/// Writes a run's part of `page`.
///
/// # Errors
/// The page can't be read or written, or has no such part.
pub fn update(page: &Path, results: &Results) -> Result<()> {
    let text = fs::read_to_string(page).with_context(|| format!("read {}", page.display()))?;
    let subject = &results.about.subject;
    let text = replaced(&text, subject, &part(results))
        .with_context(|| format!("{} has no part for {subject}", page.display()))?;
    fs::write(page, text).with_context(|| format!("write {}", page.display()))
}

fn replaced(text: &str, subject: &str, part: &str) -> Option<String> {
    let begin = format!("<!-- written by bench/run from its figures: {subject} -->\n");
    let (before, rest) = text.split_once(&begin)?;
    let end = "<!-- end -->\n";
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}\n{part}\n{end}{after}"))
}

/// The method and the tables.
fn part(results: &Results) -> String {
    let about = &results.about;
    let with: Vec<String> = about
        .with
        .iter()
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    let mut text = format!(
        "Measured on {} of {}, with {}. {}\n\n",
        about.date,
        about.build,
        with.join(", "),
        about.method
    );
    let (compared, other): (Vec<_>, Vec<_>) = results
        .figures
        .iter()
        .partition(|figure| figure.what != FILE_SIZE);
    let columns: Vec<&str> = columns()
        .into_iter()
        .filter(|column| {
            compared
                .iter()
                .any(|figure| contender_of(&figure.who) == Some(*column))
        })
        .collect();
    // Writing to a String can't fail.
    let _ = writeln!(text, "| | {} |", columns.join(" | "));
    let _ = writeln!(text, "| --- |{}", " ---: |".repeat(columns.len()));
    let mut rows: Vec<String> = Vec::new();
    for figure in &compared {
        let row = row_of(figure);
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    for row in rows {
        let cells: Vec<String> = columns
            .iter()
            .map(|column| {
                let of = |figure: &&&Figure| {
                    row_of(figure) == row && contender_of(&figure.who) == Some(*column)
                };
                compared
                    .iter()
                    .find(of)
                    .map(|figure| cell(figure))
                    .unwrap_or_default()
            })
            .collect();
        let _ = writeln!(text, "| {row} | {} |", cells.join(" | "));
    }
    if !other.is_empty() {
        text.push_str("\n| size of | |\n| --- | ---: |\n");
        for figure in other {
            let _ = writeln!(
                text,
                "| {} | {} {} |",
                figure.who,
                number(figure.median),
                figure.unit
            );
        }
    }
    text
}

fn columns() -> Vec<&'static str> {
    let mut all: Vec<_> = Contender::ALL
        .iter()
        .map(|contender| contender.name())
        .collect();
    all.push(MICROVM);
    all
}

/// Whose figure it is, though it be that of one of its processes.
fn contender_of(who: &str) -> Option<&'static str> {
    columns().into_iter().find(|name| {
        who.strip_prefix(name)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(", "))
    })
}

/// What was measured, the process included.
fn row_of(figure: &Figure) -> String {
    let contender = contender_of(&figure.who).unwrap_or_default();
    let process = figure.who.strip_prefix(contender).unwrap_or_default();
    let process = process.trim_start_matches(", ");
    let mut row = figure.what.clone();
    if !process.is_empty() {
        row = format!("{row} {process}");
    } else if row.ends_with(" of") {
        row.push_str(" all of it");
    }
    if !figure.unit.is_empty() {
        row = format!("{row}, {}", figure.unit);
    }
    row
}

/// The median, and where they differ the least and the most.
fn cell(figure: &Figure) -> String {
    let [median, least, most] = [figure.median, figure.least(), figure.most()].map(number);
    if least == most {
        median
    } else {
        format!("{median} ({least}–{most})")
    }
}

/// With one digit after the point where it is small, and with commas where it is not.
fn number(value: f64) -> String {
    if value.abs() < 1000.0 {
        let digits = if value.abs() < 10.0 { 2 } else { 1 };
        return format!("{value:.digits$}");
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Measured;
    use crate::results::About;

    fn results() -> Results {
        let measured = |what: &str, who: &str, value, unit| Measured {
            what: what.into(),
            who: who.into(),
            value,
            unit,
        };
        let all = [
            measured("start", "runc", 20.0, "ms"),
            measured("start", "husk, copy", 10.0, "ms"),
            measured("start", "husk, copy", 12.0, "ms"),
            measured("memory of", "husk, copy, husk-vmm", 2400.0, "KiB"),
            measured("memory of", "qemu microvm", 25000.0, "KiB"),
            measured("size of", "runc", 9.0, "bytes"),
            measured("size of", "husk-vmm", 2_675_024.0, "bytes"),
        ];
        let about = About {
            subject: "starts".into(),
            method: "Counted.".into(),
            date: "2026-11-23".into(),
            build: "Husk 1".into(),
            with: [("linux".to_owned(), "6.12".to_owned())].into(),
        };
        Results::of(&all, about)
    }

    #[test]
    fn a_part_has_a_column_for_each_contender() {
        let wanted = "\
Measured on 2026-11-23 of Husk 1, with linux 6.12. Counted.

| | runc | husk, copy | qemu microvm |
| --- | ---: | ---: | ---: |
| start, ms | 20.0 | 11.0 (10.0–12.0) |  |
| memory of husk-vmm, KiB |  | 2,400 |  |
| memory of all of it, KiB |  |  | 25,000 |

| size of | |
| --- | ---: |
| runc | 9.00 bytes |
| husk-vmm | 2,675,024 bytes |
";
        assert_eq!(part(&results()), wanted);
    }

    #[test]
    fn only_what_is_between_the_comments_is_written() {
        let page =
            "prose\n<!-- written by bench/run from its figures: io -->\nold\n<!-- end -->\nmore\n";
        let wanted = "prose\n<!-- written by bench/run from its figures: io -->\n\nnew\n\n<!-- end -->\nmore\n";
        let new = replaced(page, "io", "new\n").expect("it has the part");
        assert_eq!(new, wanted);
        assert_eq!(replaced(&new, "io", "new\n").as_deref(), Some(wanted));
        assert_eq!(replaced(page, "many", "new\n"), None);
    }
}
