//! Limits and devices that few development machines have: these run in a guest
//! (see guest.rs) and are skipped elsewhere.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use husk_protocol::agent::{
    BlockStorage, CreateSandboxRequest, DeviceNumber, Empty, SetVcpusRequest, Storage,
    UpdateResourcesRequest, event, storage,
};
use protobuf::Message;
use serde_json::json;

use crate::agent::{Agent, container, context, read_all, skip, unable, within};
use crate::agent_test;

fn has_controllers(agent: &Agent) -> bool {
    let has = agent.cgroup.join("husk/memory.max").exists();
    if !has {
        skip("limits", "no memory controller in cgroup v2");
    }
    has
}

agent_test! {
    async fn a_container_out_of_memory_is_told_of(agent: Agent) {
        if !has_controllers(&agent) {
            return;
        }
        let mut spec = agent.spec(&["/bin/sh", "-c", "exec tail /dev/zero"]);
        spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
        agent.create("a", &spec).await.unwrap();
        // Those are counted by user, and a container's root is the same one.
        assert!(!agent.descriptors().iter().any(|name| name.contains("inotify")));
        agent.start_container("a").await.unwrap();
        let event = within("the event", agent.client.next_event(context(), &Empty::new())).await.unwrap();
        let Some(event::Kind::Oom(oom)) = event.kind else {
            panic!("not an OOM event: {event:?}");
        };
        assert_eq!(oom.container_id, "a");
        let exit = agent.wait("a", "").await;
        assert_eq!((exit.exit_code, exit.oom_killed), (137, true));
        agent.delete("a").await;
        assert!(!agent.wait_for_calm().await.oom_killed);
    }
}

agent_test! {
    async fn a_container_that_outlives_a_want_of_memory_is_told_of(agent: Agent) {
        if !has_controllers(&agent) {
            return;
        }
        let mut spec = agent.spec(&["/bin/sh", "-c", "tail /dev/zero; echo alive; read line"]);
        spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
        let mut streams = agent.run("a", &spec).await;
        streams.read_until("alive").await;
        let event = within("the event", agent.client.next_event(context(), &Empty::new())).await.unwrap();
        assert!(matches!(event.kind, Some(event::Kind::Oom(_))), "{event:?}");
        agent.delete("a").await;
    }
}

agent_test! {
    async fn too_little_memory_to_start_is_a_clear_error(agent: Agent) {
        if !has_controllers(&agent) {
            return;
        }
        let mut spec = agent.spec(&["/bin/true"]);
        spec["linux"]["resources"] = json!({"memory": {"limit": 8192, "swap": 8192}});
        let error = agent.create("a", &spec).await.err().unwrap();
        let expected = "the process ended while it was being made: its memory limit is too low";
        assert_eq!(crate::agent::status(error).1, expected);
        assert_eq!(agent.cgroups(), Vec::<String>::new());
    }
}

agent_test! {
    async fn limits_are_set_and_updated(agent: Agent) {
        if !has_controllers(&agent) {
            return;
        }
        let mut spec = agent.spec(&["/bin/sh", "-c", "cd /sys/fs/cgroup; cat memory.max cpu.weight cpu.max pids.max memory.oom.group; echo ready; read line; cat memory.max cpu.max"]);
        spec["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20},
            "cpu": {"shares": 2048, "quota": 50_000, "period": 100_000},
            "pids": {"limit": 40},
            "unified": {"memory.oom.group": "1"},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "17GB", "limit": 0}],
        });
        let mut streams = agent.run("a", &spec).await;
        assert_eq!(streams.read_until("ready\n").await, "67108864\n79\n50000 100000\n40\n1\nready\n");
        let request = UpdateResourcesRequest {
            container_id: "a".to_owned(),
            oci_resources: json!({"memory": {"limit": 32 << 20}, "cpu": {"quota": -1}}).to_string().into_bytes(),
            ..Default::default()
        };
        agent.client.update_resources(context(), &request).await.unwrap();
        let stats = agent.client.stats(context(), &container("a")).await.unwrap();
        let metrics = husk_protocol::metrics::Metrics::parse_from_bytes(&stats.cgroup_v2_metrics).unwrap();
        assert_eq!((metrics.memory.usage_limit, metrics.pids.limit), (32 << 20, 40));
        assert!(metrics.memory.usage > 0 && metrics.pids.current == 1);
        streams.write("\n").await;
        assert_eq!(read_all(streams.stdout).await, "33554432\nmax 100000\n");
        agent.wait("a", "").await;
        agent.delete("a").await;
    }
}

#[tokio::test]
async fn the_holder_of_a_pid_namespace_has_limits() {
    if let Some(reason) = unable() {
        skip("limits of a holder", &reason);
        return;
    }
    let agent = Agent::start_with("true").await;
    let request = CreateSandboxRequest {
        shared_pid_namespace: true,
        ..Default::default()
    };
    let created = agent.client.create_sandbox(context(), &request).await;
    created.unwrap();
    if !has_controllers(&agent) {
        return;
    }
    let mut spec = agent.spec(&["/bin/sh", "-c", "cat /proc/1/oom_score_adj"]);
    spec["linux"]["namespaces"][0]["path"] = json!("/proc/4242/ns/pid");
    assert_eq!(agent.output(&spec).await.1, "-998\n");
    let holder = agent.cgroup.join("husk/.holder");
    for (name, value) in [("pids.max", "1\n"), ("memory.max", "16777216\n")] {
        let text = std::fs::read_to_string(holder.join(name)).unwrap();
        assert_eq!(text, value, "{name}");
    }
}

agent_test! {
    async fn without_a_cgroup_namespace_the_agents_cgroups_are_seen(agent: Agent) {
        // Not another mount of them, which would change the options of all: a
        // guest's have nsdelegate.
        let before = agent.mounts();
        let mut spec = agent.spec(&["/bin/sh", "-c", "grep ' /sys/fs/cgroup ' /proc/self/mountinfo"]);
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "cgroup");
        let (_, stdout, stderr) = agent.output(&spec).await;
        let device = |mount: &str| mount.split(' ').nth(2).unwrap().to_owned();
        let own = before.lines().find(|line| line.contains(" /sys/fs/cgroup ")).unwrap();
        let line = stdout.lines().next().unwrap_or_else(|| panic!("{stderr}"));
        assert_eq!(device(line), device(own), "{stdout}");
        assert!(line.contains(" ro,"), "{stdout}");
        assert_eq!(agent.mounts(), before);
    }
}

agent_test! {
    async fn a_fork_bomb_stays_in_its_limit(agent: Agent) {
        if !has_controllers(&agent) {
            return;
        }
        let mut spec = agent.spec(&["/bin/sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 100 & done; echo all"]);
        spec["linux"]["resources"] = json!({"pids": {"limit": 5}});
        let (_, stdout, stderr) = agent.output(&spec).await;
        assert!(stdout.is_empty() && stderr.contains("can't fork"), "{stdout}{stderr}");
    }
}

agent_test! {
    async fn a_block_device_of_mapped_users_is_their_disk(agent: Agent) {
        if std::env::var_os("HUSK_TEST_DISK").is_none() {
            skip("a disk", "none of the serial husk-disk");
            return;
        }
        let mut spec = agent.spec(&["/bin/stat", "-c", "%F %t:%T", "/dev/xvda"]);
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        for directory in ["dev", "proc", "sys"] {
            std::fs::create_dir(agent.rootfs().join(directory)).unwrap();
        }
        std::fs::set_permissions(agent.directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        // The guest has no such path, and this number is none of its disks'.
        spec["linux"]["devices"] = json!([{"path": "/dev/xvda", "type": "b", "major": 7, "minor": 3}]);
        let mut number = DeviceNumber { major: 7, minor: 3, ..Default::default() };
        number.set_block_serial("husk-disk".to_owned());
        let streams = agent.create_as("a", &spec, |request| request.devices = vec![number]).await.unwrap();
        agent.start_container("a").await.unwrap();
        let disk = std::fs::metadata("/dev/vda").unwrap().rdev();
        let (major, minor) = (rustix::fs::major(disk), rustix::fs::minor(disk));
        let seen = read_all(streams.stdout).await;
        assert_eq!(seen, format!("block special file {major:x}:{minor:x}\n"));
        agent.wait("a", "").await;
        agent.delete("a").await;
    }
}

agent_test! {
    async fn a_block_device_is_mounted_by_its_serial(agent: Agent) {
        if std::env::var_os("HUSK_TEST_DISK").is_none() {
            skip("a disk", "none of the serial husk-disk");
            return;
        }
        let block = |fstype: &str, mount_point: &str, option: &str| Storage {
            source: Some(storage::Source::Block(BlockStorage {
                serial: "husk-disk".to_owned(),
                fstype: fstype.to_owned(),
                ..Default::default()
            })),
            mount_point: mount_point.to_owned(),
            options: vec![option.to_owned()],
            ..Default::default()
        };
        let mounts = agent.mounts();
        for option in ["rw", "ro"] {
            let mut spec = agent.spec(&["/bin/sh", "-c", "touch /disk/file && echo written; ls /disk; head -c 4 /raw | wc -c; head -c 4 /dev/xvda | wc -c; (: > /dev/xvda); head -c 4 /none"]);
            // As the host numbers it.
            spec["linux"]["devices"] = json!([{"path": "/dev/xvda", "type": "b", "major": 7, "minor": 3}]);
            spec["linux"]["resources"] = json!({"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 3, "access": "rm"},
            ]});
            let mut number = DeviceNumber { major: 7, minor: 3, ..Default::default() };
            number.set_block_serial("husk-disk".to_owned());
            let list = spec["mounts"].as_array_mut().unwrap();
            list.push(json!({"destination": "/disk", "type": "bind", "source": "/run/husk/volumes/disk", "options": ["rbind"]}));
            list.push(json!({"destination": "/raw", "type": "bind", "source": "/run/husk/volumes/raw", "options": ["bind"]}));
            list.push(json!({"destination": "/none", "type": "bind", "source": "/run/husk/volumes/none", "options": ["bind"]}));
            let mut none = block("", "/run/husk/volumes/none", "");
            none.mut_block().serial.clear();
            let storages = vec![block("ext4", "/run/husk/volumes/disk", option), block("", "/run/husk/volumes/raw", ""), none];
            let streams = agent.create_as("a", &spec, |request| {
                request.storages = storages;
                request.devices = vec![number];
            }).await.unwrap();
            agent.start_container("a").await.unwrap();
            let text = read_all(streams.stdout).await;
            assert_eq!(text.starts_with("written\n"), option == "rw", "{text}");
            assert!(text.contains("file\nlost+found\n4\n4\n"), "{text}");
            let errors = read_all(streams.stderr).await;
            assert!(errors.contains("/dev/xvda: Operation not permitted"), "{errors}");
            assert!(errors.contains("/none: Operation not permitted"), "{errors}");
            agent.wait("a", "").await;
            agent.delete("a").await;
            assert_eq!(agent.mounts(), mounts);
        }
        let request = SetVcpusRequest {
            // All there are; this may be anybody's machine.
            vcpus: u32::MAX,
            ..Default::default()
        };
        let online = agent.client.set_vcpus(context(), &request).await.unwrap();
        assert!(online.vcpus >= 1);
    }
}
