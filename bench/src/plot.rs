//! The starts as bars.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;

use crate::measure::{END, FIRST_OUTPUT, GUEST_READY};
use crate::results::Results;

const BAR: i32 = 26;
const LEFT: i32 = 330;
const WIDTH: u32 = 900;

/// Draws a bar for each start and contender.
pub fn starts(results: &Results, file: &Path) -> Result<()> {
    let bars: Vec<_> = results
        .figures
        .iter()
        .filter(|figure| [FIRST_OUTPUT, END, GUEST_READY].contains(&figure.what.as_str()))
        .collect();
    let longest = bars.iter().map(|bar| bar.median).fold(1.0, f64::max);
    let height = u32::try_from(bars.len())? * (BAR as u32 + 10) + 60;
    let area = SVGBackend::new(file, (WIDTH, height)).into_drawing_area();
    let failed = |error| anyhow!("draw {}: {error}", file.display());
    let draw = || -> Result<(), DrawingAreaErrorKind<_>> {
        area.fill(&WHITE)?;
        area.draw_text(
            "Starts, medians in milliseconds",
            &("sans-serif", 18).into_text_style(&area),
            (10, 10),
        )?;
        for (index, bar) in bars.iter().enumerate() {
            let top = 45 + i32::try_from(index).unwrap_or_default() * (BAR + 10);
            let length = (f64::from(WIDTH as i32 - LEFT - 90) * bar.median / longest) as i32;
            let colour = match bar.who.as_str() {
                "husk, boot" => RGBColor(0x2a, 0x6f, 0xb0),
                "husk, copy" => RGBColor(0x1d, 0x9e, 0x74),
                "runc" => RGBColor(0x8a, 0x8a, 0x8a),
                _ => RGBColor(0xd0, 0x8a, 0x2e),
            };
            let small = ("sans-serif", 14).into_text_style(&area);
            area.draw_text(&format!("{}: {}", bar.what, bar.who), &small, (10, top + 6))?;
            area.draw(&Rectangle::new(
                [(LEFT, top), (LEFT + length, top + BAR)],
                colour.filled(),
            ))?;
            area.draw_text(
                &format!("{:.0}", bar.median),
                &small,
                (LEFT + length + 8, top + 6),
            )?;
        }
        area.present()
    };
    draw()
        .map_err(|error| error.to_string())
        .map_err(failed)
        .context("plot")
}
