//! Containers and pods with users of their own: root in them is somebody without
//! rights elsewhere.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{Bench, Case, Skip, case};
use crate::cri::Cri;
use crate::cri::api::{
    Capability, ContainerConfig, IdMapping, Int64Value, LinuxContainerSecurityContext, Mount,
    NamespaceMode, UserNamespace,
};
use crate::node::Runtime;
use crate::pod::Pod;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("run/user-namespace", 60, of_container),
    case("security/user-namespace", 80, of_pod),
];

/// Whom root is.
const ROOT: u32 = 100_000;
const SIZE: u32 = 65_536;

/// containerd 1.7 gives such containers a chowned copy of their image, and knows
/// of no maps of mounts.
fn is_old(cri: &Cri) -> Result<bool> {
    let version = cri.version()?.runtime_version;
    Ok(version.trim_start_matches('v').starts_with("1."))
}

/// A folder of the node where everybody may write.
fn open_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path)?;
    Ok(fs::set_permissions(path, Permissions::from_mode(0o777))?)
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let metadata = fs::metadata(path).with_context(|| path.display().to_string())?;
    Ok((metadata.uid(), metadata.gid()))
}

/// The container's root has to pass through every folder above its bundle, which
/// not every node lets it.
fn skip_where_runc_cannot(bench: &Bench) -> Result<()> {
    if bench.runtime == Runtime::Husk {
        return Ok(());
    }
    let map = format!("0:{ROOT}:{SIZE}");
    let flags = ["--uidmap", &map, "--gidmap", &map];
    let tried = bench.ctr.run(&flags, &bench.id(), &["true"])?;
    match tried.err().contains("remount-private") {
        true => Err(Skip("runc cannot reach its bundles from a user namespace here".into()).into()),
        false => Ok(()),
    }
}

fn of_container(bench: &Bench) -> Result<()> {
    let old = is_old(&bench.cri()?)?;
    skip_where_runc_cannot(bench)?;
    let folder = bench.folder().join("volume");
    open_folder(&folder)?;
    let map = format!("0:{ROOT}:{SIZE}");
    let bind = format!(
        "type=bind,src={},dst=/data,options=rbind:rw",
        folder.display()
    );
    let flags = ["--uidmap", &map, "--gidmap", &map, "--mount", &bind];
    let mut ways = vec![flags.to_vec()];
    if !old {
        // The snapshotter maps owners instead of changing them.
        ways.push([&flags[..], &["--remap-labels"]].concat());
    }
    let script = "id -u; tr -s ' ' < /proc/self/uid_map; stat -c %u:%g / /etc/motd; \
                  echo new > /etc/new && chown 1000:2000 /etc/new && stat -c %u:%g /etc/new; \
                  echo text > /data/file";
    let expected = format!("0\n 0 {ROOT} {SIZE}\n0:0\n0:0\n1000:2000\n");
    for flags in ways {
        let done = bench.ctr.run(&flags, &bench.id(), &["sh", "-c", script])?;
        ensure!(
            done.out().starts_with(&expected),
            "{flags:?}: expected {expected:?}: {}",
            done.tail()
        );
        let file = folder.join("file");
        let seen = owner(&file)?;
        ensure!(seen == (ROOT, ROOT), "{flags:?}: the node sees {seen:?}");
        fs::remove_file(&file)?;
    }
    Ok(())
}

fn users() -> UserNamespace {
    UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: mappings(),
        gids: mappings(),
    }
}

fn mappings() -> Vec<IdMapping> {
    vec![IdMapping {
        host_id: ROOT,
        container_id: 0,
        length: SIZE,
    }]
}

/// A container that sleeps, as the kubelet asks for one in such a pod.
fn sleeper(pod: &Pod, change: impl FnOnce(&mut LinuxContainerSecurityContext)) -> ContainerConfig {
    let mut config = pod.container(&["sleep", "1000"]);
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    let namespaces = context.namespace_options.get_or_insert_default();
    namespaces.userns_options = Some(users());
    change(context);
    config
}

/// What a shell in the container prints.
fn shell(cri: &Cri, container: &str, script: &str) -> Result<String> {
    cri.exec_sync(container, &["sh", "-c", script], 10)?
        .ok()
        .with_context(|| script.to_owned())
}

fn of_pod(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let old = is_old(&cri)?;
    skip_where_runc_cannot(bench)?;
    let [plain, mapped] = ["plain", "mapped"].map(|name| bench.folder().join(name));
    for folder in [&plain, &mapped] {
        open_folder(folder)?;
        let of_root = folder.join("of-root");
        fs::write(&of_root, "text\n")?;
        fs::set_permissions(&of_root, Permissions::from_mode(0o600))?;
    }
    let pod = Pod::run(bench, &cri, |config| {
        let linux = config.linux.get_or_insert_default();
        linux
            .sysctls
            .insert("net.ipv4.ip_forward".into(), "1".into());
        let context = linux.security_context.get_or_insert_default();
        let namespaces = context.namespace_options.get_or_insert_default();
        namespaces.userns_options = Some(users());
    })?;

    let mut config = sleeper(&pod, |context| {
        context.capabilities = Some(Capability {
            add_capabilities: vec!["NET_ADMIN".into()],
            ..Default::default()
        });
    });
    config.mounts.push(Mount {
        container_path: "/plain".into(),
        host_path: plain.display().to_string(),
        ..Default::default()
    });
    if !old {
        config.mounts.push(Mount {
            container_path: "/mapped".into(),
            host_path: mapped.display().to_string(),
            uid_mappings: mappings(),
            gid_mappings: mappings(),
            ..Default::default()
        });
    }
    let root = pod.start_config(&cri, &config)?;
    let script = "id -u; tr -s ' ' < /proc/self/uid_map; stat -c %u:%g / /etc/motd; \
                  echo new > /etc/new && chown 1000:2000 /etc/new && stat -c %u:%g /etc/new";
    let seen = shell(&cri, &root, script)?;
    let expected = format!("0\n 0 {ROOT} {SIZE}\n0:0\n0:0\n1000:2000");
    ensure!(seen == expected, "expected {expected:?}: {seen:?}");

    // The network is the pod's to change.
    let script =
        "ip link set lo mtu 1400 && cat /sys/class/net/lo/mtu /proc/sys/net/ipv4/ip_forward";
    let seen = shell(&cri, &root, script)?;
    ensure!(seen == "1400\n1", "{seen:?}");
    let address = cri.pod_status(&pod.id)?.network.context("no network")?.ip;
    let seen = shell(&cri, &root, "ip -4 address show eth0")?;
    ensure!(
        !address.is_empty() && seen.contains(&format!("inet {address}/")),
        "{address:?}: {seen}"
    );

    // On a volume that is as it is, root is somebody else.
    shell(&cri, &root, "echo text > /plain/by-root")?;
    let seen = owner(&plain.join("by-root"))?;
    ensure!(seen == (ROOT, ROOT), "the node sees {seen:?}");
    let refused = cri.exec_sync(&root, &["cat", "/plain/of-root"], 10)?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("Permission denied"),
        "{refused:?}"
    );
    // On one that is mapped they are the same, as on those that the node writes.
    if !old {
        let script = "cat /mapped/of-root; stat -c %u:%g /mapped/of-root /etc/hosts; \
                      echo new > /mapped/new && chown 7:8 /mapped/new";
        let seen = shell(&cri, &root, script)?;
        ensure!(seen == "text\n0:0\n0:0", "{seen:?}");
        let seen = owner(&mapped.join("new"))?;
        ensure!(seen == (7, 8), "the node sees {seen:?}");
    }

    // Another container has the same users.
    let mut config = sleeper(&pod, |context| {
        context.run_as_user = Some(Int64Value { value: 1000 });
        context.run_as_group = Some(Int64Value { value: 2000 });
    });
    config.mounts.push(Mount {
        container_path: "/plain".into(),
        host_path: plain.display().to_string(),
        ..Default::default()
    });
    let user = pod.start_config(&cri, &config)?;
    let namespace = "readlink /proc/self/ns/user";
    let (of_root, of_user) = (
        shell(&cri, &root, namespace)?,
        shell(&cri, &user, namespace)?,
    );
    ensure!(of_root == of_user, "{of_root} and {of_user}");
    shell(&cri, &user, "echo text > /plain/by-user")?;
    let seen = owner(&plain.join("by-user"))?;
    ensure!(seen == (ROOT + 1000, ROOT + 2000), "the node sees {seen:?}");
    pod.remove(&cri)
}
