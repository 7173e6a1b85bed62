//! The figures as a table.

use std::fmt::Write;

use crate::results::Results;

/// A table in Markdown, a line for each thing and contender.
pub fn as_text(results: &Results) -> String {
    let mut text = format!(
        "Medians. {}\n\n| what | of | median | least | most | unit |\n| --- | --- | ---: | ---: | ---: | --- |\n",
        results.about.method
    );
    for figure in &results.figures {
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "| {} | {} | {:.1} | {:.1} | {:.1} | {} |",
            figure.what,
            figure.who,
            figure.median,
            figure.least(),
            figure.most(),
            figure.unit
        );
    }
    text
}
