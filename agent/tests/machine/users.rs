//! A pod with users of its own.

use husk_protocol::agent::{
    CreateSandboxRequest, IdMapping, Interface, Network, RemoveDeviceRequest, Storage,
    TmpfsStorage, UpdateNetworkRequest,
};
use serde_json::{Value, json};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use crate::agent::{Agent, context, read_all, skip, unable};

/// Whom its root is.
const ROOT: u32 = 100_000;
const SIZE: u32 = 65_536;

const ADDRESS: [u8; 6] = [2, 0, 0, 0, 0, 7];
const LATE: [u8; 6] = [2, 0, 0, 0, 0, 8];

/// Its interface, and one that the machine gets later.
const PREPARE: &str = "ip link add eth0 address 02:00:00:00:00:07 type veth peer name p0; \
    ip link add late0 address 02:00:00:00:00:08 type veth peer name p1; \
    ip link set p0 up; ip link set p1 up";

fn interface(name: &str, hardware_address: [u8; 6], address: &str) -> Interface {
    Interface {
        name: name.to_owned(),
        hardware_address: hardware_address.to_vec(),
        addresses: vec![address.to_owned()],
        ..Default::default()
    }
}

async fn agent_with_users() -> Option<Agent> {
    if let Some(reason) = unable() {
        skip("users", &reason);
        return None;
    }
    let agent = Agent::start_with(PREPARE).await;
    let mapping = IdMapping {
        host_id: ROOT,
        size: SIZE,
        ..Default::default()
    };
    let network = Network {
        interfaces: vec![interface("eth0", ADDRESS, "10.1.0.5/24")],
        ..Default::default()
    };
    let sysctls = [
        ("kernel.shmmax", "123456"),
        ("fs.mqueue.msg_max", "20"),
        ("net.ipv4.conf.eth0.arp_filter", "1"),
    ];
    let sysctls = sysctls.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let mut shm = Storage {
        mount_point: "/run/husk/sandbox/shm".to_owned(),
        options: vec![format!("uid={ROOT}"), format!("gid={ROOT}")],
        ..Default::default()
    };
    shm.set_tmpfs(TmpfsStorage {
        mode: 0o1777,
        ..Default::default()
    });
    let request = CreateSandboxRequest {
        hostname: "pod".to_owned(),
        network: Some(network).into(),
        sysctls: sysctls.into(),
        storages: vec![shm],
        shared_pid_namespace: true,
        uid_mappings: vec![mapping.clone()],
        gid_mappings: vec![mapping],
        ..Default::default()
    };
    agent
        .client
        .create_sandbox(context(), &request)
        .await
        .unwrap();
    // As a snapshotter leaves it to mapped users.
    for name in ["", "tmp", "root"] {
        chown(agent.rootfs().join(name), Some(ROOT), Some(ROOT)).unwrap();
    }
    let open = PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(agent.directory.path(), open).unwrap();
    Some(agent)
}

/// As containerd writes it for a container of such a pod.
fn spec(agent: &Agent, line: &str) -> Value {
    let mut spec = agent.spec(&["/bin/sh", "-c", line]);
    let kinds = ["ipc", "uts", "network", "user"];
    let mut namespaces: Vec<Value> = kinds
        .iter()
        .map(|kind| json!({"type": kind, "path": format!("/proc/4711/ns/{kind}")}))
        .collect();
    namespaces.extend(["pid", "mount", "cgroup"].map(|kind| json!({"type": kind})));
    spec["linux"]["namespaces"] = namespaces.into();
    let map = json!([{"containerID": 0, "hostID": ROOT, "size": SIZE}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    let bind = json!({"destination": "/dev/shm", "type": "bind",
        "source": "/run/husk/sandbox/shm", "options": ["rbind"]});
    spec["mounts"][3] = bind;
    spec
}

fn shared_pids(mut spec: Value) -> Value {
    spec["linux"]["namespaces"][4]["path"] = "/proc/4711/ns/pid".into();
    spec
}

#[tokio::test]
async fn the_pods_namespaces_belong_to_its_users() {
    let Some(agent) = agent_with_users().await else {
        return;
    };
    let line = "id -u; hostname; cat /proc/sys/kernel/shmmax /proc/sys/fs/mqueue/msg_max \
        /proc/sys/net/ipv4/conf/eth0/arp_filter; ls /sys/class/net; stat -c %u:%a / /dev/shm; \
        nc -l -p 80 & sleep 1; nc 10.1.0.5 80 < /dev/null && echo served";
    let (code, stdout, stderr) = agent.output(&spec(&agent, line)).await;
    assert_eq!(
        stdout, "0\npod\n123456\n20\n1\neth0\nlo\n0:755\n0:1777\nserved\n",
        "{code} {stderr}"
    );
    // With the capability it may change its network, and no more than that.
    let line = "ip link set eth0 mtu 1300 && ip link show eth0 | grep -o 'mtu 1300'; \
        ip link add d0 type dummy; hostname other && hostname; \
        echo 1 > /proc/sys/kernel/panic || echo refused";
    let mut admin = spec(&agent, line);
    let capabilities = json!(["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
    for set in ["bounding", "effective", "permitted"] {
        admin["process"]["capabilities"][set] = capabilities.clone();
    }
    admin["linux"]["readonlyPaths"] = json!([]);
    let (_, stdout, stderr) = agent.output(&admin).await;
    assert_eq!(stdout, "mtu 1300\nother\nrefused\n", "{stderr}");
}

#[tokio::test]
async fn containers_are_in_one_user_namespace() {
    let Some(agent) = agent_with_users().await else {
        return;
    };
    let sleeper = spec(
        &agent,
        "touch /dev/shm/of-first; readlink /proc/self/ns/user; exec sleep 1000",
    );
    let mut first = agent.run("first", &sleeper).await;
    let namespace = first.read_until("]\n").await;
    let line = "readlink /proc/self/ns/user; stat -c %u /dev/shm/of-first";
    let (_, stdout, stderr) = agent.output(&spec(&agent, line)).await;
    assert_eq!(stdout, format!("{namespace}0\n"), "{stderr}");
    // On the machine they are somebody without rights.
    let owners = agent.children().into_iter().map(|pid| {
        let metadata = std::fs::metadata(format!("/proc/{pid}")).unwrap();
        (metadata.uid(), metadata.gid())
    });
    assert_eq!(owners.collect::<Vec<_>>(), [(ROOT, ROOT)]);
    let exec = json!({"user": {"uid": 7, "gid": 8}, "args": ["sh", "-c", "id -u; touch /tmp/by-exec"], "env": ["PATH=/bin"], "cwd": "/"});
    let by_root = json!({"user": {"uid": 0, "gid": 0}, "args": ["chmod", "777", "/tmp"], "env": ["PATH=/bin"], "cwd": "/"});
    read_all(agent.exec("first", "r", &by_root).await.unwrap().stdout).await;
    let streams = agent.exec("first", "e", &exec).await.unwrap();
    assert_eq!(read_all(streams.stdout).await, "7\n");
    let made = std::fs::metadata(agent.rootfs().join("tmp/by-exec")).unwrap();
    assert_eq!((made.uid(), made.gid()), (ROOT + 7, ROOT + 8));
    agent.delete("first").await;
    // Maps of its own.
    let mut other = spec(&agent, "cat /proc/self/uid_map | tr -s ' '");
    other["linux"]["uidMappings"][0]["hostID"] = json!(ROOT + 1);
    // And message queues; this machine may have none to show.
    other["linux"]["namespaces"][0] = json!({"type": "ipc"});
    let (_, stdout, stderr) = agent.output(&other).await;
    assert_eq!(stdout, format!(" 0 {} {SIZE}\n", ROOT + 1), "{stderr}");
    let error = agent.create("x", &shared_pids(other)).await.err().unwrap();
    assert!(crate::agent::status(error).1.contains("of its own"));
}

#[tokio::test]
async fn their_devices_are_those_of_the_numbers() {
    let Some(agent) = agent_with_users().await else {
        return;
    };
    let device = |path: &str, minor: u32| {
        let path = path.to_owned();
        json!({"path": path, "type": "c", "major": 1, "minor": minor})
    };
    // A path that the guest has not, and one that is another device there.
    let line = "stat -c %n=%t:%T /dev/mine /dev/fuse /dev/zero; stat -c %n=%a:%u /dev/p";
    let mut named = spec(&agent, line);
    let pipe = json!({"path": "/dev/p", "type": "p", "fileMode": 0o640, "uid": 7});
    named["linux"]["devices"] = json!([device("/dev/mine", 5), device("/dev/fuse", 7), pipe]);
    let (_, stdout, stderr) = agent.output(&named).await;
    let wanted = "/dev/mine=1:5\n/dev/fuse=1:7\n/dev/zero=1:5\n/dev/p=640:7\n";
    assert_eq!(stdout, wanted, "{stderr}");
    // Nothing else of the guest's comes in by such a path.
    named["linux"]["devices"] = json!([{"path": "/tmp", "type": "c", "major": 136, "minor": 4321}]);
    let error = agent.create("x", &named).await.err().unwrap();
    let (code, text) = crate::agent::status(error);
    assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT, "{text}");
    let said = "/tmp: the guest has no node of 136:4321";
    assert!(text.contains(said), "{text}");
}

#[tokio::test]
async fn they_may_share_their_processes() {
    let Some(agent) = agent_with_users().await else {
        return;
    };
    let first = shared_pids(spec(&agent, "echo ready; exec sleep 1234"));
    agent.run("first", &first).await.read_until("ready").await;
    let line = "ps -o args | grep -c '^sleep 1234$'; stat -c %u /proc/1; mount | grep -c ' /proc '";
    let (_, stdout, stderr) = agent.output(&shared_pids(spec(&agent, line))).await;
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines.first(), Some(&"1"), "{stdout}{stderr}");
    // Its first process is nobody's, whom the pod has too.
    assert_eq!(lines.last(), Some(&"1"), "{stdout}{stderr}");
    agent.delete("first").await;
}

#[tokio::test]
async fn interfaces_that_come_later_are_the_pods_too() {
    let Some(agent) = agent_with_users().await else {
        return;
    };
    let network = Network {
        interfaces: vec![interface("eth1", LATE, "10.2.0.5/24")],
        ..Default::default()
    };
    let request = UpdateNetworkRequest {
        network: Some(network).into(),
        ..Default::default()
    };
    let updated = agent.client.update_network(context(), &request).await;
    updated.unwrap();
    let line = "ls /sys/class/net; ip -4 addr show eth1 | grep -o 'inet [0-9./]*'";
    let (_, stdout, stderr) = agent.output(&spec(&agent, line)).await;
    assert_eq!(stdout, "eth0\neth1\nlo\ninet 10.2.0.5/24\n", "{stderr}");
    // It is found where it is now, though what stands for it here has no device.
    let mut request = RemoveDeviceRequest::default();
    request.set_hardware_address(LATE.to_vec());
    let refused = agent.client.remove_device(context(), &request).await;
    let (_, text) = crate::agent::status(refused.unwrap_err());
    assert!(text.starts_with("cannot find the device of eth1"), "{text}");
}
