//! Who is measured.

use std::time::Duration;

use anyhow::{Result, ensure};
use husk_e2e::ctr::Ctr;
use husk_e2e::drop_in::DropIn;
use husk_e2e::node::{Node, Runtime};
use husk_e2e::{pod_state, template};
use serde_json::Value;

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

    /// What all but a node's first pod are, and what everybody knows.
    pub const USUAL: [Self; 2] = [Self::Runc, Self::Copy];

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

    /// Configures the node for it, as long as what is returned lives.
    pub fn prepare(self) -> Result<Option<DropIn>> {
        let age = match self {
            Self::Runc => return Ok(None),
            Self::Boot => 0,
            Self::Copy => 86_400,
        };
        DropIn::with(&format!("template_max_age_seconds = {age}\n")).map(Some)
    }

    /// Has the node make what is made once: caches, and a template.
    pub fn warm_up(self, node: &Node) -> Result<()> {
        let _prepared = self.prepare()?;
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
        let state = pod_state::of(id)?;
        let copied = state["machine"]["from_template"] == true;
        ensure!(copied == (self == Self::Copy), "{id} began wrong: {state}");
        Ok(state)
    }
}
