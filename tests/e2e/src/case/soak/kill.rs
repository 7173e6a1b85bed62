//! A random party dies at a random moment of a pod's life, again and again. After
//! each: containerd tells the truth, what is there can be removed, the node is as
//! it was before, and another pod has noticed nothing.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::KILL_ROUNDS;
use crate::case::Bench;
use crate::case::crash::{TRUTH, kill_hard, restart_containerd};
use crate::clean::{arguments, pids};
use crate::cri::Cri;
use crate::cri::api::{ContainerState, PodSandboxState};
use crate::host::{self, HostState};
use crate::pod::Pod;
use crate::process::eventually;
use crate::template;

/// Environment variable with what the rounds follow from, to have them again.
const SEED: &str = "HUSK_E2E_SEED";

/// As PID 1's death ends, from a container.
const PANIC: &str = "[ -w /proc/sysrq-trigger ] || exit 99; echo c > /proc/sysrq-trigger";

/// What the container exits with when it is asked to.
const CODE: i32 = 9;

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Party {
    Vmm,
    FileServer,
    Shim,
    Containerd,
    /// By a panic of its kernel: nobody can reach it.
    Agent,
    Container,
}

/// When.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Start,
    Rest,
    Removal,
}

const PARTIES: [Party; 6] = [
    Party::Vmm,
    Party::FileServer,
    Party::Shim,
    Party::Containerd,
    Party::Agent,
    Party::Container,
];

/// What else can be told from its seed (Steele and others: splitmix64).
struct Random(u64);

impl Random {
    fn new() -> Self {
        let said = std::env::var(SEED).ok().and_then(|text| text.parse().ok());
        let now = || {
            let since = std::time::SystemTime::UNIX_EPOCH.elapsed();
            since.unwrap_or_default().as_nanos() as u64
        };
        Self(said.unwrap_or_else(now))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.next() % from.len() as u64) as usize]
    }

    /// Any time up to `most`.
    fn moment(&mut self, most: Duration) -> Duration {
        let micros = most.as_micros().max(1) as u64;
        Duration::from_micros(self.next() % micros)
    }
}

/// Whom and when; a party that is reached through a container has one. containerd
/// only where it can be started again.
fn plan(random: &mut Random, may_restart: bool) -> (Party, Phase) {
    let mut party = random.pick(&PARTIES);
    if party == Party::Containerd && !may_restart {
        party = Party::Shim;
    }
    let phase = match party {
        // What containerd leaves when it dies in the middle of a start is its own.
        Party::Containerd => random.pick(&[Phase::Rest, Phase::Removal]),
        Party::Agent | Party::Container => Phase::Rest,
        Party::Vmm | Party::FileServer | Party::Shim => {
            random.pick(&[Phase::Start, Phase::Rest, Phase::Removal])
        }
    };
    (party, phase)
}

/// A pod that must not notice anything.
struct Bystander<'a> {
    pod: Pod<'a>,
    container: String,
    /// What differs from boot to boot.
    boot: String,
}

impl<'a> Bystander<'a> {
    fn start(bench: &'a Bench, cri: &Cri) -> Result<Self> {
        let pod = Pod::run(bench, cri, |_| {})?;
        let container = pod.start(cri, &["sleep", "1000000"])?;
        let boot = boot_id(cri, &container)?;
        Ok(Self {
            pod,
            container,
            boot,
        })
    }

    fn ensure_unharmed(&self, cri: &Cri) -> Result<()> {
        let boot = boot_id(cri, &self.container).context("the bystander does not answer")?;
        ensure!(boot == self.boot, "the bystander has booted again");
        Ok(())
    }
}

fn boot_id(cri: &Cri, container: &str) -> Result<String> {
    let command = ["cat", "/proc/sys/kernel/random/boot_id"];
    cri.exec_sync(container, &command, 60)?.ok()
}

/// A pod with its container, both running.
struct Life {
    pod: String,
    container: String,
}

/// Only who is privileged can make the guest's kernel panic.
fn live(bench: &Bench, privileged: bool) -> Result<Life> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = privileged;
    })?;
    let script = format!("trap 'exit {CODE}' USR1; while :; do sleep 0.1; done");
    let mut config = pod.container(&["sh", "-c", &script]);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = privileged;
    let container = pod.start_config(&cri, &config)?;
    Ok(Life {
        pod: pod.id,
        container,
    })
}

fn take_away(bench: &Bench, pod: &str) -> Result<()> {
    let cri = bench.cri()?;
    cri.stop_pod(pod)?;
    cri.remove_pod(pod)
}

pub fn rounds(bench: &Bench) -> Result<()> {
    let mut random = Random::new();
    let seed = random.0;
    println!("{SEED}={seed}");
    let wanted = KILL_ROUNDS.wanted();
    let cri = bench.cri()?;
    let bystander = Bystander::start(bench, &cri)?;
    let calm = calm_life(bench)?;
    template::await_maker(bench.seconds(60))?;
    host::await_rest(&bench.node, bench.seconds(20))?;
    let before = HostState::capture(&bench.node);
    drop(cri);
    let mut killed = 0;
    for round in 1..=wanted {
        let (party, phase) = plan(&mut random, bench.node.restart.is_some());
        let most = calm[phase as usize];
        let moment = random.moment(most);
        let what = format!("round {round}: {party:?} at {phase:?} after {moment:?}");
        let bench = bench.sibling();
        let hit = one(&bench, &bystander.pod.id, party, phase, moment);
        println!(
            "{what}: {}",
            if matches!(hit, Ok(true)) {
                "killed"
            } else {
                "missed"
            }
        );
        let what = format!("{SEED}={seed}, {what}");
        let hit = hit.with_context(|| what.clone())?;
        killed += u32::from(hit);
        let cri = answering(&bench).with_context(|| what.clone())?;
        remove_others(&bench, &cri, &bystander.pod.id).with_context(|| what.clone())?;
        if party == Party::Containerd {
            remove_half_removed(&bench.node.state).with_context(|| what.clone())?;
        }
        bystander
            .ensure_unharmed(&cri)
            .with_context(|| what.clone())?;
        template::await_maker(bench.seconds(60)).with_context(|| what.clone())?;
        let same = before.await_same(&bench.node, bench.seconds(10), |_| true);
        same.with_context(|| what.clone())?;
    }
    ensure!(
        killed * 3 >= wanted,
        "only {killed} of {wanted} rounds found their party"
    );
    bystander.pod.remove(&answering(bench)?)
}

/// How long each phase takes when nobody dies; the removal's own pod is the rest.
fn calm_life(bench: &Bench) -> Result<[Duration; 3]> {
    let begun = Instant::now();
    let life = live(bench, false)?;
    let start = begun.elapsed();
    let begun = Instant::now();
    take_away(bench, &life.pod)?;
    Ok([start, start, begun.elapsed()])
}

/// One life and one death; whether there was somebody to kill.
fn one(
    bench: &Bench,
    bystander: &str,
    party: Party,
    phase: Phase,
    moment: Duration,
) -> Result<bool> {
    if phase == Phase::Start {
        return thread::scope(|scope| {
            let life = scope.spawn(|| live(bench, false));
            thread::sleep(moment);
            let hit = kill_when_there(bench, bystander, party, || !life.is_finished())?;
            match life.join() {
                Ok(Ok(life)) if hit => await_truth(bench, party, &life)?,
                Ok(Ok(_)) => {}
                // A start that fails says why, and soon enough.
                Ok(Err(error)) if hit => ensure_refused(&error)?,
                Ok(Err(error)) => return Err(error),
                Err(_) => bail!("a thread panicked"),
            }
            Ok(hit)
        });
    }
    let life = live(bench, party == Party::Agent)?;
    if phase == Phase::Rest {
        thread::sleep(moment);
        let hit = match party {
            Party::Agent => panic_guest(bench, &life)?,
            Party::Container => ask_to_exit(bench, &life)?,
            _ => kill_when_there(bench, bystander, party, || true)?,
        };
        if hit {
            await_truth(bench, party, &life)?;
        }
        return Ok(hit);
    }
    thread::scope(|scope| {
        let removal = scope.spawn(|| take_away(bench, &life.pod));
        thread::sleep(moment);
        let hit = kill_when_there(bench, bystander, party, || !removal.is_finished())?;
        // It may fail, and is tried again.
        match removal.join() {
            Ok(Err(error)) if !hit => Err(error),
            Ok(_) => Ok(hit),
            Err(_) => bail!("a thread panicked"),
        }
    })
}

/// An answer, and not silence.
fn ensure_refused(error: &anyhow::Error) -> Result<()> {
    let text = format!("{error:#}");
    ensure!(
        !text.is_empty() && !text.contains("not answered within"),
        "{text}"
    );
    Ok(())
}

/// Kills it as soon as it is there, as long as it `may` come.
fn kill_when_there(
    bench: &Bench,
    bystander: &str,
    party: Party,
    may: impl Fn() -> bool,
) -> Result<bool> {
    if party == Party::Containerd {
        restart_containerd(bench, &[])?;
        return Ok(true);
    }
    let begun = Instant::now();
    loop {
        let found = of_other_pods(bystander, party);
        if let Some(pid) = found.first() {
            // It may just have ended.
            return Ok(kill_hard(*pid).is_ok());
        }
        if !may() || begun.elapsed() > bench.seconds(10) {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// The processes of a party that are not the bystander's. Who makes a template has
/// a VMM, too, which is no pod's.
fn of_other_pods(bystander: &str, party: Party) -> Vec<i32> {
    let is_other = |pid: &i32| pod_of_shim(*pid).is_some_and(|pod| pod != bystander);
    let shims: Vec<i32> = pids().filter(is_other).collect();
    let program = match party {
        Party::Vmm => "husk-vmm",
        Party::FileServer => "husk-fs",
        _ => return shims,
    };
    let is_own = |pid: &i32| {
        let found = name_and_parent(*pid);
        found.is_some_and(|(name, parent)| name == program && shims.contains(&parent))
    };
    pids().filter(is_own).collect()
}

/// Of a process.
fn name_and_parent(pid: i32) -> Option<(String, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (begin, fields) = stat.rsplit_once(") ")?;
    let (_, name) = begin.split_once(" (")?;
    let parent = fields.split(' ').nth(1)?.parse().ok()?;
    Some((name.to_owned(), parent))
}

/// The pod whose shim a process is, if it is Husk's, and serves.
fn pod_of_shim(pid: i32) -> Option<String> {
    let words = arguments(pid);
    let program = Path::new(words.first()?).file_name()?;
    let acts = words.iter().any(|word| word == "start" || word == "delete");
    if program != "containerd-shim-husk-v2" || acts {
        return None;
    }
    let pair = words.windows(2).find(|pair| pair[0] == "-id")?;
    Some(pair[1].clone())
}

/// False: its kernel has no way to.
fn panic_guest(bench: &Bench, life: &Life) -> Result<bool> {
    let command = ["sh", "-c", PANIC];
    let done = bench.cri()?.exec_sync(&life.container, &command, 60);
    Ok(!done.is_ok_and(|done| done.code == 99))
}

/// Its exit code shows that it was; who asks may end with it.
fn ask_to_exit(bench: &Bench, life: &Life) -> Result<bool> {
    let command = ["kill", "-USR1", "1"];
    let _ = bench.cri()?.exec_sync(&life.container, &command, 60);
    Ok(true)
}

/// What containerd says of the pod and its container becomes what is so.
fn await_truth(bench: &Bench, party: Party, life: &Life) -> Result<()> {
    let cri = answering(bench)?;
    let running = ContainerState::ContainerRunning;
    let ready = PodSandboxState::SandboxReady;
    let begun = Instant::now();
    loop {
        let container = cri.container_status(&life.container)?;
        let pod = cri.pod_status(&life.pod)?.state();
        let is_so = match party {
            // It is none of theirs.
            Party::Containerd => container.state() == running && pod == ready,
            Party::Container => {
                container.state() == ContainerState::ContainerExited
                    && container.exit_code == CODE
                    && pod == ready
            }
            _ => container.state() != running && pod != ready,
        };
        if is_so {
            break;
        }
        ensure!(
            begun.elapsed() < TRUTH * bench.node.slowness,
            "containerd says {:?} with {} of the container and {pod:?} of the pod",
            container.state(),
            container.exit_code
        );
        thread::sleep(Duration::from_millis(50));
    }
    if party == Party::Containerd {
        cri.exec_sync(&life.container, &["true"], 60)?.ok()?;
    }
    Ok(())
}

/// Removes the bundles that containerd was about to remove when it died: it gives them
/// a name with a dot first, and takes no such name for a bundle when it comes back.
fn remove_half_removed(state: &Path) -> Result<()> {
    let bundles = state.join("io.containerd.runtime.v2.task/k8s.io");
    for bundle in fs::read_dir(&bundles)?.flatten() {
        if bundle.file_name().as_encoded_bytes().starts_with(b".") {
            fs::remove_dir_all(bundle.path())?;
        }
    }
    Ok(())
}

/// A connection to a containerd that has come back.
fn answering(bench: &Bench) -> Result<Cri> {
    eventually("the CRI answers", bench.seconds(20), || {
        let cri = bench.cri().ok();
        Ok(cri.filter(|cri| cri.pods(&[]).is_ok()))
    })
}

/// Removes every pod but the bystander, as often as the kubelet would try.
fn remove_others(bench: &Bench, cri: &Cri, bystander: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        let mut pods = cri.pods(&[])?;
        pods.retain(|pod| pod.id != bystander);
        if pods.is_empty() {
            return Ok(());
        }
        let mut last = None;
        for pod in &pods {
            let removed = cri.stop_pod(&pod.id).and_then(|()| cri.remove_pod(&pod.id));
            last = removed.err().or(last);
        }
        match last {
            Some(error) if begun.elapsed() > bench.seconds(20) => {
                return Err(error.context("a pod cannot be removed"));
            }
            _ => thread::sleep(Duration::from_millis(100)),
        }
    }
}
