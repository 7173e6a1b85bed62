//! What is given up before it is made: nothing of it runs later.

use std::path::Path;
use std::time::{Duration, Instant};

use husk_protocol::agent::DeleteContainerRequest;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::agent::{Agent, container, context, process, status, within};
use crate::agent_test;

/// A helper that joins a frozen cgroup stops there.
fn freeze(cgroup: &Path, frozen: bool) {
    std::fs::write(cgroup.join("cgroup.freeze"), u8::from(frozen).to_string()).unwrap();
}

async fn wait_for_processes(cgroup: &Path, count: usize) {
    let procs = cgroup.join("cgroup.procs");
    within("a helper", async {
        while std::fs::read_to_string(&procs).is_ok_and(|text| text.lines().count() != count)
            || !procs.exists()
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

fn marks(agent: &Agent) -> Value {
    agent.spec(&["/bin/sh", "-c", "touch /ran; echo ready; exec sleep 1000"])
}

agent_test! {
    async fn a_creation_under_way_ends_with_its_deletion(agent: Agent) {
        let mounts = agent.mounts();
        let husk = agent.cgroup.join("husk");
        freeze(&husk, true);
        let spec = marks(&agent);
        let deletion = async {
            wait_for_processes(&husk.join("a"), 1).await;
            let started = Instant::now();
            let request = DeleteContainerRequest {
                container_id: "a".to_owned(),
                ..Default::default()
            };
            agent.client.delete_container(context(), &request).await.unwrap();
            assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
            // All of it is gone by then.
            assert_eq!(agent.cgroups(), Vec::<String>::new());
            assert_eq!(agent.mounts(), mounts);
        };
        let (created, ()) = tokio::join!(agent.create("a", &spec), deletion);
        let (_, text) = status(created.err().unwrap());
        assert_eq!(text, "the process was given up while it was being made");
        freeze(&husk, false);
        assert!(!agent.rootfs().join("ran").exists());
        // Its id is free.
        agent.run("a", &spec).await.read_until("ready").await;
        agent.delete("a").await;
        assert_eq!(agent.children(), Vec::<i32>::new());
    }
}

agent_test! {
    async fn a_process_under_way_ends_with_a_kill_or_its_deletion(agent: Agent) {
        agent.run("a", &agent.spec(&["/bin/sh", "-c", "echo ready; exec sleep 1000"])).await.read_until("ready").await;
        let cgroup = agent.cgroup.join("husk/a");
        let user = json!({"uid": 0, "gid": 0});
        let exec = json!({"user": user, "args": ["touch", "/ran"], "env": ["PATH=/bin"], "cwd": "/"});
        for is_killed in [true, false] {
            freeze(&cgroup, true);
            let ending = async {
                wait_for_processes(&cgroup, 2).await;
                let (code, _) = status(agent.signal("a", "e", libc::SIGTERM, false).await.unwrap_err());
                assert_eq!(code, Code::FAILED_PRECONDITION);
                if is_killed {
                    agent.signal("a", "e", libc::SIGKILL, false).await.unwrap();
                } else {
                    agent.client.delete_process(context(), &process("a", "e")).await.unwrap();
                }
            };
            let (made, ()) = tokio::join!(agent.exec("a", "e", &exec), ending);
            let (_, text) = status(made.err().unwrap());
            assert_eq!(text, "the process was given up while it was being made");
            freeze(&cgroup, false);
            let (code, _) = status(agent.signal("a", "e", libc::SIGKILL, false).await.unwrap_err());
            assert_eq!(code, Code::NOT_FOUND);
        }
        assert!(!agent.rootfs().join("ran").exists());
        // What was killed while it was frozen ends now.
        wait_for_processes(&cgroup, 1).await;
        let list = agent.client.list_processes(context(), &container("a")).await.unwrap();
        assert_eq!(list.processes.len(), 1);
        agent.exec("a", "e", &exec).await.unwrap();
        assert_eq!(agent.wait("a", "e").await.exit_code, 0);
        assert!(agent.rootfs().join("ran").exists());
        agent.delete("a").await;
    }
}
