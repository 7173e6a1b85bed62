//! Programs beside all containers.

use std::time::Duration;

use husk_protocol::agent::{ResizeShellRequest, RunShellRequest, ShellClient, ShellRequest};
use husk_protocol::limit;
use tokio::io::AsyncWriteExt;
use ttrpc::Code;

use crate::agent::{Agent, Streaming, context, read_all, skip, status, unable, within};

/// An agent whose shim may ask for shells.
async fn agent() -> Agent {
    let agent = Agent::start_allowing_shells().await;
    agent
        .client
        .create_sandbox(context(), &Default::default())
        .await
        .unwrap();
    agent
}

fn shell(id: &str) -> ShellRequest {
    ShellRequest {
        shell_id: id.to_owned(),
        ..Default::default()
    }
}

async fn run(
    agent: &Agent,
    id: &str,
    args: &[&str],
    terminal: bool,
) -> Result<Streaming, ttrpc::Error> {
    let (ports, listeners) = agent.streams(terminal);
    let request = RunShellRequest {
        shell_id: id.to_owned(),
        args: args.iter().map(|&word| word.to_owned()).collect(),
        streams: Some(ports).into(),
        terminal,
        terminal_kind: "vt100".to_owned(),
        width: 100,
        height: 40,
        ..Default::default()
    };
    agent.shells.run_shell(context(), &request).await?;
    Ok(listeners.accept().await)
}

async fn wait(shells: &ShellClient, id: &str) -> (u32, u64) {
    let ended = within("shell to end", shells.wait_shell(context(), &shell(id))).await;
    let ended = ended.unwrap();
    (ended.exit_code, ended.stdout_bytes)
}

/// Runs a test as root, or says why it can't.
macro_rules! shell_test {
    (async fn $name:ident($agent:ident) $body:block) => {
        #[tokio::test]
        async fn $name() {
            if let Some(reason) = unable() {
                return skip(stringify!($name), &reason);
            }
            let $agent = agent().await;
            $body
        }
    };
}

#[tokio::test]
async fn nothing_serves_shells_that_are_not_allowed() {
    if let Some(reason) = unable() {
        return skip("nothing_serves_shells_that_are_not_allowed", &reason);
    }
    let agent = Agent::start().await;
    let refused = agent.shells.run_shell(context(), &Default::default()).await;
    let (_, message) = status(refused.unwrap_err());
    assert!(message.contains("husk.agent.v1.Shell"), "{message}");
    assert!(agent.cgroups().is_empty(), "{:?}", agent.cgroups());
}

shell_test! {
    async fn a_program_sees_the_guest_and_hands_on_its_end(agent) {
        let mut streams = run(&agent, "s1", &["sh", "-c", "cat; cat /proc/1/comm; exit 7"], false).await.unwrap();
        streams.write("hello\n").await;
        streams.stdin.shutdown().await.unwrap();
        // The agent is the first process that it sees.
        assert_eq!(read_all(streams.stdout).await, "hello\nhusk-agent\n");
        assert_eq!(wait(&agent.shells, "s1").await, (7, 17));
        // Its own cgroup, beside the containers'.
        assert_eq!(agent.cgroups(), [".shell-s1"]);
        agent.shells.end_shell(context(), &shell("s1")).await.unwrap();
        assert!(agent.cgroups().is_empty());
        assert_eq!(agent.wait_for_calm().await.exit_code, 0);
    }
}

shell_test! {
    async fn without_a_program_it_is_a_shell_with_a_terminal(agent) {
        let mut streams = run(&agent, "s1", &[], true).await.unwrap();
        streams.write("tty; stty size; echo $TERM $PATH\n").await;
        let seen = streams.read_until("vt100 /bin").await;
        assert!(seen.contains("/dev/pts/") && seen.contains("40 100"), "{seen:?}");
        let resize = ResizeShellRequest {
            shell_id: "s1".to_owned(),
            width: 80,
            height: 25,
            ..Default::default()
        };
        agent.shells.resize_shell(context(), &resize).await.unwrap();
        streams.write("stty size\n").await;
        streams.read_until("25 80").await;
        // Ctrl-C is a signal for what runs in front.
        streams.write("sleep 1000; echo it was $?\n").await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        streams.write("\u{3}").await;
        streams.write("exit 9\n").await;
        let rest = read_all(streams.stdout).await;
        assert_eq!(wait(&agent.shells, "s1").await.0, 9, "{rest}");
        agent.shells.end_shell(context(), &shell("s1")).await.unwrap();
    }
}

shell_test! {
    async fn its_end_takes_everything_that_it_started(agent) {
        let mut streams = run(&agent, "s1", &["sh", "-c", "setsid sleep 1000 & echo ready; wait"], false).await.unwrap();
        streams.read_until("ready\n").await;
        let others = run(&agent, "s2", &["sleep", "1000"], false).await.unwrap();
        agent.shells.end_shell(context(), &shell("s1")).await.unwrap();
        assert_eq!(agent.cgroups(), [".shell-s2"]);
        assert_eq!(read_all(streams.stdout).await, "");
        let gone = agent.shells.wait_shell(context(), &shell("s1")).await;
        assert_eq!(status(gone.unwrap_err()).0, Code::NOT_FOUND);
        drop(others);
        agent.shells.end_shell(context(), &shell("s2")).await.unwrap();
    }
}

shell_test! {
    async fn what_cannot_run_says_so_like_a_shell(agent) {
        let streams = run(&agent, "s1", &["no-such-program"], false).await.unwrap();
        let said = read_all(streams.stderr).await;
        assert!(said.contains("no-such-program: No such file"), "{said}");
        assert_eq!(wait(&agent.shells, "s1").await, (127, 0));
        let streams = run(&agent, "s2", &["/proc/version"], false).await.unwrap();
        let said = read_all(streams.stderr).await;
        assert!(said.contains("Permission denied"), "{said}");
        assert_eq!(wait(&agent.shells, "s2").await.0, 126);
    }
}

shell_test! {
    async fn requests_that_cannot_be_are_refused(agent) {
        for (id, code) in [("../up", Code::INVALID_ARGUMENT), ("", Code::INVALID_ARGUMENT)] {
            let refused = run(&agent, id, &["true"], false).await.err().unwrap();
            assert_eq!(status(refused).0, code, "{id}");
        }
        let mut running = Vec::new();
        for number in 0..limit::SHELLS {
            let id = format!("s{number}");
            running.push(run(&agent, &id, &["sleep", "1000"], false).await.unwrap());
        }
        let again = run(&agent, "s0", &["true"], false).await.err().unwrap();
        assert_eq!(status(again).0, Code::RESOURCE_EXHAUSTED);
        agent.shells.end_shell(context(), &shell("s1")).await.unwrap();
        let again = run(&agent, "s0", &["true"], false).await.err().unwrap();
        assert_eq!(status(again).0, Code::ALREADY_EXISTS);
        // A stream that nobody listens for: nothing is left of the attempt.
        let request = RunShellRequest {
            shell_id: "lost".to_owned(),
            streams: Some(husk_protocol::agent::Streams { stdout_port: 7, ..Default::default() }).into(),
            ..Default::default()
        };
        assert!(agent.shells.run_shell(context(), &request).await.is_err());
        assert!(!agent.cgroups().contains(&".shell-lost".to_owned()));
    }
}
