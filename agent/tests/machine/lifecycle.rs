//! From creation to deletion.

use std::time::Instant;

use serde_json::json;
use ttrpc::Code;

use crate::agent::{container, context, process, read_all, status, within};
use crate::agent_test;

agent_test! {
    async fn a_container_runs_to_its_end(agent: Agent) {
        let spec = agent.spec(&["/bin/sh", "-c", "echo out; echo err >&2; exit 7"]);
        assert_eq!(agent.output(&spec).await, (7, "out\n".to_owned(), "err\n".to_owned()));
        assert_eq!(agent.cgroups(), Vec::<String>::new());
        assert_eq!(agent.children(), Vec::<i32>::new());
    }
}

agent_test! {
    async fn nothing_runs_before_the_start(agent: Agent) {
        let spec = agent.spec(&["/bin/sh", "-c", "echo ran > /ran"]);
        agent.create("a", &spec).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        assert!(!agent.rootfs().join("ran").exists());
        agent.start_container("a").await.unwrap();
        assert_eq!(agent.wait("a", "").await.exit_code, 0);
        assert!(agent.rootfs().join("ran").exists());
        let (code, text) = status(agent.start_container("a").await.unwrap_err());
        assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
        agent.delete("a").await;
    }
}

agent_test! {
    async fn hooks_of_the_container_run_before_its_program(agent: Agent) {
        let hook = |script: &str| json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin", "WHO=hook"]}]);
        let mut spec = agent.spec(&["/bin/sh", "-c", "cat /tmp/told; rm /tmp/told"]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["annotations"] = json!({"a": "b"});
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]}));
        spec["hooks"] = json!({"startContainer": hook("(id -u; echo $WHO $$; cat) > /tmp/told")});
        let (code, told, _) = agent.output(&spec).await;
        let (lines, state) = told.split_at(told.find('{').unwrap());
        assert_eq!((code, lines), (0, "1000\nhook 2\n"));
        let state: serde_json::Value = serde_json::from_str(state).unwrap();
        assert_eq!(state["annotations"], spec["annotations"]);
        assert_eq!((&state["status"], &state["pid"]), (&json!("created"), &json!(1)));
        // Without its program.
        spec["hooks"] = json!({"startContainer": hook("exit 3")});
        agent.create("b", &spec).await.unwrap();
        let (_, message) = status(agent.start_container("b").await.unwrap_err());
        assert_eq!(message, "startContainer hook /bin/sh: exit status: 3");
        agent.delete("b").await;
        // The agent is nobody's program.
        spec["hooks"] = json!({"startContainer": [{"path": "/proc/self/exe"}]});
        agent.create("c", &spec).await.unwrap();
        let (code, message) = status(agent.start_container("c").await.unwrap_err());
        assert_eq!(code, Code::PERMISSION_DENIED, "{message}");
        agent.delete("c").await;
    }
}

agent_test! {
    async fn a_created_container_can_be_deleted(agent: Agent) {
        agent.create("a", &agent.spec(&["/bin/true"])).await.unwrap();
        agent.delete("a").await;
        assert_eq!(agent.cgroups(), Vec::<String>::new());
        assert_eq!(agent.children(), Vec::<i32>::new());
        let (code, _) = status(agent.start_container("a").await.unwrap_err());
        assert_eq!(code, Code::NOT_FOUND);
    }
}

agent_test! {
    async fn a_missing_program_is_a_clear_error_and_leaves_nothing(agent: Agent) {
        let mounts = agent.mounts();
        for (args, text, code) in [
            (vec!["foo"], r#"exec: "foo": executable file not found in $PATH"#, Code::NOT_FOUND),
            (vec!["/foo"], r#"exec: "/foo": stat /foo: no such file or directory"#, Code::NOT_FOUND),
            (vec!["/etc"], r#"exec: "/etc": is a directory"#, Code::PERMISSION_DENIED),
            (vec!["/etc/passwd"], r#"exec: "/etc/passwd": permission denied"#, Code::PERMISSION_DENIED),
            (vec![], "process.args is empty", Code::PERMISSION_DENIED),
        ] {
            let started = Instant::now();
            let error = agent.create("a", &agent.spec(&args)).await.err().unwrap();
            assert_eq!(status(error), (code, text.to_owned()));
            assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
        }
        assert_eq!(agent.cgroups(), Vec::<String>::new());
        assert_eq!(agent.children(), Vec::<i32>::new());
        assert_eq!(agent.mounts(), mounts);
    }
}

agent_test! {
    async fn the_agents_own_program_runs_in_no_container(agent: Agent) {
        let refused = r#"exec: "/proc/self/exe": permission denied"#.to_owned();
        let error = agent.create("x", &agent.spec(&["/proc/self/exe"])).await.err().unwrap();
        assert_eq!(status(error), (Code::PERMISSION_DENIED, refused.clone()));
        let mut streams = agent.run("a", &agent.spec(&["/bin/sh", "-c", "echo ready; exec sleep 1000"])).await;
        streams.read_until("ready").await;
        let process = json!({"user": {"uid": 1000, "gid": 1000}, "args": ["/proc/self/exe"], "env": ["PATH=/bin"], "cwd": "/"});
        let error = agent.exec("a", "e", &process).await.err().unwrap();
        assert_eq!(status(error), (Code::PERMISSION_DENIED, refused));
        agent.delete("a").await;
        // The kernel finds an interpreter by itself. It is told where it is not.
        let script = agent.rootfs().join("bin/script");
        std::fs::write(&script, "#!/proc/self/exe\n").unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let (code, _, stderr) = agent.output(&agent.spec(&["script"])).await;
        assert_eq!((code, stderr.as_str()), (1, "husk-agent runs as the first process of a guest\n"));
    }
}

agent_test! {
    async fn a_program_of_no_known_format_fails_at_start(agent: Agent) {
        let path = agent.rootfs().join("bin/garbage");
        std::fs::write(&path, [0_u8; 64]).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        agent.create("a", &agent.spec(&["garbage"])).await.unwrap();
        let (_, text) = status(agent.start_container("a").await.unwrap_err());
        assert_eq!(text, "exec /bin/garbage: exec format error");
        agent.wait("a", "").await;
        agent.delete("a").await;
    }
}

agent_test! {
    async fn bad_requests_are_refused(agent: Agent) {
        let spec = agent.spec(&["/bin/true"]);
        for id in ["", "..", "a/b", "cgroup procs"] {
            let error = agent.create(id, &spec).await.err().unwrap();
            assert_eq!(status(error).0, Code::INVALID_ARGUMENT, "{id:?}");
        }
        let request = husk_protocol::agent::CreateContainerRequest {
            container_id: "a".to_owned(),
            oci_spec: b"{".to_vec(),
            ..Default::default()
        };
        let error = agent.client.create_container(context(), &request).await.unwrap_err();
        assert_eq!(status(error).0, Code::INVALID_ARGUMENT);
        agent.create("a", &spec).await.unwrap();
        let error = agent.create("a", &spec).await.err().unwrap();
        assert_eq!(status(error).0, Code::ALREADY_EXISTS);
        let mut missing = spec.clone();
        missing["root"]["path"] = json!("/not/there");
        let (_, text) = status(agent.create("b", &missing).await.err().unwrap());
        assert!(text.contains("/not/there") && text.contains("No such file"), "{text}");
        let mut limit = spec;
        limit["linux"]["resources"] = json!({"memory": {"limit": 1000, "swap": 10}});
        let (_, text) = status(agent.create("c", &limit).await.err().unwrap());
        assert!(text.contains("memory.swap 10"), "{text}");
        assert_eq!(agent.cgroups(), ["a"]);
    }
}

agent_test! {
    async fn signals_reach_the_process(agent: Agent) {
        let line = "trap 'echo got; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
        let mut streams = agent.run("a", &agent.spec(&["/bin/sh", "-c", line])).await;
        streams.read_until("ready").await;
        agent.signal("a", "", libc::SIGTERM, false).await.unwrap();
        assert_eq!(agent.wait("a", "").await.exit_code, 3);
        let (code, text) = status(agent.signal("a", "", libc::SIGTERM, false).await.unwrap_err());
        assert_eq!((code, text.as_str()), (Code::NOT_FOUND, "process already finished"));
        agent.delete("a").await;
    }
}

agent_test! {
    async fn a_kill_of_all_ends_all(agent: Agent) {
        let line = "sleep 1000 & sleep 1000 & echo ready; wait";
        let mut streams = agent.run("a", &agent.spec(&["/bin/sh", "-c", line])).await;
        streams.read_until("ready").await;
        let list = agent.client.list_processes(context(), &container("a")).await.unwrap();
        assert_eq!(list.processes.len(), 3);
        agent.signal("a", "", libc::SIGKILL, true).await.unwrap();
        assert_eq!(agent.wait("a", "").await.exit_code, 137);
        agent.delete("a").await;
        assert_eq!(agent.children(), Vec::<i32>::new());
    }
}

agent_test! {
    async fn a_kill_of_all_that_names_a_process_ends_only_that(agent: Agent) {
        let mut streams = agent.run("a", &agent.spec(&["/bin/sh", "-c", "read line; exit 3"])).await;
        let sleep = json!({"user": {"uid": 0, "gid": 0}, "args": ["sleep", "1000"], "env": ["PATH=/bin"], "cwd": "/"});
        agent.exec("a", "e", &sleep).await.unwrap();
        agent.signal("a", "e", libc::SIGKILL, true).await.unwrap();
        assert_eq!(agent.wait("a", "e").await.exit_code, 137);
        streams.write("\n").await;
        assert_eq!(agent.wait("a", "").await.exit_code, 3);
        agent.delete("a").await;
    }
}

agent_test! {
    async fn a_real_time_signal_ends_a_process_too(agent: Agent) {
        let mut streams = agent.run("a", &agent.spec(&["/bin/sh", "-c", "echo ready; exec sleep 1000"])).await;
        streams.read_until("ready").await;
        let sleep = json!({"user": {"uid": 0, "gid": 0}, "args": ["sleep", "1000"], "env": ["PATH=/bin"], "cwd": "/"});
        agent.exec("a", "e", &sleep).await.unwrap();
        agent.signal("a", "e", 40, false).await.unwrap();
        assert_eq!(agent.wait("a", "e").await.exit_code, 128 + 40);
        agent.delete("a").await;
    }
}

agent_test! {
    async fn exec_joins_the_container(agent: Agent) {
        let mut streams = agent.run("a", &agent.spec(&["/bin/sh", "-c", "touch /tmp/mark; echo ready; exec sleep 1000"])).await;
        streams.read_until("ready").await;
        let line = "hostname; ls /tmp; while [ \"$(cat /proc/1/comm)\" = sh ]; do :; done; cat /proc/1/comm; grep ^0: /proc/self/cgroup; exit 5";
        let process_json = json!({"user": {"uid": 1000, "gid": 1000}, "args": ["sh", "-c", line], "env": ["PATH=/bin"], "cwd": "/tmp"});
        let exec = agent.exec("a", "e", &process_json).await.unwrap();
        assert_eq!(read_all(exec.stdout).await, "box\nmark\nsleep\n0::/\n");
        assert_eq!(agent.wait("a", "e").await.exit_code, 5);
        let again = agent.exec("a", "e", &process_json).await.err().unwrap();
        assert_eq!(status(again).0, Code::ALREADY_EXISTS);
        agent.client.delete_process(context(), &process("a", "e")).await.unwrap();
        agent.exec("a", "e", &process_json).await.unwrap();
        agent.wait("a", "e").await;
        agent.delete("a").await;
    }
}

agent_test! {
    async fn each_of_many_processes_has_its_own_exit(agent: Agent) {
        let mut streams = agent.run("a", &agent.spec(&["/bin/sh", "-c", "echo ready; exec sleep 1000"])).await;
        streams.read_until("ready").await;
        let agent = &agent;
        let execs = (0..40).map(async |code: u32| {
            // With orphans, whose exits nobody waits for.
            let line = format!("(exit 99 &); exit {code}");
            let process = json!({"user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", line], "env": ["PATH=/bin"], "cwd": "/"});
            let id = format!("e{code}");
            agent.exec("a", &id, &process).await.unwrap();
            assert_eq!(agent.wait("a", &id).await.exit_code, code);
        });
        futures::future::join_all(execs).await;
        agent.delete("a").await;
        assert_eq!(agent.children(), Vec::<i32>::new());
    }
}

agent_test! {
    async fn an_exec_of_a_missing_program_fails_at_once(agent: Agent) {
        let mut streams = agent.run("a", &agent.spec(&["/bin/sh", "-c", "echo ready; exec sleep 1000"])).await;
        streams.read_until("ready").await;
        let started = Instant::now();
        let process_json = json!({"user": {"uid": 0, "gid": 0}, "args": ["nope"], "env": ["PATH=/bin"], "cwd": "/"});
        let error = agent.exec("a", "e", &process_json).await.err().unwrap();
        assert_eq!(status(error), (Code::NOT_FOUND, r#"exec: "nope": executable file not found in $PATH"#.to_owned()));
        assert!(started.elapsed().as_secs() < 5);
        let list = agent.client.list_processes(context(), &container("a")).await.unwrap();
        assert_eq!(list.processes.len(), 1);
        let error = agent.client.delete_process(context(), &process("a", "e")).await.unwrap_err();
        assert_eq!(status(error).0, Code::NOT_FOUND);
        agent.delete("a").await;
    }
}

agent_test! {
    async fn orphans_are_collected(agent: Agent) {
        // In the agent's own PID namespace its PID 1 inherits them.
        let mut spec = agent.spec(&["/bin/sh", "-c", "(sleep 0.1 &); (exit 1 &); sleep 0.3"]);
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
        assert_eq!(agent.output(&spec).await.0, 0);
        assert_eq!(agent.children(), Vec::<i32>::new());
    }
}

agent_test! {
    async fn without_a_pid_namespace_the_rest_ends_with_the_first(agent: Agent) {
        let mut spec = agent.spec(&["/bin/sh", "-c", "sleep 1000 & echo $$"]);
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
        let streams = agent.run("a", &spec).await;
        let pid: u32 = read_all(streams.stdout).await.trim().parse().unwrap();
        assert!(pid > 2, "{pid}");
        assert_eq!(agent.wait("a", "").await.exit_code, 0);
        within("the rest to end", async {
            while !agent.children().is_empty() {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await;
        agent.delete("a").await;
    }
}

agent_test! {
    async fn pause_stops_and_resume_continues(agent: Agent) {
        let line = "while :; do echo tick; sleep 0.02; done";
        let mut streams = agent.run("a", &agent.spec(&["/bin/sh", "-c", line])).await;
        streams.read_until("tick").await;
        agent.client.pause(context(), &container("a")).await.unwrap();
        let mut buf = vec![0; 1 << 16];
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        while let Ok(count) = streams.stdout.try_read(&mut buf) {
            assert_ne!(count, 0);
        }
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        assert_eq!(streams.stdout.try_read(&mut buf).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        let error = agent.client.pause(context(), &container("a")).await.unwrap_err();
        assert_eq!(status(error).0, Code::FAILED_PRECONDITION);
        agent.client.resume(context(), &container("a")).await.unwrap();
        streams.read_until("tick").await;
        // A paused container can be deleted as well.
        agent.client.pause(context(), &container("a")).await.unwrap();
        agent.delete("a").await;
        assert_eq!(agent.cgroups(), Vec::<String>::new());
    }
}

agent_test! {
    async fn the_end_of_the_connection_ends_everything(agent: Agent) {
        let mut streams = agent.run("a", &agent.spec(&["/bin/sh", "-c", "echo ready; exec sleep 1000"])).await;
        streams.read_until("ready").await;
        agent.client.shutdown(context(), &husk_protocol::agent::Empty::new()).await.unwrap();
        let cgroup = agent.cgroup.join("husk/a");
        within("the container to end", async {
            while cgroup.exists() {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await;
    }
}
