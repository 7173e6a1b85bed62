//! Long rounds: parties killed at random moments of pods' lives, and many pods one
//! after another. `make soak` runs more of them.

use super::{Case, husk_case};

mod kill;
mod pods;

/// The cases of this theme. Their time is for the rounds that they have by
/// themselves.
pub const CASES: &[Case] = &[
    husk_case("soak/kill-rounds", 360, kill::rounds).repeated(KILL_ROUNDS),
    husk_case("soak/pods", 120, pods::one_after_another).repeated(PODS),
];

/// Rounds of killing somebody.
const KILL_ROUNDS: Rounds = Rounds {
    variable: "HUSK_E2E_ROUNDS",
    usual: 6,
};

/// Pods one after another.
const PODS: Rounds = Rounds {
    variable: "HUSK_E2E_PODS",
    usual: 10,
};

/// How often a case does what it does, which the environment may say.
#[derive(Clone, Copy)]
pub struct Rounds {
    /// The environment's variable.
    pub variable: &'static str,
    /// Without it.
    pub usual: u32,
}

impl Rounds {
    /// As often as wanted.
    pub fn wanted(self) -> u32 {
        let said = std::env::var(self.variable).ok();
        let number = said.and_then(|text| text.parse().ok());
        number.unwrap_or(self.usual).max(1)
    }
}
