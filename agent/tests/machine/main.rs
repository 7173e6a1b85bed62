//! The agent on this machine, in fresh namespaces: needs root, a cgroup v2
//! mount and busybox-static, and says so where they are missing.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod agent;
mod given_up;
mod guest;
mod hung;
mod isolation;
mod lifecycle;
mod limits;
mod names;
mod network;
mod restored;
mod shell;
mod storage;
mod streams;
mod users;

/// Runs a test with an agent, or says why it can't.
macro_rules! agent_test {
    ($(#[$attribute:meta])* async fn $name:ident($agent:ident: Agent) $body:block) => {
        $(#[$attribute])*
        #[tokio::test]
        async fn $name() {
            if let Some(reason) = crate::agent::unable() {
                crate::agent::skip(stringify!($name), &reason);
                return;
            }
            let $agent = crate::agent::Agent::start().await;
            $body
        }
    };
}
pub(crate) use agent_test;
