//! Spans of pods, below those of containerd where that traces, too.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::{Bench, Case, PROGRAM, Skip, husk_case};
use crate::case::crash::restart_containerd;
use crate::process::{self, Running, eventually};
use crate::spans::{Collector, Span, attribute};

/// The cases of this theme.
pub const CASES: &[Case] = &[
    husk_case("cli/traces", 40, alone),
    husk_case("cli/traces-of-containerd", 90, of_containerd),
];

fn follow(bench: &Bench, collector: &Collector) -> Result<Running> {
    if !fs::exists(PROGRAM)? {
        bail!(Skip(format!("no {PROGRAM}")));
    }
    let url = collector.url();
    let mut command = Command::new(PROGRAM);
    let mut following = process::start(command.args(["traces", "--otlp", &url]))?;
    following.await_output(&format!("spans go to {url}/v1/traces\n"), bench.seconds(10))?;
    Ok(following)
}

fn finish(bench: &Bench, following: Running) -> Result<()> {
    following.signal(Signal::SIGTERM)?;
    let told = following.finish(bench.seconds(10))?;
    ensure!(told.err().is_empty(), "{}", told.tail());
    Ok(())
}

/// The span of a pod or container with this name, once it is there.
fn await_span(
    bench: &Bench,
    collector: &Collector,
    name: &str,
    is_its: impl Fn(&Span) -> bool,
) -> Result<Span> {
    let awaited = eventually(name, bench.seconds(10), || {
        let spans = collector.of("husk");
        let found = spans
            .into_iter()
            .find(|span| span.name == name && is_its(span));
        Ok(found)
    });
    awaited.with_context(|| format!("{:?}", collector.of("husk")))
}

/// The spans below one, which are within it.
fn below(spans: &[Span], of: &Span) -> Result<Vec<Span>> {
    let is_below = |span: &&Span| span.parent_span_id == of.span_id;
    let below: Vec<Span> = spans.iter().filter(is_below).cloned().collect();
    for span in &below {
        ensure!(
            span.trace_id == of.trace_id
                && of.start_time_unix_nano <= span.start_time_unix_nano
                && span.start_time_unix_nano <= span.end_time_unix_nano
                && span.end_time_unix_nano <= of.end_time_unix_nano,
            "{span:?} below {of:?}"
        );
    }
    Ok(below)
}

fn names(spans: &[Span]) -> Vec<&str> {
    spans.iter().map(|span| &span.name[..]).collect()
}

const GUEST: &str = "guest: kernel and agent";

fn alone(bench: &Bench) -> Result<()> {
    let collector = Collector::start()?;
    let following = follow(bench, &collector)?;
    let id = bench.id();
    bench.ctr.run_detached(&[], &id, &["sleep", "1000"])?.ok()?;
    let is_its = |span: &Span| attribute(span, "husk.pod.id") == id;
    let whole = await_span(bench, &collector, "start of a pod", is_its)?;
    ensure!(whole.parent_span_id.is_empty(), "{whole:?}");
    let parts = below(&collector.of("husk"), &whole)?;
    ensure!(parts.len() >= 5, "{:?}", names(&parts));
    for name in [
        "VMM: the machine is built",
        GUEST,
        "first container: executed",
    ] {
        ensure!(
            names(&parts).contains(&name),
            "no {name}: {:?}",
            names(&parts)
        );
    }
    bench.ctr.remove(&id)?;
    finish(bench, following)
}

/// containerd with what makes it trace, for the time of a case.
struct Tracing<'a>(&'a Bench);

impl<'a> Tracing<'a> {
    fn start(bench: &'a Bench, collector: &Collector) -> Result<Self> {
        let tracing = Self(bench);
        let settings = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url()[..]),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_SERVICE_NAME", "containerd"),
            ("OTEL_BSP_SCHEDULE_DELAY", "500"),
        ];
        restart_containerd(bench, &settings)?;
        Ok(tracing)
    }
}

impl Drop for Tracing<'_> {
    fn drop(&mut self) {
        if let Err(error) = restart_containerd(self.0, &[]) {
            println!("containerd as it was: {error:#}");
        }
    }
}

fn of_containerd(bench: &Bench) -> Result<()> {
    let version = process::run(&mut bench.ctr.command(&["version"]), bench.seconds(5))?.ok()?;
    if version.out().contains("Version:  1.") || version.out().contains("Version:  v1.") {
        bail!(Skip("containerd 1 tells shims of no trace".into()));
    }
    let collector = Collector::start()?;
    let _tracing = Tracing::start(bench, &collector)?;
    let following = follow(bench, &collector)?;
    let id = bench.id();
    bench.ctr.run_detached(&[], &id, &["sleep", "1000"])?.ok()?;
    bench.ctr.exec(&[], &id, "more", &["true"])?.ok()?;
    bench.ctr.remove(&id)?;
    let of_id = |span: &Span| attribute(span, "container.id") == id;
    let of_exec = |span: &Span| of_id(span) && !attribute(span, "husk.exec.id").is_empty();
    let deleted = await_span(bench, &collector, "Delete", |span| {
        of_id(span) && !of_exec(span)
    })?;
    let created = await_span(bench, &collector, "Create", of_id)?;
    let started = await_span(bench, &collector, "Start", |span| {
        of_id(span) && !of_exec(span)
    })?;
    let added = await_span(bench, &collector, "Start", of_exec)?;

    // Below each of ours what was done, and above it what containerd did.
    let ours = collector.of("husk");
    let parts = below(&ours, &created)?;
    let guest = parts.iter().find(|span| span.name == GUEST);
    let guest = guest.with_context(|| format!("no guest: {:?}", names(&parts)))?;
    let halves = below(&ours, guest)?;
    println!("{:?} {:?}", names(&parts), names(&halves));
    ensure!(
        halves.is_empty() || names(&halves) == ["guest: kernel", "guest: agent"],
        "{halves:?}"
    );
    let parts = below(&ours, &started)?;
    ensure!(
        names(&parts).contains(&"guest: the program is executed"),
        "{parts:?}"
    );
    let parts = below(&ours, &added)?;
    ensure!(
        names(&parts).contains(&"guest: the added program is executed"),
        "{parts:?}"
    );
    let alone = ours.iter().find(|span| span.name == "start of a pod");
    ensure!(alone.is_none(), "{alone:?}");
    for (ours, method) in [
        (&created, "Task/Create"),
        (&started, "Task/Start"),
        (&added, "Task/Start"),
        (&deleted, "Task/Delete"),
    ] {
        let is_above =
            |span: &Span| span.span_id == ours.parent_span_id && span.trace_id == ours.trace_id;
        let above = eventually("containerd's span", bench.seconds(20), || {
            Ok(collector.of("containerd").into_iter().find(is_above))
        });
        let above = above.with_context(|| format!("{ours:?}"))?;
        println!("{} is below containerd's {}", ours.name, above.name);
        ensure!(above.name.ends_with(method), "{above:?}");
        // One node has one clock.
        ensure!(
            above.start_time_unix_nano <= ours.start_time_unix_nano,
            "{above:?} {ours:?}"
        );
        ensure!(
            ours.end_time_unix_nano <= above.end_time_unix_nano,
            "{above:?} {ours:?}"
        );
    }
    finish(bench, following)
}
