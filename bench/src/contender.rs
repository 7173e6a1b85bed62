//! Who is measured.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_e2e::ctr::Ctr;
use husk_e2e::node::{NAMESPACE, Node, Runtime};
use husk_e2e::template;
use serde_json::Value;

const DROP_INS: &str = "/etc/husk/conf.d";
const DROP_IN: &str = "/etc/husk/conf.d/90-bench.toml";

/// A way to start a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// Husk, whose machine boots.
    Boot,
    /// Husk, whose machine is a copy of one that has booted.
    Copy,
    /// runc.
    Runc,
}

impl Contender {
    /// Everyone, in the order of a round.
    pub const ALL: [Self; 3] = [Self::Boot, Self::Runc, Self::Copy];

    /// As the tables name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Boot => "husk, boot",
            Self::Copy => "husk, copy",
            Self::Runc => "runc",
        }
    }

    /// For names of containers.
    pub fn word(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Copy => "copy",
            Self::Runc => "runc",
        }
    }

    /// containerd's runtime.
    pub fn runtime(self) -> Runtime {
        match self {
            Self::Boot | Self::Copy => Runtime::Husk,
            Self::Runc => Runtime::Runc,
        }
    }

    /// Configures the node for it.
    pub fn prepare(self) -> Result<()> {
        let age = match self {
            Self::Runc => return Ok(()),
            Self::Boot => 0,
            Self::Copy => 86_400,
        };
        fs::create_dir_all(DROP_INS)?;
        fs::write(DROP_IN, format!("template_max_age_seconds = {age}\n"))
            .with_context(|| format!("write {DROP_IN}"))
    }

    /// Has the node make what is made once: caches, and a template.
    pub fn warm_up(self, node: &Node) -> Result<()> {
        self.prepare()?;
        let ctr = Ctr::new(node, self.runtime());
        let id = format!("warm-{}", self.word());
        ctr.run(&[], &id, &["uname"])?.ok()?;
        if self == Self::Copy {
            template::await_maker(Duration::from_secs(60) * node.slowness)?;
        }
        Ok(())
    }

    /// Checks that a container of it really began as it should, from the shim's
    /// record, which is returned.
    pub fn record(self, id: &str) -> Result<Value> {
        let file = format!("/run/husk/{NAMESPACE}/{id}/state.json");
        let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        let state: Value = serde_json::from_str(&text)?;
        let copied = state["machine"]["from_template"] == true;
        ensure!(copied == (self == Self::Copy), "{id} began wrong: {state}");
        Ok(state)
    }
}

/// Takes back what `prepare` did.
pub fn restore_node() {
    // Neither has to be there.
    let _ = fs::remove_file(DROP_IN);
    let _ = fs::remove_dir(DROP_INS);
}
