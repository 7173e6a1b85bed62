use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::bundle::Limits;

const HOST: HostFacts = HostFacts {
    memory_mib: 8192,
    cpus: 8,
};

fn config(dir: &Path) -> Config {
    for name in ["vmm", "kernel", "initramfs"] {
        std::fs::write(dir.join(name), name).unwrap();
    }
    Config {
        vmm: dir.join("vmm"),
        kernel: dir.join("kernel"),
        initramfs: dir.join("initramfs"),
        template_dir: dir.join("templates"),
        template_max_age_seconds: 60,
        ..Config::default()
    }
}

#[test]
fn its_key_is_what_it_was_made_from() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let key = TemplateKey::of_node(&config, HOST).unwrap();
    assert_eq!(Some(&key), TemplateKey::of_node(&config, HOST).as_ref());
    assert!((1..=husk_vmm_spec::ORIGIN_BYTES).contains(&key.origin().len()));

    let mut others = vec![key];
    let mut differs = |config: &Config, host| {
        let other = TemplateKey::of_node(config, host).unwrap();
        assert!(
            others
                .iter()
                .all(|key| key.origin != other.origin && key.dir != other.dir)
        );
        others.push(other);
    };
    differs(&config, HostFacts { cpus: 2, ..HOST });
    let parameters = Config {
        kernel_parameters: "x".into(),
        ..config.clone()
    };
    differs(&parameters, HOST);
    // A copy has a debug shell where its pod may have one, and nowhere else.
    let shell = Config {
        debug_shell: true,
        ..config.clone()
    };
    assert_eq!(TemplateKey::of_node(&shell, HOST), None);
    std::fs::write(dir.path().join("debug.cpio"), "busybox").unwrap();
    differs(&shell, HOST);
    std::fs::write(dir.path().join("debug.cpio"), "another busybox").unwrap();
    differs(&shell, HOST);
    std::fs::write(&config.kernel, "another kernel").unwrap();
    differs(&config, HOST);
    std::fs::remove_file(&config.initramfs).unwrap();
    assert_eq!(TemplateKey::of_node(&config, HOST), None);
    let off = Config {
        template_max_age_seconds: 0,
        ..config
    };
    assert_eq!(TemplateKey::of_node(&off, HOST), None);
}

#[test]
fn only_what_nobody_else_writes_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let key = TemplateKey::of_node(&config(dir.path()), HOST).unwrap();
    assert!(key.open().is_none());
    std::fs::create_dir_all(&key.dir).unwrap();
    std::fs::write(key.dir.join("state"), "state").unwrap();
    assert!(key.open().is_none(), "half of one");
    std::fs::write(key.dir.join("memory"), "memory").unwrap();
    assert!(key.open().is_some());

    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(&key.dir.join("memory"), 0o620);
    assert!(key.open().is_none());
    mode(&key.dir.join("memory"), 0o400);
    mode(&key.dir, 0o777);
    assert!(key.open().is_none());
    mode(&key.dir, 0o700);
    assert!(key.open().is_some());

    let state = File::options()
        .write(true)
        .open(key.dir.join("state"))
        .unwrap();
    let old = std::time::SystemTime::now() - key.max_age - Duration::from_secs(60);
    state.set_modified(old).unwrap();
    assert!(key.open().is_none(), "too old");
    let young = std::time::SystemTime::now();
    state.set_modified(young).unwrap();
    assert!(key.open().is_some());

    // Whoever can write beside it can put another in its place.
    assert!(key.is_worth_making());
    mode(key.beside(), 0o1777);
    assert!(key.open().is_none() && !key.is_worth_making());
    mode(key.beside(), 0o755);
    assert!(key.open().is_some());
    let elsewhere = key.beside().join("elsewhere");
    fs::rename(&key.dir, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &key.dir).unwrap();
    assert!(key.open().is_none(), "a link");
}

#[test]
fn what_is_of_no_use_is_made_again_once() {
    let dir = tempfile::tempdir().unwrap();
    let key = TemplateKey::of_node(&config(dir.path()), HOST).unwrap();
    let make = || fs::create_dir_all(key.dir.join("state")).unwrap();
    make();
    // Those of a burst fail together: that is once.
    key.discard();
    key.discard();
    assert!(!key.dir.exists());
    assert!(key.is_worth_making());
    make();
    key.discard();
    assert!(!key.dir.exists());
    assert!(!key.is_worth_making());
    let mut left: Vec<_> = fs::read_dir(key.beside())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, [DISCARDED_FILE, FAILED_FILE]);
}

#[test]
fn a_refusal_is_no_proof() {
    let dir = tempfile::tempdir().unwrap();
    let key = TemplateKey::of_node(&config(dir.path()), HOST).unwrap();
    fs::create_dir_all(&key.dir).unwrap();
    for _ in 0..3 {
        key.doubt();
        key.proved();
    }
    key.doubt();
    assert!(key.dir.exists());
    key.doubt();
    assert!(!key.dir.exists());
    // The next begins anew.
    fs::create_dir_all(&key.dir).unwrap();
    key.doubt();
    assert!(key.dir.exists());
}

#[test]
fn names_that_are_not_ours_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let key = TemplateKey::of_node(&config(dir.path()), HOST).unwrap();
    let name = key.dir.file_name().unwrap().to_str().unwrap();
    for ours in [name, &format!("{name}.new"), &format!("{name}.77")] {
        assert!(is_ours(ours), "{ours}");
    }
    assert!(is_ours(FAILED_FILE) && is_ours(DISCARDED_FILE));
    for other in [
        "",
        "lock",
        "husk",
        "systemd",
        &name[1..],
        &format!("{name}0"),
    ] {
        assert!(!is_ours(other), "{other}");
    }
}

#[test]
fn a_failure_is_not_tried_again_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let key = TemplateKey::of_node(&config, HOST).unwrap();
    assert!(key.is_worth_making());
    std::fs::create_dir(&config.template_dir).unwrap();
    let failed = File::create(config.template_dir.join(FAILED_FILE)).unwrap();
    assert!(!key.is_worth_making());
    let before = std::time::SystemTime::now() - AFTER_FAILURE - Duration::from_secs(1);
    failed.set_modified(before).unwrap();
    assert!(key.is_worth_making());
}

#[test]
fn pods_that_fit_begin_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let key = TemplateKey::of_node(&config(dir.path()), HOST).unwrap();
    let pod = |memory_mib: Option<u64>, cpu_millis, is_pod| PodSpec {
        limits: Limits {
            memory_bytes: memory_mib.map(|mib| mib << 20),
            cpu_millis,
            huge_page_bytes: 0,
        },
        limits_are_a_sum: is_pod,
        ..PodSpec::default()
    };
    let shape = |pod: &PodSpec| {
        let size = vm_plan::size(pod, HOST).unwrap();
        key.shape(pod, size, vm_plan::room(pod, size, HOST))
            .map(|shape| (shape.size, shape.room.vcpus, shape.room.pluggable_mib))
    };
    // 512 MiB, and for a pod room for four times as much.
    assert_eq!(shape(&pod(None, None, false)), Some((SIZE, 4, 384)));
    assert_eq!(shape(&pod(None, None, true)), Some((SIZE, 4, 384 + 2048)));
    // 161 MiB: 33 of them are plugged.
    assert_eq!(shape(&pod(Some(64), None, true)), Some((SIZE, 4, 768)));
    assert_eq!(shape(&pod(Some(64), None, false)), None, "nobody counts it");
    for too_large in [pod(Some(4096), None, true), pod(None, Some(4500), true)] {
        assert_eq!(shape(&too_large), None);
    }
    assert_eq!(
        shape(&pod(Some(1), None, true)),
        None,
        "less than the template has"
    );
}
