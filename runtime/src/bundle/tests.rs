use super::*;

fn bundle(json: Value) -> Bundle {
    Bundle::parse(Path::new("/bundle"), json.to_string().as_bytes()).unwrap()
}

fn single(linux: Value) -> Bundle {
    bundle(json!({"root": {"path": "rootfs"}, "linux": linux}))
}

#[test]
fn reads_a_plain_container() {
    let bundle = single(json!({
        "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}],
        "cgroupsPath": "/default/t1",
        "resources": {"memory": {"limit": 67_108_864}, "cpu": {"quota": 150_000, "period": 100_000},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 32 << 20}, {"pageSize": "1GB", "limit": u64::MAX}]},
    }));
    assert_eq!(bundle.role().unwrap(), Role::Single);
    assert_eq!(bundle.root().unwrap(), Path::new("/bundle/rootfs"));
    let pod = bundle.pod_spec(&Role::Single).unwrap();
    assert_eq!(pod.netns.as_deref(), Some(Path::new("/run/netns/x")));
    assert_eq!(pod.cgroups_path.as_deref(), Some("/default/t1"));
    assert_eq!(
        pod.limits,
        Limits {
            memory_bytes: Some(64 << 20),
            cpu_millis: Some(1500),
            huge_page_bytes: 32 << 20,
        }
    );
}

#[test]
fn knows_a_namespace_without_path_from_none() {
    let own = single(json!({"namespaces": [{"type": "network"}]}));
    assert_eq!(own.pod_spec(&Role::Single).unwrap().netns, None);
    let host = single(json!({"namespaces": [{"type": "pid"}]}));
    assert!(matches!(
        host.pod_spec(&Role::Single),
        Err(BundleError::HostNetwork)
    ));
}

#[test]
fn reads_a_pod_of_kubernetes() {
    for (kind, sandbox) in [
        (
            "io.kubernetes.cri.container-type",
            "io.kubernetes.cri.sandbox-id",
        ),
        (
            "io.kubernetes.cri-o.ContainerType",
            "io.kubernetes.cri-o.SandboxID",
        ),
    ] {
        let pod = bundle(json!({"annotations": {kind: "sandbox", sandbox: "p"}}));
        assert_eq!(pod.role().unwrap(), Role::Sandbox);
        let member = bundle(json!({"annotations": {kind: "container", sandbox: "p"}}));
        let expected = Role::Member {
            sandbox: Id::new("sandbox", "p").unwrap(),
        };
        assert_eq!(member.role().unwrap(), expected);
        let lost = bundle(json!({"annotations": {kind: "container"}}));
        assert!(matches!(lost.role(), Err(BundleError::NoSandboxId(_))));
        let bad = bundle(json!({"annotations": {kind: "container", sandbox: "../p"}}));
        assert!(matches!(bad.role(), Err(BundleError::Id(_))));
    }
}

#[test]
fn sizes_a_pod_by_its_annotations() {
    let pod = bundle(json!({
        "annotations": {
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-id": "p",
            "io.kubernetes.cri.sandbox-memory": "134217728",
            "io.kubernetes.cri.sandbox-cpu-quota": "200000",
            "io.kubernetes.cri.sandbox-cpu-period": "100000",
            "io.husk.vm.vcpus": "4",
            "io.husk.vm.memory_mib": "1024",
            "io.husk.vm.disk_kib_per_second": "10240",
            "io.husk.vm.network_burst_frames": "5",
        },
        "linux": {"namespaces": [{"type": "network"}], "sysctl": {"a.b": "1"}},
    }));
    let spec = pod.pod_spec(&pod.role().unwrap()).unwrap();
    assert_eq!(spec.limits.memory_bytes, Some(128 << 20));
    assert_eq!(spec.limits.cpu_millis, Some(2000));
    assert_eq!(spec.overrides.vcpus, Some(4));
    assert_eq!(spec.overrides.memory_mib, Some(1024));
    assert_eq!(spec.overrides.rates.disk.kib_per_second, Some(10240));
    assert_eq!(spec.overrides.rates.network.burst_operations, Some(5));
    assert_eq!(spec.sysctls["a.b"], "1");
}

#[test]
fn names_a_wrong_annotation() {
    for (key, value) in [
        ("io.husk.vm.vcpu", "1"),
        ("io.husk.vm.vcpus", "0"),
        ("io.husk.vm.vcpus", "many"),
        ("io.husk.vm.memory_mib", "1"),
        ("io.husk.vm.memory_mib", "99999999"),
        ("io.husk.vm.disk_kib_per_second", "0"),
        ("io.husk.vm.network_kib_per_second", "4294967296"),
        ("io.husk.vm.disk_burst_requests", "-1"),
        // A key that is none of these.
        ("io.husk.vm.first_uid", "1"),
        // Neither is it a pod's to say who may look into it.
        ("io.husk.vm.debug_shell", "true"),
        ("io.husk.vm.kernel_parameters", "husk.debug_shell=1"),
        ("io.husk.disk_kib_per_second", "1"),
    ] {
        let bundle = bundle(json!({
            "annotations": {key: value},
            "linux": {"namespaces": [{"type": "network"}]},
        }));
        let error = bundle.pod_spec(&Role::Single).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
        assert!(bundle.container_limits().is_err());
    }
}

#[test]
fn refuses_impossible_memory() {
    for limit in [1, MEMORY_LIMIT_MIN - 1, -2, i64::MAX] {
        let bundle = single(json!({
            "namespaces": [{"type": "network"}],
            "resources": {"memory": {"limit": limit}},
        }));
        let error = bundle.pod_spec(&Role::Single).unwrap_err();
        assert!(matches!(error, BundleError::MemoryLimit(l) if l == limit));
    }
    for limit in [0, -1] {
        let limits = Limits::new(Some(limit), None, None);
        assert_eq!(limits.unwrap().memory_bytes, None);
    }
}

#[test]
fn names_whose_processes_a_container_shares() {
    let with = |path: &str| {
        let namespaces = json!([{"type": "ipc"}, {"type": "pid", "path": path}]);
        bundle(json!({"linux": {"namespaces": namespaces}}))
    };
    for path in [
        "",
        "/proc/self/ns/pid",
        "/proc/12/ns/net",
        "/proc/-1/ns/pid",
    ] {
        assert_eq!(with(path).joined_pid(), None, "{path}");
        assert_eq!(with(path).joined_pids().is_none(), path.is_empty());
    }
    let mut target = with("/proc/4711/ns/pid");
    assert_eq!(target.joined_pid(), Some(4711));
    target.join_processes_of("c1");
    assert_eq!(
        target.json["linux"]["namespaces"],
        json!([{"type": "ipc"}, {"type": "pid", "path": "/run/husk/containers/c1"}])
    );
}

#[test]
fn maps_the_owners_of_what_says_so() {
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let other = json!([{"containerID": 0, "hostID": 5, "size": 1}]);
    let linux = json!({
        "namespaces": [{"type": "network"}, {"type": "user", "path": "/proc/7/ns/user"}],
        "uidMappings": map, "gidMappings": map,
    });
    let bundle = bundle(json!({"linux": linux, "mounts": [
        {"destination": "/own", "source": "/a", "uidMappings": other, "gidMappings": other},
        {"destination": "/containers", "source": "/a", "options": ["rbind", "ridmap"]},
        {"destination": "/none", "source": "/a", "options": ["rbind"]},
    ]}));
    let maps = bundle.pod_spec(&Role::Single).unwrap().id_maps.unwrap();
    assert_eq!(maps.root(), Some((100_000, 100_000)));
    let mounts = bundle.mounts().iter();
    let roots = mounts.map(|mount| mount.id_maps()?.root());
    assert_eq!(
        roots.collect::<Vec<_>>(),
        [Some((5, 5)), Some((100_000, 100_000)), None]
    );
    let plain = single(json!({"namespaces": [{"type": "network"}], "uidMappings": map}));
    assert_eq!(plain.pod_spec(&Role::Single).unwrap().id_maps, None);
}

#[test]
fn takes_no_array_for_an_object() {
    let root = json!({"path": "rootfs"});
    for (spec, path) in [
        (json!(["1.0"]), "the spec"),
        (json!({"root": ["rootfs"]}), "/root"),
        (
            json!({"root": root, "mounts": [{"destination": "/a"}, ["/x", "bind", "/y"]]}),
            "/mounts/1",
        ),
        (json!({"linux": [[["pid", "/proc/7/ns/pid"]]]}), "/linux"),
        (
            json!({"linux": {"namespaces": [["pid", "/proc/7/ns/pid"]]}}),
            "/linux/namespaces/0",
        ),
        (
            json!({"linux": {"resources": {"devices": [[true]]}}}),
            "/linux/resources/devices/0",
        ),
    ] {
        let text = spec.to_string();
        let error = Bundle::parse(Path::new("/bundle"), text.as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), format!("{path} is an array"), "{text}");
    }
}

#[test]
fn gives_the_guest_its_own_paths() {
    let bundle = bundle(json!({
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/v", "type": "bind", "source": "/srv", "options": ["rbind", "ridmap"],
                "uidMappings": [], "gidMappings": []},
        ],
        "hooks": {"prestart": [{"path": "/bin/hook"}], "startContainer": [{"path": "/hook"}]},
        "surprise": {"kept": [1, 2]},
    }));
    let sources = BTreeMap::from([(1, "/guest/v".to_owned())]);
    let binds = [("/etc/hosts", "/guest/hosts".to_owned())];
    let guest: Value =
        serde_json::from_slice(&bundle.guest_spec("/guest/root", &sources, &binds)).unwrap();
    assert_eq!(
        guest["root"],
        json!({"path": "/guest/root", "readonly": true})
    );
    assert_eq!(guest["mounts"][0]["source"], "proc");
    assert_eq!(
        guest["mounts"][1],
        json!({"destination": "/v", "type": "bind", "source": "/guest/v", "options": ["rbind"]})
    );
    assert_eq!(guest["mounts"][2]["destination"], "/etc/hosts");
    assert_eq!(guest["mounts"][2]["source"], "/guest/hosts");
    assert_eq!(guest["surprise"], json!({"kept": [1, 2]}));
    assert_eq!(
        guest["hooks"],
        json!({"startContainer": [{"path": "/hook"}]})
    );
}
