//! Huge pages: of memory, and as a volume.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::json;

use super::resources::{MIB, limited};
use super::volume::{mount, shell};
use super::{Bench, Case, Skip, case};
use crate::block::NodeMount;
use crate::cri::api::{HugepageLimit, LinuxContainerResources};
use crate::oci;
use crate::pod::Pod;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("resources/huge-pages", 40, huge_pages),
    case("volume/huge-pages", 60, volume),
];

/// Huge pages of the node, which only those processes have that ask for them.
struct NodeHugePages(String);

impl NodeHugePages {
    const FILE: &str = "/proc/sys/vm/nr_overcommit_hugepages";

    fn allow(pages: u32) -> Result<Self> {
        let before = fs::read_to_string(Self::FILE)
            .map_err(|_| Skip("the node's kernel has no huge pages".into()))?;
        fs::write(Self::FILE, pages.to_string())?;
        Ok(Self(before))
    }
}

impl Drop for NodeHugePages {
    fn drop(&mut self) {
        // The next case that wants them sets them.
        let _ = fs::write(Self::FILE, self.0.trim());
    }
}

/// Huge pages up to the limit, none beyond.
fn huge_pages(bench: &Bench) -> Result<()> {
    let _allowed = NodeHugePages::allow(24)?;
    let script = "probe huge 8 && cat /sys/fs/cgroup/hugetlb.2MB.max && probe huge 24";
    let done = oci::run(bench, &["sh", "-c", script], |spec| {
        let limits = json!([{ "pageSize": "2MB", "limit": 16 * MIB }]);
        spec["linux"]["resources"]["hugepageLimits"] = limits;
    })?;
    ensure!(
        done.out() == "8 MiB of huge pages\n16777216\n" && done.code() != 0,
        "exit code {}\n{}",
        done.code(),
        done.tail()
    );
    Ok(())
}

/// An emptyDir of medium HugePages, which the kubelet mounts: its containers have
/// the same pages.
fn volume(bench: &Bench) -> Result<()> {
    let _allowed = NodeHugePages::allow(8)?;
    let place = bench.folder().join("pages");
    let options = "pagesize=2M,size=16M,mode=1777";
    let mounted = NodeMount::new("hugetlbfs", "hugetlbfs", options, &place)?;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let start = |command: &[&str]| {
        let limit = HugepageLimit {
            page_size: "2MB".into(),
            limit: 4 << 20,
        };
        let resources = LinuxContainerResources {
            hugepage_limits: vec![limit],
            ..Default::default()
        };
        let mut config = limited(&pod, command, resources);
        config.mounts = vec![mount(&place, "/pages")];
        pod.start_config(&cri, &config)
    };
    let writer = start(&["sleep", "1000"])?;
    let script = "touch /pages/file && probe poke /pages/file A && stat -c '%s' /pages/file && \
                  stat -c '%a' /pages && df -k /pages | tail -n 1 | awk '{ print $2 }' && \
                  sed -n 's/.* \\/pages hugetlbfs .*pagesize=\\([^, ]*\\).*/\\1/p' /proc/mounts && \
                  cat /sys/fs/cgroup/hugetlb.2MB.current";
    let seen = shell(&cri, &writer, script)?;
    ensure!(seen == "2097152\n1777\n16384\n2M\n2097152", "{seen:?}");
    let reader = start(&["probe", "map", "/pages/file"])?;
    pod.await_log(&cri, &reader, "first byte A")?;
    shell(&cri, &writer, "probe poke /pages/file B")?;
    pod.await_log(&cri, &reader, "first byte B")?;
    pod.remove(&cri)?;
    drop(mounted);
    Ok(())
}
