//! A guest that was saved while it waited for its first request.

use std::time::Instant;

use husk_protocol::agent::CreateSandboxRequest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use crate::agent::{Agent, context, skip, unable, within};

/// A request of no service: header alone, stream 1.
const REQUEST: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 1, 1, 0];

/// Breaks the agent's connection: with some of an answer unread, the kernel resets
/// it.
async fn break_connection(listener: &UnixListener) {
    let (mut stream, _) = within("agent to dial", listener.accept()).await.unwrap();
    stream.write_all(&REQUEST).await.unwrap();
    within("an answer", stream.read_u8()).await.unwrap();
}

#[tokio::test]
async fn an_agent_whose_connection_breaks_before_its_first_request_dials_again() {
    if let Some(reason) = unable() {
        return skip("restored", &reason);
    }
    let agent = Agent::start_after("true", async |listener| {
        for _ in 0..3 {
            break_connection(listener).await;
        }
    })
    .await;
    let request = CreateSandboxRequest {
        hostname: "pod".to_owned(),
        ..Default::default()
    };
    agent
        .client
        .create_sandbox(context(), &request)
        .await
        .unwrap();
    assert_eq!(agent.wait_for_calm().await.exit_code, 0);
}

#[tokio::test]
async fn a_program_waits_for_memory_that_is_yet_to_come() {
    if let Some(reason) = unable() {
        return skip("restored", &reason);
    }
    let agent = Agent::start_with("true").await;
    let request = CreateSandboxRequest {
        // It never comes.
        plugged_mib: u32::MAX,
        ..Default::default()
    };
    let created = agent.client.create_sandbox(context(), &request).await;
    created.unwrap();
    for (id, least) in [("a", 5), ("b", 0)] {
        agent.create(id, &agent.spec(&["/bin/true"])).await.unwrap();
        let began = Instant::now();
        agent.start_container(id).await.unwrap();
        let waited = began.elapsed().as_secs();
        assert!((least..least + 5).contains(&waited), "{id}: {waited} s");
        assert_eq!(agent.wait(id, "").await.exit_code, 0);
        agent.delete(id).await;
    }
}
