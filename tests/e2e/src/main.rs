//! `husk-e2e`: the end-to-end cases, run as root on a node with containerd.
//!
//! Every case runs for runc too, which proves the case; after each the node
//! must look as it did before.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use husk_e2e::case::{self, Case};
use husk_e2e::compatibility::Compatibility;
use husk_e2e::node::{Node, Runtime};
use husk_e2e::{clean, cri, docker, host, image, runner, template};

const USAGE: &str = "\
usage: husk-e2e [--runtime husk,runc] [--filter TEXT]... [--skip TEXT]... [--list]
  --filter TEXT    only cases whose name is or contains a TEXT
  --skip TEXT      no cases whose name contains a TEXT
  --report FILE    docs/compatibility.md from what runs printed, to standard output
  --share K/N      of those, every Nth from the Kth on
  --socket PATH    containerd's socket (/run/containerd/containerd.sock)
  --root DIR       containerd's root (/var/lib/containerd)
  --state DIR      containerd's state (/run/containerd)
  --work DIR       where the cases keep files (/var/tmp/husk-e2e)
  --probe FILE     the program for the test image (husk-probe beside this one)
  --busybox FILE   static busybox for the test image (/bin/busybox)
  --restart TEXT   shell command that starts containerd after it was killed
  --slowness N     how much longer to wait than on hardware (1)
  --bulk-mib N     size of bulk transfers (100)";

struct Options {
    node: Node,
    runtimes: Vec<Runtime>,
    filters: Vec<String>,
    skips: Vec<String>,
    share: (usize, usize),
    list: bool,
    one: Option<String>,
    reports: Vec<PathBuf>,
    probe: PathBuf,
    busybox: PathBuf,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let beside = std::env::current_exe()?.with_file_name("husk-probe");
        let mut options = Self {
            node: Node::local(),
            runtimes: vec![Runtime::Husk, Runtime::Runc],
            filters: Vec::new(),
            skips: Vec::new(),
            share: (1, 1),
            list: false,
            one: None,
            reports: Vec::new(),
            probe: beside,
            busybox: "/bin/busybox".into(),
        };
        while let Some(word) = words.next() {
            if word == "--list" {
                options.list = true;
                continue;
            }
            ensure!(word != "--help" && word != "-h", "{USAGE}");
            let value = words
                .next()
                .with_context(|| format!("{word} wants a value\n{USAGE}"))?;
            match word.as_str() {
                "--runtime" => {
                    let names = value.split(',').map(|name| {
                        Runtime::from_name(name)
                            .with_context(|| format!("no runtime {name}\n{USAGE}"))
                    });
                    options.runtimes = names.collect::<Result<_>>()?;
                }
                "--filter" => options.filters.push(value),
                "--skip" => options.skips.push(value),
                "--share" => {
                    let share = value.split_once('/').and_then(|(k, n)| {
                        let (k, n) = (k.parse().ok()?, n.parse().ok()?);
                        (1..=n).contains(&k).then_some((k, n))
                    });
                    options.share = share.with_context(|| format!("no share {value}\n{USAGE}"))?;
                }
                "--report" => options.reports.push(value.into()),
                "--one" => options.one = Some(value),
                "--socket" => options.node.socket = value.into(),
                "--root" => options.node.root = value.into(),
                "--state" => options.node.state = value.into(),
                "--work" => options.node.work = value.into(),
                "--probe" => options.probe = value.into(),
                "--busybox" => options.busybox = value.into(),
                "--restart" => options.node.restart = Some(value),
                "--slowness" => options.node.slowness = value.parse()?,
                "--bulk-mib" => options.node.bulk_mib = value.parse()?,
                _ => bail!("no option {word}\n{USAGE}"),
            }
        }
        Ok(options)
    }

    fn chosen(&self) -> Vec<&'static Case> {
        // A whole name means that case alone.
        let is_name = |text: &String| case::all().iter().any(|case| case.name == text);
        let fits = |case: &Case, text: &String| {
            case.name == text || (!is_name(text) && case.name.contains(text))
        };
        let matches = |case: &&Case| {
            (self.filters.is_empty() || self.filters.iter().any(|text| fits(case, text)))
                && !self.skips.iter().any(|text| case.name.contains(text))
        };
        let (first, of) = self.share;
        let chosen = case::all().into_iter().filter(matches);
        chosen.skip(first - 1).step_by(of).collect()
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("husk-e2e: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<ExitCode> {
    let options = Options::parse(std::env::args().skip(1))?;
    if options.list {
        for case in options.chosen() {
            let names: Vec<_> = [Runtime::Husk, Runtime::Runc]
                .into_iter()
                .filter(|r| case.is_for(*r))
                .map(Runtime::name)
                .collect();
            println!("{:<28} {}", case.name, names.join(" "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    if !options.reports.is_empty() {
        let mut compatibility = Compatibility::default();
        for path in &options.reports {
            let log = std::fs::read_to_string(path);
            compatibility.read(&log.with_context(|| format!("read {}", path.display()))?);
        }
        print!("{}", compatibility.page());
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(name) = &options.one {
        let case = case::all()
            .into_iter()
            .find(|case| case.name == name)
            .with_context(|| format!("no case {name}"))?;
        let runtime = *options.runtimes.first().context("no runtime")?;
        return Ok(ExitCode::from(u8::try_from(runner::run_here(
            case,
            &options.node,
            runtime,
        ))?));
    }
    prepare(&options)?;
    let all = runner::run_all(&options.chosen(), &options.runtimes, &options.node)?;
    Ok(if runner::report(&all) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Checks that the node is there and gives it what the cases run.
fn prepare(options: &Options) -> Result<()> {
    let node = &options.node;
    std::fs::create_dir_all(&node.work)?;
    std::fs::copy(&options.probe, node.work.join("probe"))
        .with_context(|| format!("copy {}", options.probe.display()))?;
    let cri = cri::Cri::connect(node.socket.clone(), Duration::from_secs(30) * node.slowness)?;
    let version = cri.version()?;
    let status = cri.status()?;
    image::install_for(node, &options.probe, &options.busybox)?;
    println!(
        "{} {}, {} cases",
        version.runtime_name,
        version.runtime_version,
        options.chosen().len()
    );
    for condition in status
        .status
        .into_iter()
        .flat_map(|status| status.conditions)
    {
        ensure!(
            condition.status,
            "not {}: {} {}",
            condition.r#type,
            condition.reason,
            condition.message
        );
    }
    // The first container makes folders that stay: cgroups, the bridge.
    for runtime in &options.runtimes {
        if let Err(error) = case::WARM_UP.run(node, *runtime) {
            println!("{}: warming up failed: {error:#}", runtime.name());
        }
    }
    if options
        .chosen()
        .iter()
        .any(|case| case.name.starts_with("docker/"))
    {
        docker::warm_up(node, &options.runtimes)?;
    }
    clean::remove_all(node)?;
    template::await_maker(Duration::from_secs(60) * node.slowness)?;
    host::await_rest(node, Duration::from_secs(20) * node.slowness)
}
