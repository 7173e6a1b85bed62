//! Files, disks and networks of a container that runs: fio, iperf3 and many small
//! files, with Husk and runc in turns. The programs are the node's, whose `/usr`
//! containers see.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_e2e::ctr::Ctr;
use husk_e2e::node::Node;
use husk_e2e::process::{self, Finished};
use serde_json::Value;

use crate::contender::Contender;
use crate::measure::Measured;

/// The node's programs and their libraries for the container.
const PROGRAMS: [&str; 6] = [
    "--mount",
    "type=bind,src=/usr,dst=/usr,options=rbind:ro",
    "--mount",
    "type=bind,src=/usr/lib,dst=/lib,options=rbind:ro",
    "--mount",
    "type=bind,src=/usr/lib64,dst=/lib64,options=rbind:ro",
];

/// Where the files are that fio reads and writes: what the table says, flags of
/// `ctr run`, and the file.
const PLACES: [(&str, &[&str], &str); 3] = [
    ("root of an image", &[], "/fio"),
    ("volume", &[], "/volume/fio"),
    (
        "root that is a disk",
        &["--snapshotter", "blockfile"],
        "/fio",
    ),
];

/// What fio does: the table's words, and its options.
const JOBS: [(&str, &[&str]); 4] = [
    ("4 KiB random reads, MiB/s", &["--rw=randread", "--bs=4k"]),
    ("4 KiB random writes, MiB/s", &["--rw=randwrite", "--bs=4k"]),
    ("1 MiB sequential reads, MiB/s", &["--rw=read", "--bs=1M"]),
    ("1 MiB sequential writes, MiB/s", &["--rw=write", "--bs=1M"]),
];

/// Of the file, and read or written in each job, MiB. Files of blockfile's disks
/// have 512 MiB to be in.
const FILE_MIB: u32 = 32;

/// What a job gives its name for: requests to the disk, one by one or 16 at once.
const DIRECT: [&str; 4] = [
    "--direct=1",
    "--ioengine=libaio",
    "--iodepth=16",
    "--invalidate=1",
];

/// How many small files there are, in folders of a hundred.
const SMALL_FILES: usize = 5000;

/// What is done with them: the table's words, and a command.
const SMALL_JOBS: [(&str, &str); 3] = [
    (
        "small files made, thousand/s",
        "for d in $(seq 50); do mkdir $TREE/$d; for f in $(seq 100); do echo $f > $TREE/$d/$f; done; done",
    ),
    (
        "small files found, thousand/s",
        "/usr/bin/find $TREE -type f -size +0 | wc -l",
    ),
    (
        "small files read, thousand/s",
        "/usr/bin/tar -c -f - $TREE | wc -c",
    ),
];

/// Everything once for each contender, in turns.
///
/// # Errors
/// Something does not run, or says nothing that can be read.
pub fn measure(node: &Node) -> Result<Vec<Measured>> {
    let volume = node.work.join("volume");
    fs::create_dir_all(&volume)?;
    for contender in Contender::USUAL {
        contender.warm_up(node)?;
    }
    let mut all = Vec::new();
    for part in [Bench::files, Bench::small_files, Bench::network] {
        for contender in Contender::USUAL {
            let _prepared = contender.prepare()?;
            let bench = Bench {
                ctr: Ctr::new(node, contender.runtime()),
                who: contender.name(),
                word: contender.word(),
                volume: volume.clone(),
                deadline: Duration::from_secs(300) * node.slowness,
            };
            all.extend(part(&bench)?);
        }
    }
    fs::remove_dir_all(&volume)?;
    Ok(all)
}

struct Bench {
    ctr: Ctr,
    who: &'static str,
    word: &'static str,
    volume: PathBuf,
    deadline: Duration,
}

impl Bench {
    /// A container that waits, for as long as `work` takes.
    fn with_container<T>(
        &self,
        name: &str,
        flags: &[&str],
        work: impl FnOnce(&str) -> Result<T>,
    ) -> Result<T> {
        let id = format!("io-{}-{name}", self.word);
        let volume = format!(
            "type=bind,src={},dst=/volume,options=rbind:rw",
            self.volume.display()
        );
        let mut all = PROGRAMS.to_vec();
        all.extend(["--mount", &volume]);
        all.extend(flags);
        self.ctr.run_detached(&all, &id, &["sleep", "100000"])?;
        let done = work(&id);
        self.ctr.remove(&id)?;
        done
    }

    fn exec(&self, id: &str, command: &[&str]) -> Result<Finished> {
        let mut command = self.ctr.exec_command(&[], id, "io", command);
        process::run(&mut command, self.deadline)?.ok()
    }

    fn figure(&self, what: String, value: f64) -> Measured {
        Measured {
            what,
            who: self.who.to_owned(),
            value,
            unit: "",
        }
        .told()
    }

    fn files(&self) -> Result<Vec<Measured>> {
        let mut all = Vec::new();
        for (index, (place, flags, file)) in PLACES.iter().enumerate() {
            self.with_container(&format!("files-{index}"), flags, |id| {
                let size = format!("--size={FILE_MIB}M");
                let file = format!("--filename={file}");
                let common = [
                    "/usr/bin/fio",
                    "--name=io",
                    "--output-format=json",
                    "--randrepeat=1",
                    &size,
                    &file,
                ];
                let run = |options: &[&str]| self.exec(id, &[&common, options].concat());
                // The file is there before it is measured.
                run(&["--rw=write", "--bs=1M", "--end_fsync=1"])?;
                for (job, options) in JOBS {
                    let said = run(&[&DIRECT[..], options].concat())?.out();
                    let what = format!("{place}: {job}");
                    all.push(self.figure(what, fio_rate(&said)?));
                }
                Ok(())
            })?;
        }
        Ok(all)
    }

    fn small_files(&self) -> Result<Vec<Measured>> {
        let mut all = Vec::new();
        for (place, tree) in [("root of an image", "/tree"), ("volume", "/volume/tree")] {
            let name = format!("small-{}", &place[..4]);
            self.with_container(&name, &[], |id| {
                self.exec(id, &["mkdir", tree])?;
                for (job, script) in SMALL_JOBS {
                    let script = script.replace("$TREE", tree);
                    let script =
                        format!("b=$(/usr/bin/date +%s%N); {script} >&2; e=$(/usr/bin/date +%s%N); echo $((e - b))");
                    let said = self.exec(id, &["/usr/bin/bash", "-c", &script])?.out();
                    let ns: f64 = said.trim().parse().with_context(|| said.clone())?;
                    let what = format!("{place}: {job}");
                    all.push(self.figure(what, SMALL_FILES as f64 * 1e6 / ns));
                }
                self.exec(id, &["rm", "-r", tree])?;
                Ok(())
            })?;
        }
        Ok(all)
    }

    /// Between the node and a container of its bridge.
    fn network(&self) -> Result<Vec<Measured>> {
        self.with_container("network", &["--cni"], |id| {
            let address = self.exec(id, &["/usr/bin/hostname", "-I"])?.out();
            let address = address.split_whitespace().next().context("no address")?;
            self.exec(id, &["/usr/bin/iperf3", "--server", "--daemon"])?;
            let mut all = Vec::new();
            for (what, flag) in [
                ("network: TCP into the container, Gbit/s", "--no-delay"),
                ("network: TCP out of the container, Gbit/s", "--reverse"),
            ] {
                let mut client = Command::new("iperf3");
                client.args(["--client", address, "--json", "--bytes", "256M", flag]);
                let said = process::run(&mut client, self.deadline)?.ok()?.out();
                all.push(self.figure(what.into(), iperf_rate(&said)?));
            }
            let mut ping = Command::new("ping");
            ping.args(["-q", "-c", "200", "-i", "0.002", address]);
            let said = process::run(&mut ping, self.deadline)?.ok()?.out();
            all.push(self.figure("network: echo of a packet, µs".into(), ping_us(&said)?));
            Ok(all)
        })
    }
}

/// MiB a second of the one job that fio's JSON tells of, reads and writes together.
fn fio_rate(said: &str) -> Result<f64> {
    // It warns before.
    let json = said.find('{').and_then(|at| said.get(at..));
    let told: Value = serde_json::from_str(json.unwrap_or_default()).context(said.to_owned())?;
    let job = &told["jobs"][0];
    let rate = |way: &str| job[way]["bw_bytes"].as_f64().unwrap_or_default();
    let rate = rate("read") + rate("write");
    ensure!(rate > 0.0, "fio says nothing of its rate: {said}");
    Ok(rate / f64::from(1 << 20))
}

/// Gbit a second at the receiver, as iperf3's JSON tells.
fn iperf_rate(said: &str) -> Result<f64> {
    let told: Value = serde_json::from_str(said).context(said.to_owned())?;
    let rate = told["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(rate.with_context(|| said.to_owned())? / 1e9)
}

/// The mean of what ping says.
fn ping_us(said: &str) -> Result<f64> {
    let line = said.lines().find_map(|line| line.split_once(" = "));
    let mean = line.and_then(|(_, numbers)| numbers.split('/').nth(1));
    let mean: f64 = mean.with_context(|| said.to_owned())?.parse()?;
    Ok(mean * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_from_what_the_programs_say() {
        let fio = r#"note: both iodepth
            {"jobs": [{"read": {"bw_bytes": 2097152}, "write": {"bw_bytes": 1048576}}]}"#;
        assert_eq!(fio_rate(fio).expect("a rate"), 3.0);
        let iperf = r#"{"end": {"sum_received": {"bits_per_second": 2.5e9}}}"#;
        assert_eq!(iperf_rate(iperf).expect("a rate"), 2.5);
        let ping = "200 packets\nrtt min/avg/max/mdev = 0.020/0.125/0.3/0.01 ms\n";
        assert_eq!(ping_us(ping).expect("a time"), 125.0);
    }

    #[test]
    fn programs_that_say_nothing_are_errors() {
        assert!(fio_rate("fio: no").is_err());
        assert!(fio_rate(r#"{"jobs": []}"#).is_err());
        assert!(iperf_rate("{}").is_err());
        assert!(ping_us("no answer").is_err());
    }
}
