use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::bundle::Limits;

const HOST: HostFacts = HostFacts {
    memory_mib: 8192,
    cpus: 8,
};

fn config(dir: &Path) -> Config {
    for name in ["vmm", "kernel", "initramfs", sums::FILE] {
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

fn largest(config: &Config, host: HostFacts) -> TemplateKey {
    TemplateKey::all_of_node(config, host).remove(0)
}

#[test]
fn its_key_is_what_it_was_made_from() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let key = largest(&config, HOST);
    assert_eq!(key, largest(&config, HOST));
    assert!((1..=husk_vmm_spec::ORIGIN_BYTES).contains(&key.origin().len()));

    let mut others = TemplateKey::all_of_node(&config, HOST);
    assert_ne!(others[0].origin, others[1].origin);
    let mut differs = |config: &Config, host| {
        for other in TemplateKey::all_of_node(config, host) {
            assert!(
                others
                    .iter()
                    .all(|key| key.origin != other.origin && key.dir != other.dir)
            );
            others.push(other);
        }
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
    assert_eq!(TemplateKey::all_of_node(&shell, HOST), []);
    std::fs::write(dir.path().join("debug.cpio"), "busybox").unwrap();
    differs(&shell, HOST);
    std::fs::write(dir.path().join("debug.cpio"), "another busybox").unwrap();
    differs(&shell, HOST);
    std::fs::write(&config.kernel, "another kernel").unwrap();
    differs(&config, HOST);
    std::fs::write(dir.path().join(sums::FILE), "other sums").unwrap();
    differs(&config, HOST);
    std::fs::remove_file(dir.path().join(sums::FILE)).unwrap();
    assert_eq!(TemplateKey::all_of_node(&config, HOST), []);
    std::fs::write(dir.path().join(sums::FILE), "").unwrap();
    differs(&config, HOST);
    std::fs::remove_file(&config.initramfs).unwrap();
    assert_eq!(TemplateKey::all_of_node(&config, HOST), []);
    let off = Config {
        template_max_age_seconds: 0,
        ..config
    };
    assert_eq!(TemplateKey::all_of_node(&off, HOST), []);
}

#[test]
fn only_what_nobody_else_writes_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let key = largest(&config(dir.path()), HOST);
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
    let key = largest(&config(dir.path()), HOST);
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
    let name = key.name();
    let wanted = [DISCARDED, FAILED].map(|extension| format!("{name}.{extension}"));
    assert_eq!(left, wanted);
}

#[test]
fn a_refusal_is_no_proof() {
    let dir = tempfile::tempdir().unwrap();
    let key = largest(&config(dir.path()), HOST);
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
    let key = largest(&config(dir.path()), HOST);
    let name = key.dir.file_name().unwrap().to_str().unwrap();
    assert_eq!(key_of(name), Some((name, "")));
    for extension in ["new", "77"] {
        let ours = format!("{name}.{extension}");
        assert_eq!(key_of(&ours), Some((name, extension)), "{ours}");
    }
    for other in [
        "",
        "lock",
        "husk",
        "systemd",
        &name[1..],
        &format!("{name}0"),
    ] {
        assert_eq!(key_of(other), None, "{other}");
    }
}

#[test]
fn a_failure_is_not_tried_again_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let key = largest(&config, HOST);
    assert!(key.is_worth_making());
    std::fs::create_dir(&config.template_dir).unwrap();
    let failed = File::create(key.dir.with_extension(FAILED)).unwrap();
    // The other is another matter.
    assert!(TemplateKey::all_of_node(&config, HOST)[1].is_worth_making());
    assert!(!key.is_worth_making());
    let before = std::time::SystemTime::now() - AFTER_FAILURE - Duration::from_secs(1);
    failed.set_modified(before).unwrap();
    assert!(key.is_worth_making());
}

#[test]
fn pods_that_fit_begin_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let keys = TemplateKey::all_of_node(&config(dir.path()), HOST);
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
        let room = vm_plan::room(pod, size, HOST);
        let mut shapes = keys.iter().filter_map(|key| key.shape(pod, size, room));
        let shape = shapes.next()?;
        let Shape { size, room } = shape;
        Some((size.memory_mib, room.vcpus, room.pluggable_mib))
    };
    // 512 MiB, and for a pod room for four times as much.
    assert_eq!(shape(&pod(None, None, false)), Some((512, 4, 0)));
    assert_eq!(shape(&pod(None, None, true)), Some((512, 4, 2048)));
    // 612 MiB: 100 of them are plugged.
    assert_eq!(shape(&pod(Some(508), None, true)), Some((512, 4, 2560)));
    // 161 MiB: 33 of them are plugged.
    assert_eq!(shape(&pod(Some(64), None, true)), Some((128, 4, 768)));
    assert_eq!(shape(&pod(Some(64), None, false)), None, "nobody counts it");
    for too_large in [pod(Some(4096), None, true), pod(None, Some(4500), true)] {
        assert_eq!(shape(&too_large), None);
    }
    assert_eq!(
        shape(&pod(Some(1), None, true)),
        None,
        "less than the smallest has"
    );
}
