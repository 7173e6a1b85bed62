//! `husk-bench`: what starts, files, networks and many pods cost with Husk, runc and
//! QEMU microvm, in one run and alternating, on a node with containerd. Runs as root;
//! writes `results.json` and `table.md`, of starts `starts.svg` as well.

mod contender;
mod io;
mod many;
mod measure;
mod plot;
mod promises;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use husk_e2e::node::Node;

use contender::Contender;
use measure::{Measured, Setup};

const USAGE: &str = "\
usage: husk-bench check RESULTS PROMISES
       husk-bench [io|many] [--rounds N] [--slowness N] [--out DIR] [--busybox FILE]
                  [--qemu FILE --qemu-initramfs FILE] [--method TEXT]
  check                  compares results.json with promises.toml
  io                     files, disks and networks of a container that runs
  many                   many starts at once, and many pods that do nothing
  --rounds N             measured rounds after one that warms up (5)
  --slowness N           how much longer to wait than on hardware (1)
  --out DIR              where results go (.)
  --qemu FILE            a QEMU to compare with; an initramfs that says
  --qemu-initramfs FILE    \"guest up\" for it
  --method TEXT          how time was counted, for the table";

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
    let mut setup = Setup {
        node: Node::local(),
        qemu: None,
        rounds: 5,
    };
    setup.node.work = "/var/tmp/husk-bench".into();
    let (mut out, mut busybox) = (PathBuf::from("."), PathBuf::from("/bin/busybox"));
    let (mut qemu, mut initramfs) = (None, None);
    let mut method = "wall clock".to_owned();
    let mut words = std::env::args().skip(1).peekable();
    if words.next_if(|word| word == "check").is_some() {
        let (Some(results), Some(promises), None) = (words.next(), words.next(), words.next())
        else {
            bail!("{USAGE}");
        };
        return promises::check(results.as_ref(), promises.as_ref());
    }
    let subject = words.next_if(|word| ["io", "many"].contains(&word.as_str()));
    while let Some(word) = words.next() {
        let value = words
            .next()
            .with_context(|| format!("{word} wants a value\n{USAGE}"))?;
        match word.as_str() {
            "--rounds" => setup.rounds = value.parse()?,
            "--slowness" => setup.node.slowness = value.parse()?,
            "--out" => out = value.into(),
            "--busybox" => busybox = value.into(),
            "--qemu" => qemu = Some(PathBuf::from(value)),
            "--qemu-initramfs" => initramfs = Some(PathBuf::from(value)),
            "--method" => method = value,
            _ => bail!("no option {word}\n{USAGE}"),
        }
    }
    setup.qemu = qemu.zip(initramfs);
    std::fs::create_dir_all(&out)?;
    std::fs::create_dir_all(&setup.node.work)?;
    let probe = std::env::current_exe()?.with_file_name("husk-probe");
    husk_e2e::image::install_for(&setup.node, &probe, &busybox)?;

    let all = match subject.as_deref() {
        None => measure_all(&setup)?,
        Some("io") => io::measure(&setup.node)?,
        Some(_) => many::measure(&setup.node)?,
    };
    std::fs::write(
        out.join("results.json"),
        serde_json::to_vec_pretty(&table::as_json(&all, &method))?,
    )?;
    let text = table::as_text(&all, &method);
    std::fs::write(out.join("table.md"), &text)?;
    print!("{text}");
    match subject {
        None => plot::starts(&all, &out.join("starts.svg")),
        Some(_) => Ok(()),
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
