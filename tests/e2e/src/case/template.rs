//! Pods that begin as copies of a machine that has booted.

use std::collections::BTreeSet;
use std::fs;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};

use super::{Bench, Case, husk_case};
use crate::drop_in::DropIn;
use crate::pod::Pod;
use crate::pod_state::is_copy;
use crate::process::eventually;
use crate::template;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    husk_case("template/containers", 120, containers),
    husk_case("template/pod", 120, pod),
    husk_case("template/identities", 300, identities),
];

/// Not the node's own, which there may be.
const TEMPLATES: &str = "/run/husk-e2e-templates";

/// What a copy must not have from its template or share with another copy.
const IDENTITY: &str = "head -c 16 /dev/urandom | od -An -v -tx1; \
     cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid";

/// Templates, for the time of a case.
struct Templates<'a> {
    bench: &'a Bench,
    on: Option<DropIn>,
}

impl<'a> Templates<'a> {
    /// Turns them on, and waits until there is one.
    fn ready(bench: &'a Bench) -> Result<Self> {
        let settings = format!("template_max_age_seconds = 3600\ntemplate_dir = \"{TEMPLATES}\"\n");
        let on = Some(DropIn::with(&settings)?);
        let this = Self { bench, on };
        let id = bench.id();
        bench.ctr.run_detached(&[], &id, &["sleep", "1000"])?.ok()?;
        ensure!(!is_copy(&id)?, "there was a template before");
        bench.ctr.remove(&id)?;
        let limit = bench.seconds(60);
        eventually("a template", limit, || Ok(this.is_there().then_some(())))?;
        Ok(this)
    }

    fn is_there(&self) -> bool {
        let is_key = |name: &str| name.len() == 32 && !name.contains('.');
        let entries = fs::read_dir(TEMPLATES).into_iter().flatten().flatten();
        let mut names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.any(|name| is_key(&name)) && !template::is_being_made()
    }
}

impl Drop for Templates<'_> {
    fn drop(&mut self) {
        self.on = None;
        let _ = template::await_maker(self.bench.seconds(30));
        let _ = fs::remove_dir_all(TEMPLATES);
    }
}

fn containers(bench: &Bench) -> Result<()> {
    let templates = Templates::ready(bench)?;
    let mut seen = BTreeSet::new();
    for _ in 0..4 {
        let id = bench.id();
        let first = "grep MemTotal /proc/meminfo > /memory; sleep 1000";
        bench
            .ctr
            .run_detached(&[], &id, &["sh", "-c", first])?
            .ok()?;
        ensure!(is_copy(&id)?, "{id} has booted");
        let told = |exec: &str, script: &str| -> Result<String> {
            let command = ["sh", "-c", script];
            Ok(bench.ctr.exec(&[], &id, exec, &command)?.ok()?.out())
        };
        for word in told("identity", IDENTITY)?.lines() {
            ensure!(seen.insert(word.to_owned()), "{word} was there before");
        }
        let seconds: u64 = told("date", "date +%s")?.trim().parse()?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let late = now.as_secs().abs_diff(seconds);
        ensure!(late <= bench.seconds(3).as_secs(), "{late} s late");
        // Its first program had what it has on a machine that boots.
        let memory = eventually("its memory", bench.seconds(10), || {
            let memory = told("memory", "cat /memory || true")?;
            Ok(memory.ends_with("kB\n").then_some(memory))
        })?;
        let kib: u64 = memory.split_whitespace().nth(1).unwrap_or("0").parse()?;
        ensure!(kib > 450 << 10, "{memory}");
        bench.ctr.remove(&id)?;
    }
    ensure!(seen.len() == 4 * 3, "{seen:?}");
    drop(templates);
    Ok(())
}

/// Copies that are compared.
const COPIES: usize = 50;

/// Two clocks of a copy are read within this much of each other, counts of 64 ns.
const SKEW: u32 = 1 << 18;

/// Nothing random is the same in two copies, wherever a program gets it from.
fn identities(bench: &Bench) -> Result<()> {
    let _templates = Templates::ready(bench)?;
    let (mut seen, mut sequences) = (BTreeSet::new(), Vec::new());
    for _ in 0..COPIES {
        let id = bench.id();
        // Its first program asks.
        let first = "probe identity > /asked && mv /asked /told; exec sleep 1000";
        let command = ["sh", "-c", first];
        bench
            .ctr
            .run_detached(&["--privileged"], &id, &command)?
            .ok()?;
        ensure!(is_copy(&id)?, "{id} has booted");
        let told = eventually("what it asked for", bench.seconds(10), || {
            let told = ["sh", "-c", "cat /told || true"];
            let told = bench.ctr.exec(&[], &id, "told", &told)?.ok()?.out();
            Ok((!told.is_empty()).then_some(told))
        })?;
        bench.ctr.remove(&id)?;
        for line in told.lines() {
            let (name, value) = line.split_once(' ').context("no value")?;
            if name != "sequence" {
                ensure!(
                    seen.insert(value.to_owned()),
                    "{name} {value} was there before"
                );
                continue;
            }
            let numbers: Vec<u32> = value.split(' ').map(str::parse).collect::<Result<_, _>>()?;
            ensure!(numbers.len() == 2, "{line}");
            sequences.push(numbers);
        }
    }
    ensure!(
        seen.len() == COPIES * 5 && sequences.len() == COPIES,
        "{seen:?}"
    );
    let is_near = |one: u32, other: u32| one.wrapping_sub(other).wrapping_add(SKEW) < 2 * SKEW;
    for (index, one) in sequences.iter().enumerate() {
        let same = sequences[..index].iter().find(|other| {
            let mut pairs = one.iter().zip(other.iter());
            pairs.all(|(one, other)| is_near(*one, *other))
        });
        ensure!(same.is_none(), "sequence numbers {one:?} and {same:?}");
    }
    Ok(())
}

/// Network, shared localhost, names and volumes come to it as to one that boots.
fn pod(bench: &Bench) -> Result<()> {
    let _templates = Templates::ready(bench)?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    ensure!(is_copy(&pod.id)?, "{} has booted", pod.id);
    let network = cri.pod_status(&pod.id)?.network.context("no network")?;
    let folder = bench.folder().join("volume");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("file"), "of the node")?;
    let mut config = pod.container(&["sh", "-c", "nc -l -p 80 -e cat /volume/file & sleep 1000"]);
    config.mounts.push(crate::cri::api::Mount {
        container_path: "/volume".into(),
        host_path: folder.display().to_string(),
        ..Default::default()
    });
    let server = pod.start_config(&cri, &config)?;
    let client = pod.start(&cri, &["sleep", "1000"])?;
    let script = "ip address; hostname; ping -c 1 -w 10 10.88.0.1; sleep 1; nc 127.0.0.1 80";
    let told = cri.exec_sync(&client, &["sh", "-c", script], 60)?.ok()?;
    for wanted in [&*format!(" {}/", network.ip), "a-pod", "of the node"] {
        ensure!(told.contains(wanted), "{wanted:?} is not in\n{told}");
    }
    let written = "dd if=/dev/zero of=/volume/large bs=1M count=8 && md5sum /volume/large";
    let told = cri.exec_sync(&server, &["sh", "-c", written], 60)?.ok()?;
    ensure!(told.contains("96995b58d4cbf6aaa9041b4f00c7f6ae"), "{told}");
    ensure!(fs::metadata(folder.join("large"))?.len() == 8 << 20);
    pod.remove(&cri)
}
