//! `husk traces`: what containerd asked of shims, and where that spent its time, as
//! spans of OpenTelemetry. It follows the pods as `husk events` does.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::answer::Answer;
use crate::events::watch::Watch;
use crate::events::{self, Known};
use crate::pods;

mod endpoint;
mod exporter;
mod file;
mod otlp;
mod span;
mod traced;

pub use endpoint::Endpoint;
use exporter::Exporter;
use span::Clock;
use traced::Traced;

/// Least time from one look at all pods to the next: what programs are added to pods
/// with tells, too.
const PACE: Duration = Duration::from_millis(50);

/// Follows the pods until it is interrupted, or nobody reads any more.
///
/// # Errors
/// The pods are not for this user, or cannot be watched.
pub fn run(collector: Option<&Endpoint>) -> anyhow::Result<Answer> {
    Answer::streamed(follow(collector))
}

fn follow(collector: Option<&Endpoint>) -> anyhow::Result<()> {
    let state_dir = pods::state_dir()?;
    // For the sake of its message, where that is refused.
    pods::all(&state_dir)?;
    let mut watch = Watch::new(state_dir.clone())?.with_writes();
    let exporter = collector
        .map(|to| Exporter::start(to.clone()))
        .transpose()?;
    let mut output = io::stdout().lock();
    let mut known: Option<Known> = None;
    let mut traced = Traced::default();
    loop {
        // Whatever comes after this is told, though the look may have seen it.
        watch.arm()?;
        let looked = Instant::now();
        let now = events::look(&state_dir, known.as_ref())?;
        let spans = traced.note(&now, Clock::now());
        if let (None, Some(to)) = (&known, collector) {
            writeln!(output, "spans go to {to}")?;
            output.flush()?;
        }
        let other = match &exporter {
            Some(exporter) => {
                exporter.take(spans);
                None
            }
            None => {
                if !spans.is_empty() {
                    writeln!(output, "{}", otlp::text(&spans)?)?;
                    output.flush()?;
                }
                // Of what is written to only its end is ever told.
                Some((output.as_fd(), PollFlags::empty()))
            }
        };
        let written = watch.wait(now.values(), other)?;
        if written.contains(PollFlags::ERR) {
            return Ok(());
        }
        known = Some(now);
        thread::sleep(PACE.saturating_sub(looked.elapsed()));
    }
}
