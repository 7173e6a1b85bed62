//! `husk-bench`: what starts, files, networks and many pods cost with Husk, runc and
//! QEMU microvm, in one run and alternating, on a node with containerd. Runs as root;
//! writes `results.json` and `table.md`, of starts `starts.svg` as well.

mod contender;
mod io;
mod many;
mod measure;
mod output;
mod page;
mod plot;
mod promises;
mod results;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use husk_e2e::node::Node;

use contender::Contender;
use measure::{Measured, Setup};
use results::{About, Results};

const USAGE: &str = "\
usage: husk-bench check RESULTS PROMISES
       husk-bench page PAGE RESULTS
       husk-bench [io|many] [--rounds N] [--slowness N] [--out DIR] [--busybox FILE]
                  [--qemu FILE --qemu-initramfs FILE]
                  [--method TEXT] [--date TEXT] [--build TEXT] [--with NAME=VERSION]
  check                  compares results.json with promises.toml
  page                   writes results.json into a page of documentation
  io                     files, disks and networks of a container that runs
  many                   many starts at once, and many pods that do nothing
  --rounds N             measured rounds after one that warms up (5)
  --slowness N           how much longer to wait than on hardware (1)
  --out DIR              where results go (.)
  --qemu FILE            a QEMU to compare with; an initramfs that says
  --qemu-initramfs FILE    \"guest up\" for it
  --method TEXT          how time was counted, --date when, --build what was measured,
  --with NAME=VERSION      and what else had a part in it";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut words = std::env::args().skip(1).peekable();
    let what = words.next_if(|word| ["check", "page"].contains(&word.as_str()));
    if let Some(what) = what {
        let (Some(one), Some(other), None) = (words.next(), words.next(), words.next()) else {
            bail!("{USAGE}");
        };
        return match what.as_str() {
            "check" => promises::check(one.as_ref(), other.as_ref()),
            _ => page::update(one.as_ref(), &Results::read(other.as_ref())?),
        };
    }
    let subject = words.next_if(|word| ["io", "many"].contains(&word.as_str()));
    let asked = Asked::read(subject, words)?;
    let (setup, out) = (&asked.setup, &asked.out);
    std::fs::create_dir_all(out)?;
    std::fs::create_dir_all(&setup.node.work)?;
    let probe = std::env::current_exe()?.with_file_name("husk-probe");
    husk_e2e::image::install_for(&setup.node, &probe, &asked.busybox)?;

    let all = match asked.about.subject.as_str() {
        "io" => io::measure(&setup.node)?,
        "many" => many::measure(&setup.node)?,
        _ => measure_all(setup)?,
    };
    let results = Results::of(&all, asked.about);
    results.write(&out.join("results.json"))?;
    let text = table::as_text(&results);
    std::fs::write(out.join("table.md"), &text)?;
    print!("{text}");
    if results.about.subject == STARTS {
        plot::starts(&results, &out.join("starts.svg"))?;
    }
    Ok(())
}

/// What a run without a subject is about.
const STARTS: &str = "starts";

/// The command line of a run.
struct Asked {
    setup: Setup,
    out: PathBuf,
    busybox: PathBuf,
    about: About,
}

impl Asked {
    fn read(subject: Option<String>, mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut node = Node::local();
        node.work = "/var/tmp/husk-bench".into();
        let mut asked = Self {
            setup: Setup {
                node,
                qemu: None,
                rounds: 5,
            },
            out: ".".into(),
            busybox: "/bin/busybox".into(),
            about: About {
                subject: subject.unwrap_or_else(|| STARTS.into()),
                method: "Wall clock.".into(),
                with: results::versions()?,
                ..About::default()
            },
        };
        let (mut qemu, mut initramfs) = (None, None);
        while let Some(word) = words.next() {
            let value = words
                .next()
                .with_context(|| format!("{word} wants a value\n{USAGE}"))?;
            let about = &mut asked.about;
            match word.as_str() {
                "--rounds" => asked.setup.rounds = value.parse()?,
                "--slowness" => asked.setup.node.slowness = value.parse()?,
                "--out" => asked.out = value.into(),
                "--busybox" => asked.busybox = value.into(),
                "--qemu" => qemu = Some(PathBuf::from(value)),
                "--qemu-initramfs" => initramfs = Some(PathBuf::from(value)),
                "--method" => about.method = value,
                "--date" => about.date = value,
                "--build" => about.build = value,
                "--with" => {
                    let (name, version) = value
                        .split_once('=')
                        .with_context(|| format!("no NAME=VERSION: {value}\n{USAGE}"))?;
                    about.with.insert(name.into(), version.into());
                }
                _ => bail!("no option {word}\n{USAGE}"),
            }
        }
        asked.setup.qemu = qemu.zip(initramfs);
        Ok(asked)
    }
}

fn measure_all(setup: &Setup) -> Result<Vec<Measured>> {
    for contender in Contender::ALL {
        contender.warm_up(&setup.node)?;
    }
    let mut all = Vec::new();
    for round in 1..=setup.rounds {
        all.extend(setup.round(round)?);
    }
    for contender in Contender::ALL {
        let more = setup.one_more(contender)?;
        all.push(more.told());
    }
    all.extend(setup.sizes());
    Ok(all)
}
