//! Volumes of pods, laid out as the kubelet does.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};

use super::{Bench, Case, case};
use crate::block::NodeMount;
use crate::cri::Cri;
use crate::cri::api::{Device, Int64Value, Mount, MountPropagation};
use crate::pod::Pod;
use crate::process::eventually;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("volume/memory", 40, memory),
    case("volume/swapped-files", 40, swapped_files),
    case("volume/watched-files", 60, watched_files),
    case("volume/sub-paths", 40, sub_paths),
    case("volume/swapped-sub-path", 60, swapped_sub_path),
    case("volume/many-entries", 40, many_entries),
    case("volume/propagation", 40, propagation),
    case("volume/propagation-back", 40, propagation_back),
    case("volume/groups", 40, groups),
    case("volume/shared-by-containers", 60, shared_by_containers),
];

/// A volume of a CRI container.
pub fn mount(from: &Path, to: &str) -> Mount {
    Mount {
        container_path: to.into(),
        host_path: from.display().to_string(),
        ..Default::default()
    }
}

fn read_only(from: &Path, to: &str) -> Mount {
    Mount {
        readonly: true,
        ..mount(from, to)
    }
}

/// A container that sleeps, with volumes and devices.
pub fn sleeper(cri: &Cri, pod: &Pod, mounts: &[Mount], devices: &[Device]) -> Result<String> {
    let mut config = pod.container(&["sleep", "1000"]);
    config.mounts = mounts.to_vec();
    config.devices = devices.to_vec();
    pod.start_config(cri, &config)
}

/// What a shell in the container prints.
pub fn shell(cri: &Cri, container: &str, script: &str) -> Result<String> {
    cri.exec_sync(container, &["sh", "-c", script], 60)?
        .ok()
        .with_context(|| script.to_owned())
}

/// An emptyDir in memory: its size holds, and its containers share it.
fn memory(bench: &Bench) -> Result<()> {
    let place = bench.folder().join("memory");
    let mounted = NodeMount::new("tmpfs", "tmpfs", "size=8m,mode=1777", &place)?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let cache = [mount(&place, "/cache")];
    let first = sleeper(&cri, &pod, &cache, &[])?;
    let second = sleeper(&cri, &pod, &cache, &[])?;
    let seen = shell(
        &cri,
        &first,
        "df -k /cache | tail -n 1 | awk '{ print $2 }'",
    )?;
    ensure!(seen == "8192", "{seen:?} KiB");
    let fill =
        "dd if=/dev/zero of=/cache/big bs=1M count=16 2>&1; wc -c < /cache/big; rm /cache/big";
    let seen = shell(&cri, &first, fill)?;
    ensure!(
        seen.contains("No space left on device") && seen.ends_with("\n8388608"),
        "{seen:?}"
    );
    shell(&cri, &first, "echo small > /cache/file")?;
    let seen = shell(&cri, &second, "cat /cache/file")?;
    ensure!(seen == "small", "{seen:?}");
    ensure!(fs::read_to_string(place.join("file"))? == "small\n");
    pod.remove(&cri)?;
    drop(mounted);
    Ok(())
}

/// Writes a version of a volume's files as the kubelet does.
fn swap(place: &Path, version: &str, entries: &[(&str, &str)]) -> Result<()> {
    let dir = place.join(version);
    fs::create_dir_all(&dir)?;
    for (name, text) in entries {
        fs::write(dir.join(name), text)?;
    }
    symlink(version, place.join("..data_tmp"))?;
    fs::rename(place.join("..data_tmp"), place.join("..data"))?;
    Ok(())
}

/// Who watches a ConfigMap hears of a change (inotify), and reads it then.
fn watched_files(bench: &Bench) -> Result<()> {
    let place = "pods/u/volumes/kubernetes.io~configmap/settings";
    let place = bench.folder().join(place);
    swap(&place, "..1", &[("key", "one")])?;
    symlink("..data/key", place.join("key"))?;
    fs::set_permissions(place.join("..1/key"), fs::Permissions::from_mode(0o640))?;
    chown(place.join("..1/key"), None, Some(4321))?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let mut config = pod.container(&["probe", "watch", "/settings"]);
    config.mounts = vec![read_only(&place, "/settings")];
    let watcher = pod.start_config(&cri, &config)?;
    pod.await_log(&cri, &watcher, "watching")?;
    let seen = shell(
        &cri,
        &watcher,
        "cat /settings/key; stat -L -c ' %a %g' /settings/key",
    )?;
    ensure!(seen == "one 640 4321", "{seen:?}");

    swap(&place, "..2", &[("key", "two")])?;
    fs::remove_dir_all(place.join("..1"))?;
    pod.await_log(&cri, &watcher, "came ..data")?;
    let seen = shell(&cri, &watcher, "cat /settings/key; ls -A /settings")?;
    ensure!(seen == "two..2\n..data\nkey", "{seen:?}");
    let other = sleeper(&cri, &pod, &[read_only(&place, "/settings")], &[])?;
    let seen = shell(
        &cri,
        &other,
        "cat /settings/key; echo x > /settings/key || echo refused",
    )?;
    ensure!(seen == "tworefused", "{seen:?}");
    cri.stop(&watcher, 0)?;
    cri.remove(&watcher)?;
    swap(&place, "..3", &[("key", "three")])?;
    eventually("the other still follows", bench.seconds(5), || {
        Ok((shell(&cri, &other, "cat /settings/key")? == "three").then_some(()))
    })?;
    pod.remove(&cri)
}

/// A ConfigMap's files, and their update: a new directory takes the place of
/// the old one in one step.
fn swapped_files(bench: &Bench) -> Result<()> {
    let place = bench.folder().join("settings");
    swap(&place, "..1", &[("key", "one"), ("gone", "one")])?;
    for name in ["key", "gone"] {
        symlink(format!("..data/{name}"), place.join(name))?;
    }
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let mounts = [
        read_only(&place, "/settings"),
        // A subPath is what it was at the start.
        read_only(&place.join("..1/key"), "/etc/key"),
    ];
    let container = sleeper(&cri, &pod, &mounts, &[])?;
    let seen = shell(
        &cri,
        &container,
        "cat /settings/key /settings/gone /etc/key",
    )?;
    ensure!(seen == "oneoneone", "{seen:?}");
    // A program that keeps it open goes on reading what it has.
    let script = "exec 3< /settings/key; echo open; \
                  while ! grep -q two /settings/key; do sleep 0.1; done; cat <&3";
    let holder = {
        let mut config = pod.container(&["sh", "-c", script]);
        config.mounts = mounts.to_vec();
        pod.start_config(&cri, &config)?
    };
    pod.await_log(&cri, &holder, "open")?;

    swap(&place, "..2", &[("key", "two"), ("new", "two")])?;
    symlink("..data/new", place.join("new"))?;
    fs::remove_file(place.join("gone"))?;
    fs::remove_dir_all(place.join("..1"))?;
    eventually("the update is seen", bench.seconds(5), || {
        let seen = cri.exec_sync(&container, &["cat", "/settings/key", "/settings/new"], 10)?;
        Ok((seen.stdout == "twotwo").then_some(()))
    })?;
    eventually("the old name is gone", bench.seconds(5), || {
        let seen = cri.exec_sync(&container, &["ls", "/settings"], 10)?.ok()?;
        Ok((seen == "key\nnew").then_some(()))
    })?;
    let seen = shell(&cri, &container, "cat /etc/key")?;
    ensure!(seen == "one", "the subPath reads {seen:?}");
    let refused = cri.exec_sync(&container, &["touch", "/settings/mine"], 10)?;
    ensure!(refused.stderr.contains("Read-only"), "{refused:?}");
    let status = pod.await_exit(&cri, &holder)?;
    let log = pod.await_log(&cri, &holder, "one")?;
    ensure!(status.exit_code == 0, "{status:?} {log}");
    pod.remove(&cri)
}

/// Parts of one volume, inside each other, each with its own rights.
fn sub_paths(bench: &Bench) -> Result<()> {
    let volume = bench.folder().join("volume");
    for folder in ["web/static", "db", "logs/pod-1"] {
        fs::create_dir_all(volume.join(folder))?;
    }
    fs::write(volume.join("web/page"), "page\n")?;
    fs::write(volume.join("web/static/style"), "style\n")?;
    fs::write(volume.join("one-file"), "alone\n")?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = sleeper(
        &cri,
        &pod,
        &[
            read_only(&volume.join("web"), "/srv"),
            mount(&volume.join("db"), "/srv/static"),
            mount(&volume.join("one-file"), "/etc/app/settings"),
            // subPathExpr, expanded.
            mount(&volume.join("logs/pod-1"), "/var/log/app"),
        ],
        &[],
    )?;
    let script = "cat /srv/page; ls -A /srv/static | wc -l; echo row > /srv/static/table; \
                  cat /etc/app/settings; echo more >> /etc/app/settings; echo line > /var/log/app/log; \
                  touch /srv/mine 2>&1; ls /srv";
    let seen = shell(&cri, &container, script)?;
    let seen: Vec<&str> = seen.lines().collect();
    ensure!(
        seen.len() == 6
            && seen[..3] == ["page", "0", "alone"]
            && seen[3].contains("Read-only file system")
            && seen[4..] == ["page", "static"],
        "{seen:?}"
    );
    for (file, text) in [
        ("db/table", "row\n"),
        ("one-file", "alone\nmore\n"),
        ("logs/pod-1/log", "line\n"),
    ] {
        let found = fs::read_to_string(volume.join(file))?;
        ensure!(found == text, "{file}: {found:?}");
    }
    ensure!(!volume.join("web/mine").exists() && volume.join("web/static/style").exists());
    pod.remove(&cri)
}

/// A subPath as the kubelet prepares it, a mount of what it has looked at, while
/// somebody who can write to the volume puts a link to the node's files in its place.
fn swapped_sub_path(bench: &Bench) -> Result<()> {
    const TRIES: usize = 5;
    let volume = bench.folder().join("volume");
    let secret = bench.folder().join("secret");
    for (folder, text) in [(volume.join("sub"), "mine"), (secret.clone(), "the node's")] {
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("file"), text)?;
    }
    let sub = volume.join("sub");
    let prepared = bench.folder().join("volume-subpaths/volume/c/0");
    let source = sub.display().to_string();
    let mounted = NodeMount::new("none", &source, "bind", &prepared)?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let is_over = AtomicBool::new(false);
    let (aside, link) = (volume.join("aside"), volume.join("link"));
    let seen = std::thread::scope(|scope| {
        let swapping = scope.spawn(|| -> Result<usize> {
            let mut times = 0;
            while !is_over.load(Ordering::Relaxed) {
                symlink(&secret, &link)?;
                fs::rename(&sub, &aside)?;
                fs::rename(&link, &sub)?;
                std::thread::yield_now();
                fs::remove_file(&sub)?;
                fs::rename(&aside, &sub)?;
                times += 1;
            }
            Ok(times)
        });
        let tried = (0..TRIES).map(|_| {
            let container = sleeper(&cri, &pod, &[mount(&prepared, "/sub")], &[])?;
            let seen = shell(&cri, &container, "cat /sub/file; ls /sub");
            cri.stop(&container, 0)?;
            cri.remove(&container)?;
            seen
        });
        let seen = tried.collect::<Result<Vec<_>>>();
        is_over.store(true, Ordering::Relaxed);
        let times = swapping.join();
        let times = times.map_err(|_| anyhow::anyhow!("the swapping thread panicked"))??;
        ensure!(times > TRIES, "swapped only {times} times");
        seen
    })?;
    ensure!(seen.iter().all(|seen| seen == "minefile"), "{seen:?}");
    pod.remove(&cri)?;
    drop(mounted);
    Ok(())
}

/// Any number, any name, any size.
fn many_entries(bench: &Bench) -> Result<()> {
    const ENTRIES: usize = 2000;
    let place = bench.folder().join("settings");
    fs::create_dir_all(&place)?;
    for number in 0..ENTRIES {
        fs::write(place.join(format!("entry-{number}")), number.to_string())?;
    }
    fs::write(place.join("\u{e4} name with spaces"), "named")?;
    fs::write(place.join("large"), vec![b'x'; 4 << 20])?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = sleeper(&cri, &pod, &[read_only(&place, "/settings")], &[])?;
    let script = "cd /settings; probe count .; cat entry-0 entry-1999; echo; cat *spaces; echo; wc -c < large; \
                  cat entry-* | md5sum | cut -c -32";
    let seen = shell(&cri, &container, script)?;
    let lines: Vec<&str> = seen.lines().collect();
    let expected = ["2002", "01999", "named", "4194304"];
    ensure!(
        lines.len() == 5 && lines[..4] == expected,
        "{seen:?}, expected {expected:?}"
    );
    // All of them, in a shell's order, which is that of their bytes.
    let mut names: Vec<String> = (0..ENTRIES)
        .map(|number| format!("entry-{number}"))
        .collect();
    names.sort();
    let list = bench.folder().join("all");
    let texts = names.iter().map(|name| name.trim_start_matches("entry-"));
    fs::write(&list, texts.collect::<String>())?;
    let mut command = std::process::Command::new("md5sum");
    let sum = crate::process::run(command.arg(&list), bench.seconds(10))?
        .ok()?
        .out();
    ensure!(sum.starts_with(lines[4]), "{}, expected {sum}", lines[4]);
    pod.remove(&cri)
}

/// What the node mounts below a volume later is seen if that was asked for.
fn propagation(bench: &Bench) -> Result<()> {
    let volume = bench.folder().join("volume");
    fs::create_dir_all(volume.join("early"))?;
    let early = NodeMount::new("tmpfs", "tmpfs", "size=1m", &volume.join("early"))?;
    fs::write(volume.join("early/file"), "early\n")?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let with = |propagation: MountPropagation| {
        let mut volume = mount(&volume, "/volume");
        volume.propagation = propagation.into();
        sleeper(&cri, &pod, &[volume], &[])
    };
    let follows = with(MountPropagation::PropagationHostToContainer)?;
    let stays = with(MountPropagation::PropagationPrivate)?;
    for container in [&follows, &stays] {
        let seen = shell(&cri, container, "cat /volume/early/file")?;
        ensure!(seen == "early", "{seen:?}");
    }
    let late = NodeMount::new("tmpfs", "tmpfs", "size=1m", &volume.join("late"))?;
    fs::write(volume.join("late/file"), "late\n")?;
    eventually("the later mount is seen", bench.seconds(5), || {
        let seen = cri.exec_sync(&follows, &["cat", "/volume/late/file"], 10)?;
        Ok((seen.stdout == "late\n").then_some(()))
    })?;
    let seen = shell(&cri, &stays, "ls -A /volume/late | wc -l")?;
    ensure!(seen == "0", "a private mount followed: {seen:?}");
    pod.remove(&cri)?;
    drop((late, early));
    Ok(())
}

/// What a container mounts in a volume is seen by the pod's others, if both ask
/// for it.
fn propagation_back(bench: &Bench) -> Result<()> {
    let volume = bench.folder().join("volume");
    fs::create_dir_all(volume.join("made"))?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
    })?;
    let with = |propagation: MountPropagation, privileged: bool| {
        let mut volume = mount(&volume, "/volume");
        volume.propagation = propagation.into();
        let mut config = pod.container(&["sleep", "1000"]);
        config.mounts = vec![volume];
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = privileged;
        pod.start_config(&cri, &config)
    };
    let follows = with(MountPropagation::PropagationHostToContainer, false)?;
    let makes = with(MountPropagation::PropagationBidirectional, true)?;
    let script = "mount -t tmpfs none /volume/made && echo mounted > /volume/made/file";
    shell(&cri, &makes, script)?;
    eventually("the mount is seen", bench.seconds(5), || {
        let seen = cri.exec_sync(&follows, &["cat", "/volume/made/file"], 10)?;
        Ok((seen.stdout == "mounted\n").then_some(()))
    })?;
    shell(&cri, &makes, "umount /volume/made")?;
    let seen = shell(&cri, &follows, "ls -A /volume/made | wc -l")?;
    ensure!(seen == "0", "it is still mounted: {seen:?}");
    pod.remove(&cri)
}

/// fsGroup as the kubelet prepares it: the group owns the volume, and what is
/// made there is the group's.
fn groups(bench: &Bench) -> Result<()> {
    const GROUP: u32 = 4321;
    let volume = bench.folder().join("volume");
    fs::create_dir_all(&volume)?;
    chown(&volume, None, Some(GROUP))?;
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o2770))?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let as_user = |groups: &[i64]| {
        let mut config = pod.container(&["sleep", "1000"]);
        config.mounts = vec![mount(&volume, "/volume")];
        let linux = config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        context.run_as_user = Some(Int64Value { value: 1000 });
        context.run_as_group = Some(Int64Value { value: 1000 });
        context.supplemental_groups = groups.to_vec();
        pod.start_config(&cri, &config)
    };
    let member = as_user(&[GROUP.into()])?;
    let script = "umask 002; mkdir /volume/folder && echo text > /volume/folder/file && \
                  stat -c '%u %g %a' /volume/folder /volume/folder/file; cat /volume/folder/file";
    let seen = shell(&cri, &member, script)?;
    ensure!(seen == "1000 4321 2775\n1000 4321 664\ntext", "{seen:?}");
    let other = as_user(&[])?;
    let refused = cri.exec_sync(&other, &["ls", "/volume"], 10)?;
    ensure!(refused.stderr.contains("Permission denied"), "{refused:?}");
    pod.remove(&cri)
}

/// Sockets, fifos, locks and memory of files meet between a pod's containers.
fn shared_by_containers(bench: &Bench) -> Result<()> {
    let volume = bench.folder().join("volume");
    fs::create_dir_all(&volume)?;
    fs::write(volume.join("lock"), "")?;
    fs::write(volume.join("page"), [b'.'; 4096])?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let run = |command: &[&str]| {
        let mut config = pod.container(command);
        config.mounts = vec![mount(&volume, "/volume")];
        pod.start_config(&cri, &config)
    };
    let other = run(&["sleep", "1000"])?;
    let server = run(&["probe", "listen", "/volume/socket"])?;
    pod.await_log(&cri, &server, "listening")?;
    let seen = shell(&cri, &other, "probe ask /volume/socket 'over a socket'")?;
    ensure!(seen == "OVER A SOCKET", "{seen:?}");

    let holder = run(&["probe", "hold", "/volume/lock"])?;
    pod.await_log(&cri, &holder, "locked")?;
    let seen = shell(&cri, &other, "probe try-lock /volume/lock")?;
    ensure!(seen == "held", "a lock is {seen:?}");
    cri.stop(&holder, 0)?;
    eventually("the lock of the dead is free", bench.seconds(5), || {
        Ok((shell(&cri, &other, "probe try-lock /volume/lock")? == "free").then_some(()))
    })?;

    let mapper = run(&["probe", "map", "/volume/page"])?;
    pod.await_log(&cri, &mapper, "first byte .")?;
    shell(&cri, &other, "probe poke /volume/page X")?;
    pod.await_log(&cri, &mapper, "first byte X")?;

    let reader = run(&[
        "sh",
        "-c",
        "mkfifo /volume/fifo; echo made; cat /volume/fifo",
    ])?;
    pod.await_log(&cri, &reader, "made")?;
    shell(&cri, &other, "echo 'through a fifo' > /volume/fifo")?;
    pod.await_log(&cri, &reader, "through a fifo")?;
    pod.remove(&cri)
}
