//! The timeline as a picture.

use crate::text;

use super::{Stage, milliseconds, whole_ns};

const WIDTH: u32 = 900;
const ROW: u32 = 28;
const TOP: u32 = 48;
/// Where bars begin and end.
const LEFT: u32 = 300;
const RIGHT: u32 = 780;

/// Draws `stages` below `title`.
pub fn draw(title: &str, stages: &[Stage]) -> String {
    let whole = whole_ns(stages);
    let x = |ns: u64| {
        let offset = u128::from(ns) * u128::from(RIGHT - LEFT) / u128::from(whole);
        LEFT + u32::try_from(offset).unwrap_or_default()
    };
    let mut rows = String::new();
    let mut top = TOP;
    for stage in stages {
        let (from, to) = (x(stage.from_ns), x(stage.to_ns));
        let (width, middle) = ((to - from).max(1), top + ROW / 2 + 4);
        rows.push_str(&format!(
            "<text x=\"12\" y=\"{middle}\">{}</text>\
             <rect x=\"{from}\" y=\"{}\" width=\"{width}\" height=\"{}\" fill=\"#3b6ea5\"/>\
             <text x=\"{}\" y=\"{middle}\">{}</text>\n",
            escape(stage.what),
            top + 5,
            ROW - 10,
            to.max(from + 1) + 6,
            milliseconds(stage.to_ns - stage.from_ns),
        ));
        top += ROW;
    }
    let height = top + 16;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"28\" font-size=\"16\">{}: {}</text>\n{rows}</svg>\n",
        escape(&text::short(title)),
        milliseconds(stages.last().map_or(0, |stage| stage.to_ns)),
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
