//! The cases, by theme. A case is a function that returns an error when what
//! it saw is not what it must see.

pub mod abuse;
pub mod churn;
pub mod cli;
pub mod crash;
pub mod device;
pub mod docker;
pub mod huge_pages;
pub mod interfaces;
pub mod lifecycle;
pub mod limits;
pub mod machine;
pub mod network;
pub mod pod;
pub mod pod_network;
pub mod resources;
pub mod run;
pub mod sandboxer;
pub mod scarce;
pub mod security;
pub mod snapshotter;
pub mod soak;
pub mod stdio;
pub mod storage;
pub mod streaming;
pub mod task;
pub mod template;
pub mod user_namespace;
pub mod vfio;
pub mod volume;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Result;

use crate::cri::Cri;
use crate::ctr::Ctr;
use crate::node::{Node, Runtime};
use soak::Rounds;

/// How a case ended.
pub enum Verdict {
    /// It saw what it must; with what it printed.
    Passed(String),
    /// It did not; with what it saw.
    Failed(String),
    /// It can't run here; with the reason.
    Skipped(String),
}

/// The error of a case that can't run here.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// One case.
pub struct Case {
    /// Theme and name.
    pub name: &'static str,
    /// How long it may take on hardware.
    pub deadline: Duration,
    /// Parts of the names of what may be left though not by the runtime under test.
    pub forgiven: &'static [&'static str],
    /// The same for runc alone: what it leaves is not ours to mend.
    pub forgiven_of_runc: &'static [&'static str],
    /// It does something again and again.
    rounds: Option<Rounds>,
    runtimes: Runtimes,
    body: fn(&Bench) -> Result<()>,
}

enum Runtimes {
    Both,
    HuskOnly,
}

/// A case that must hold for every runtime.
pub const fn case(name: &'static str, seconds: u64, body: fn(&Bench) -> Result<()>) -> Case {
    Case {
        forgiven: &[],
        forgiven_of_runc: &[],
        name,
        deadline: Duration::from_secs(seconds),
        rounds: None,
        runtimes: Runtimes::Both,
        body,
    }
}

/// A case about something that only a VM has.
pub const fn husk_case(name: &'static str, seconds: u64, body: fn(&Bench) -> Result<()>) -> Case {
    Case {
        forgiven: &[],
        forgiven_of_runc: &[],
        name,
        deadline: Duration::from_secs(seconds),
        rounds: None,
        runtimes: Runtimes::HuskOnly,
        body,
    }
}

impl Case {
    /// The same case, in rounds, for whose usual number its deadline is.
    pub const fn repeated(mut self, rounds: Rounds) -> Self {
        self.rounds = Some(rounds);
        self
    }

    /// How long it may take on hardware, with the rounds that are wanted.
    pub fn time_limit(&self) -> Duration {
        match self.rounds {
            Some(rounds) => self.deadline * rounds.wanted() / rounds.usual,
            None => self.deadline,
        }
    }

    /// The same case, after which these may be left.
    pub const fn forgiving(
        mut self,
        left: &'static [&'static str],
        by_runc: &'static [&'static str],
    ) -> Self {
        self.forgiven = left;
        self.forgiven_of_runc = by_runc;
        self
    }

    /// Whether a difference that it left counts.
    pub fn counts(&self, runtime: Runtime, difference: &str) -> bool {
        let of_runc = if runtime == Runtime::Runc {
            self.forgiven_of_runc
        } else {
            &[]
        };
        !self
            .forgiven
            .iter()
            .chain(of_runc)
            .any(|part| difference.contains(part))
    }

    /// Whether it is meant for `runtime`.
    pub fn is_for(&self, runtime: Runtime) -> bool {
        matches!(
            (&self.runtimes, runtime),
            (Runtimes::Both, _) | (_, Runtime::Husk)
        )
    }

    /// Runs it.
    pub fn run(&self, node: &Node, runtime: Runtime) -> Result<()> {
        let bench = Bench {
            name: self.name.replace('/', "-"),
            ctr: Ctr::new(node, runtime),
            node: node.clone(),
            runtime,
            used: AtomicU32::new(0),
        };
        std::fs::create_dir_all(bench.folder())?;
        let done = (self.body)(&bench);
        std::fs::remove_dir_all(bench.folder())?;
        done
    }
}

/// What a case works with.
pub struct Bench {
    /// The node.
    pub node: Node,
    /// The runtime that it tries.
    pub runtime: Runtime,
    /// `ctr` with that runtime.
    pub ctr: Ctr,
    name: String,
    used: AtomicU32,
}

impl Bench {
    /// A name for a container or pod that nobody else uses.
    pub fn id(&self) -> String {
        let number = self.used.fetch_add(1, Ordering::Relaxed) + 1;
        let name = self.name.rsplit('/').next().unwrap_or_default();
        format!("{name}-{}-{}", self.runtime.name(), number)
    }

    /// A folder of the case's own; it exists until the case ends.
    pub fn folder(&self) -> PathBuf {
        self.node.work.join(&self.name)
    }

    /// The same case's bench for another thread; its names differ.
    pub fn sibling(&self) -> Self {
        let name = self.id();
        Self {
            node: self.node.clone(),
            runtime: self.runtime,
            ctr: self.ctr.clone(),
            name: format!("{}/{name}", self.name),
            used: AtomicU32::new(0),
        }
    }

    /// A connection to the CRI.
    pub fn cri(&self) -> Result<Cri> {
        Cri::connect(self.node.socket.clone(), self.seconds(30))
    }

    /// A time to wait at most, for things without a promised time.
    pub fn seconds(&self, seconds: u64) -> Duration {
        Duration::from_secs(seconds) * self.node.slowness
    }
}

/// One container and one pod, before the cases.
pub const WARM_UP: Case = case("warm-up", 60, |bench| {
    bench.ctr.run(&[], &bench.id(), &["true"])?.ok()?;
    pod::life_cycle(bench)
});

/// Every case, in the order in which they run.
pub fn all() -> Vec<&'static Case> {
    [
        run::CASES,
        snapshotter::CASES,
        stdio::CASES,
        storage::CASES,
        volume::CASES,
        device::CASES,
        vfio::CASES,
        task::CASES,
        pod::CASES,
        sandboxer::CASES,
        resources::CASES,
        huge_pages::CASES,
        limits::CASES,
        machine::CASES,
        network::CASES,
        interfaces::CASES,
        pod_network::CASES,
        streaming::CASES,
        lifecycle::CASES,
        lifecycle::streams::CASES,
        lifecycle::many::CASES,
        security::CASES,
        user_namespace::CASES,
        docker::CASES,
        docker::compose::CASES,
        template::CASES,
        abuse::CASES,
        scarce::CASES,
        churn::CASES,
        cli::CASES,
        cli::guest::CASES,
        cli::bench::CASES,
        cli::traces::CASES,
        crash::CASES,
        soak::CASES,
    ]
    .into_iter()
    .flatten()
    .collect()
}
