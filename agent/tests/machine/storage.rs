//! Storages and what containers of a pod share.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use husk_protocol::agent::{
    BindStorage, BlockStorage, CreateSandboxRequest, HugePagesStorage, OverlayStorage, Storage,
    TmpfsStorage, VirtioFsStorage, storage,
};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::agent::{Agent, container, context, read_all, skip, status, unable, within};
use crate::agent_test;

pub fn at(mount_point: &str, source: storage::Source) -> Storage {
    Storage {
        mount_point: mount_point.to_owned(),
        source: Some(source),
        ..Default::default()
    }
}

fn tmpfs(mount_point: &str) -> Storage {
    let tmpfs = TmpfsStorage {
        size_bytes: 1 << 20,
        mode: 0o750,
        ..Default::default()
    };
    at(mount_point, storage::Source::Tmpfs(tmpfs))
}

fn bind(mount_point: &str, source: &std::path::Path, option: &str) -> Storage {
    let bind = BindStorage {
        source: source.display().to_string(),
        ..Default::default()
    };
    Storage {
        options: vec![option.to_owned()],
        ..at(mount_point, storage::Source::Bind(bind))
    }
}

agent_test! {
    async fn storages_are_mounted_in_order_and_undone(agent: Agent) {
        let base = "/run/husk/containers/a";
        let lower = agent.directory.path().join("lower");
        std::fs::create_dir(&lower).unwrap();
        std::fs::write(lower.join("added"), "by the lower layer\n").unwrap();
        let overlay = OverlayStorage {
            lower: vec![lower.display().to_string(), agent.rootfs().display().to_string()],
            upper: format!("{base}/scratch/upper"),
            work: format!("{base}/scratch/work"),
            ..Default::default()
        };
        // The overlay's own directories lie in a tmpfs that is mounted before.
        let storages = vec![
            tmpfs(&format!("{base}/scratch")),
            tmpfs(&format!("{base}/scratch/upper")),
            at(&format!("{base}/rootfs"), storage::Source::Overlay(overlay)),
        ];
        let before = agent.mounts();
        let mut spec = agent.spec(&["/bin/sh", "-c", "cat /added; touch /new; ls -d /new"]);
        spec["root"]["path"] = json!(format!("{base}/rootfs"));
        // The work directory is missing: the third fails, and the first two go.
        let error = agent.create_with("a", &spec, storages.clone()).await.err().unwrap();
        let (_, text) = status(error);
        assert!(text.starts_with("storage at \"/run/husk/containers/a/rootfs\""), "{text}");
        assert_eq!(agent.mounts(), before);
        let run = format!("/proc/{}/root{base}", agent.pid());
        assert!(!std::path::Path::new(&run).exists());

        let scratch = agent.directory.path().join("scratch");
        for name in ["upper", "work"] {
            std::fs::create_dir_all(scratch.join(name)).unwrap();
        }
        let mut storages = storages;
        storages.splice(0..2, [bind(&format!("{base}/scratch"), &scratch, "nosuid")]);
        let streams = agent.create_with("a", &spec, storages).await.unwrap();
        agent.start_container("a").await.unwrap();
        assert_eq!(read_all(streams.stdout).await, "by the lower layer\n/new\n");
        agent.wait("a", "").await;
        agent.delete("a").await;
        assert_eq!(agent.mounts(), before);
        assert!(!std::path::Path::new(&run).exists());
        assert!(scratch.join("upper/new").exists());
        assert!(!agent.rootfs().join("new").exists());
    }
}

agent_test! {
    async fn a_tmpfs_has_its_size_and_mode(agent: Agent) {
        let storages = vec![tmpfs("/run/husk/volumes/memory")];
        let mut spec = agent.spec(&["/bin/sh", "-c", "stat -c %a /data; df -k /data | tail -n1"]);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/data", "type": "bind", "source": "/run/husk/volumes/memory", "options": ["rbind"]}));
        let streams = agent.create_with("a", &spec, storages).await.unwrap();
        agent.start_container("a").await.unwrap();
        let text = read_all(streams.stdout).await;
        assert!(text.starts_with("750\n") && text.contains(" 1024 "), "{text}");
        agent.wait("a", "").await;
        agent.delete("a").await;
    }
}

/// A sleeper that has a volume of huge pages at `/pages`.
async fn with_huge_pages(agent: &Agent, id: &str, page_bytes: u64) -> Result<(), ttrpc::Error> {
    let pages = HugePagesStorage {
        page_bytes,
        size_bytes: 8 << 20,
        uid: 12,
        gid: 34,
        mode: 0o2770,
        ..Default::default()
    };
    let place = "/run/husk/sandbox/huge-pages/1";
    let storages = vec![at(place, storage::Source::HugePages(pages))];
    let mut spec = agent.spec(&["/bin/sleep", "1000"]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/pages", "type": "bind", "source": place, "options": ["rbind"]}),
    );
    agent.create_with(id, &spec, storages).await.map(drop)
}

/// Where the container has it, seen from here.
fn pages_of(agent: &Agent, id: &str) -> PathBuf {
    let processes = agent.cgroup.join("husk").join(id).join("cgroup.procs");
    let pid = std::fs::read_to_string(processes).unwrap();
    PathBuf::from(format!("/proc/{}/root/pages", pid.trim()))
}

agent_test! {
    async fn a_volume_of_huge_pages_is_the_pods(agent: Agent) {
        if !Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
            skip("volume of huge pages", "this kernel has none");
            return;
        }
        // Which the machine that runs this test gets back.
        let allowed = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";
        let allowed_before = std::fs::read(allowed).unwrap();
        std::fs::write(allowed, "0").unwrap();
        // Of a size that there is not: nothing stays.
        let before = agent.mounts();
        let error = with_huge_pages(&agent, "a", 3 << 20).await.err().unwrap();
        assert!(status(error).1.contains("huge-pages/1"));
        assert_eq!(agent.mounts(), before);

        for id in ["a", "b"] {
            with_huge_pages(&agent, id, 2 << 20).await.unwrap();
            agent.start_container(id).await.unwrap();
        }
        let [first, second] = ["a", "b"].map(|id| pages_of(&agent, id));
        let root = first.metadata().unwrap();
        assert_eq!((root.uid(), root.gid(), root.mode() & 0o7777), (12, 34, 0o2770));
        let found = rustix::fs::statfs(&first).unwrap();
        assert_eq!((found.f_bsize, found.f_blocks), (2 << 20, 4));
        // No limit has said that there may be such pages.
        assert_ne!(std::fs::read(allowed).unwrap(), b"0\n");
        std::fs::write(allowed, allowed_before).unwrap();
        std::fs::create_dir(first.join("left")).unwrap();
        assert!(second.join("left").is_dir());
        for id in ["a", "b"] {
            agent.delete(id).await;
        }
        // What a container leaves there the next one finds.
        with_huge_pages(&agent, "c", 2 << 20).await.unwrap();
        agent.start_container("c").await.unwrap();
        assert!(pages_of(&agent, "c").join("left").is_dir());
        agent.delete("c").await;
    }
}

agent_test! {
    async fn a_storage_that_cannot_be_had_is_a_clear_error(agent: Agent) {
        let block = BlockStorage {
            serial: "no-such".to_owned(),
            fstype: "ext4".to_owned(),
            ..Default::default()
        };
        let fs = VirtioFsStorage {
            tag: "no-such".to_owned(),
            ..Default::default()
        };
        let spec = agent.spec(&["/bin/true"]);
        let missing = [
            (storage::Source::Block(block), "block device \"no-such\" did not appear within 10 s"),
            (storage::Source::VirtioFs(fs), "virtio-fs \"no-such\" did not appear within 10 s"),
        ];
        let attempts = missing.into_iter().enumerate().map(async |(number, (source, text))| {
            let id = format!("c{number}");
            let storages = vec![at("/run/husk/x", source)];
            let error = agent.create_with(&id, &spec, storages).await.err().unwrap();
            assert_eq!(status(error), (Code::DEADLINE_EXCEEDED, text.to_owned()));
        });
        futures::future::join_all(attempts).await;
        for path in ["relative", "/", "/run/../x", ""] {
            let error = agent.create_with("a", &spec, vec![tmpfs(path)]).await.err().unwrap();
            assert!(status(error).1.contains("not an absolute path"), "{path}");
        }
        let error = agent.create_with("a", &spec, vec![bind("/run/x", "/not/there".as_ref(), "ro")]).await;
        assert!(status(error.err().unwrap()).1.contains("/not/there"));
    }
}

fn sleeper(agent: &Agent, pid_path: Option<&str>) -> Value {
    let mut spec = agent.spec(&["/bin/sh", "-c", "echo ready; exec sleep 1000"]);
    if let Some(path) = pid_path {
        spec["linux"]["namespaces"][0]["path"] = json!(path);
    }
    spec
}

async fn agent_with_shared_pids() -> Agent {
    let agent = Agent::start_with("true").await;
    let request = CreateSandboxRequest {
        shared_pid_namespace: true,
        ..Default::default()
    };
    let created = agent.client.create_sandbox(context(), &request).await;
    created.unwrap();
    agent
}

#[tokio::test]
async fn a_shared_pid_namespace_is_shared_and_collects_orphans() {
    if let Some(reason) = unable() {
        skip("shared PID namespace", &reason);
        return;
    }
    let agent = agent_with_shared_pids().await;
    // Nobody holds it before it is wanted.
    assert_eq!(agent.children(), Vec::<i32>::new());
    assert_eq!(agent.shell("echo $$").await, "1\n");
    let shared = Some("/proc/4242/ns/pid");
    agent
        .run("a", &sleeper(&agent, shared))
        .await
        .read_until("ready")
        .await;
    let mut spec = agent.spec(&["/bin/sh", "-c", "cat /proc/1/comm; (sleep 3 &); sleep 0.7; ps -o comm | grep -c sleep; sleep 3; ps -o stat | grep -c Z"]);
    spec["linux"]["namespaces"][0]["path"] = json!("/proc/4242/ns/pid");
    let (_, stdout, stderr) = agent.output(&spec).await;
    // Both the other container's and its own orphan; no zombie afterwards.
    assert_eq!(stdout, "husk-agent\n2\n0\n", "{stderr}");
    // A right over processes is no way to the guest's files, or to its root.
    let line = "ls -A /proc/1/root/ /proc/1/fd/; touch /proc/1/root/x; grep -E '^(Uid|Groups|CapPrm|CapBnd|NoNewPrivs)' /proc/1/status";
    let mut spec = agent.spec(&["/bin/sh", "-c", line]);
    spec["linux"]["namespaces"][0]["path"] = json!("/proc/4242/ns/pid");
    for set in ["bounding", "effective", "permitted"] {
        let set = spec["process"]["capabilities"][set].as_array_mut().unwrap();
        set.push(json!("CAP_SYS_PTRACE"));
    }
    let (_, stdout, stderr) = agent.output(&spec).await;
    let expected = "/proc/1/fd/:\n\n/proc/1/root/:\nUid:\t65534\t65534\t65534\t65534\nGroups:\t \nCapPrm:\t0000000000000000\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\n";
    assert_eq!(stdout, expected, "{stderr}");
    assert!(stderr.contains("Read-only file system"), "{stderr}");
    // Nor to devices, to more processes or to other cgroups: it has its own.
    let line = "grep ^0: /proc/1/cgroup; cat /proc/1/oom_score_adj; readlink /proc/1/ns/cgroup";
    let mut spec = agent.spec(&["/bin/sh", "-c", line]);
    spec["linux"]["namespaces"][0]["path"] = json!("/proc/4242/ns/pid");
    let caps = json!(["CAP_SYS_PTRACE"]);
    spec["process"]["capabilities"] =
        json!({"bounding": caps, "effective": caps, "permitted": caps});
    let (_, stdout, stderr) = agent.output(&spec).await;
    let outside = format!("/proc/{}/ns/cgroup", agent.pid());
    let outside = std::fs::read_link(outside).unwrap();
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines[0], "0::/../.holder", "{stdout}{stderr}");
    let may_not = agent.log().contains("holder's oom_score_adj: Permission");
    assert!(lines[1] == "-998" || may_not, "{stdout}{stderr}");
    assert!(lines[2].starts_with("cgroup:"), "{stdout}{stderr}");
    assert_ne!(lines[2], outside.to_str().unwrap());
    agent.delete("a").await;
    assert_eq!(agent.children().len(), 1);
}

#[tokio::test]
async fn a_shared_pid_namespace_whose_holder_has_ended_is_made_anew() {
    if let Some(reason) = unable() {
        skip("shared PID namespace", &reason);
        return;
    }
    let agent = agent_with_shared_pids().await;
    let spec = sleeper(&agent, Some("/proc/4242/ns/pid"));
    agent.run("a", &spec).await.read_until("ready").await;
    let holder = std::fs::read_to_string(agent.cgroup.join("husk/.holder/cgroup.procs")).unwrap();
    let holder = rustix::process::Pid::from_raw(holder.trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(holder, rustix::process::Signal::KILL).unwrap();
    assert_eq!(agent.wait("a", "").await.exit_code, 137);
    agent.delete("a").await;
    let again = async {
        // Its end and the container's are seen in any order.
        while agent.create("b", &spec).await.is_err() {}
    };
    within("another holder", again).await;
    agent.start_container("b").await.unwrap();
    assert!(
        agent
            .log()
            .contains("the holder of the pod's PID namespace has ended")
    );
    agent.delete("b").await;
}

agent_test! {
    async fn a_container_joins_the_pid_namespace_of_another(agent: Agent) {
        agent.run("a", &sleeper(&agent, None)).await.read_until("ready").await;
        let mut spec = agent.spec(&["/bin/sh", "-c", "cat /proc/1/comm; echo $$"]);
        spec["linux"]["namespaces"][0]["path"] = json!("/run/husk/containers/a");
        let (_, stdout, _) = agent.output(&spec).await;
        assert_eq!(stdout, "sleep\n2\n");
        spec["linux"]["namespaces"][0]["path"] = json!("/run/husk/containers/none");
        let error = agent.create("b", &spec).await.err().unwrap();
        assert_eq!(status(error).0, Code::NOT_FOUND);
        // Its number may be another process's by then.
        agent.signal("a", "", libc::SIGKILL, false).await.unwrap();
        agent.wait("a", "").await;
        spec["linux"]["namespaces"][0]["path"] = json!("/run/husk/containers/a");
        let (code, message) = status(agent.create("c", &spec).await.err().unwrap());
        assert_eq!((code, &*message), (Code::NOT_FOUND, "process already finished"));
        agent.delete("a").await;
    }
}

agent_test! {
    async fn mounts_propagate_only_when_asked_for(agent: Agent) {
        // A volume of the pod is a mount of its own in the agent's namespace.
        let volume = agent.directory.path().join("volume");
        std::fs::create_dir_all(volume.join("sub")).unwrap();
        let shared = "/run/husk/volumes/v";
        let keep = agent.create_with("keep", &sleeper(&agent, None), vec![bind(shared, &volume, "rw")]).await;
        keep.unwrap();
        let caps = json!(["CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_DAC_OVERRIDE"]);
        for (propagation, root, expected) in [("rshared", Some("rshared"), true), ("rprivate", None, false)] {
            let mut spec = agent.spec(&["/bin/sh", "-c", "mount -t tmpfs none /data/sub && echo done; exec sleep 1000"]);
            spec["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
            if let Some(root) = root {
                spec["linux"]["rootfsPropagation"] = json!(root);
            }
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/data", "type": "bind", "source": shared, "options": ["rbind", propagation]}));
            let mut streams = agent.run("a", &spec).await;
            streams.read_until("done").await;
            let seen = agent.mounts().contains("/run/husk/volumes/v/sub ");
            assert_eq!(seen, expected, "{propagation}: {}", agent.mounts());
            // No root of a container shows up in the agent.
            assert!(!agent.mounts().contains("/run/husk/stage/"));
            agent.delete("a").await;
            let umount = std::process::Command::new("nsenter").args(["--mount", "--target", &agent.pid().to_string(), "umount", "/run/husk/volumes/v/sub"]).status().unwrap();
            assert_eq!(umount.success(), expected);
        }
        agent.delete("keep").await;
    }
}

agent_test! {
    async fn limits_without_their_controller_are_an_error(agent: Agent) {
        // This machine's cgroup v2 may have no memory controller.
        let mut spec = agent.spec(&["/bin/true"]);
        spec["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}});
        let has = agent.cgroup.join("husk/memory.max").exists();
        match agent.create("a", &spec).await {
            Ok(_) => assert!(has),
            Err(error) => {
                assert!(!has);
                assert!(status(error).1.starts_with("cannot set memory.max"));
            }
        }
        assert_eq!(agent.cgroups().len(), usize::from(has));
    }
}

agent_test! {
    async fn statistics_are_containerds_message(agent: Agent) {
        use protobuf::Message;
        agent.run("a", &sleeper(&agent, None)).await.read_until("ready").await;
        let stats = agent.client.stats(context(), &container("a")).await.unwrap();
        let metrics = husk_protocol::metrics::Metrics::parse_from_bytes(&stats.cgroup_v2_metrics).unwrap();
        assert_ne!(metrics.cpu.usage_usec, 0);
        assert!(metrics.network.iter().any(|network| network.name == "lo"));
        agent.delete("a").await;
    }
}
