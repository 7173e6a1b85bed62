//! What can't work: one clear error each, and nothing left, which the runner
//! checks after every case.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{Bench, Case, case, husk_case};
use crate::image::sha256;
use crate::pod::Pod;
use crate::process::Finished;

/// What guests boot from.
const IMAGE: &str = "/usr/share/husk";

/// The hashes of files, beside them.
const SUMS: &str = "SHA256SUMS";

/// The cases of this theme.
pub const CASES: &[Case] = &[
    husk_case("abuse/missing-kernel", 30, missing_kernel),
    husk_case("abuse/corrupt-kernel", 30, corrupt_kernel),
    husk_case("abuse/changed-initramfs", 60, changed_initramfs),
    husk_case("abuse/missing-vmm", 30, missing_vmm),
    husk_case("abuse/bad-configuration", 30, bad_configuration),
    husk_case("abuse/no-kvm", 30, no_kvm),
    husk_case("abuse/kvm-is-no-kvm", 30, kvm_is_no_kvm),
    husk_case("abuse/memory-limit", 30, memory_limit),
    husk_case("abuse/annotation", 40, annotation),
    case("abuse/missing-root", 30, missing_root),
    case("abuse/missing-mount-source", 30, missing_mount_source),
    case("abuse/missing-command-in-pod", 30, missing_command_in_pod),
    husk_case("abuse/full-disk", 30, full_disk),
];

/// Fails unless `done` is one clear error with all of `words`.
pub(super) fn ensure_clear(done: &Finished, words: &[&str]) -> Result<()> {
    let said = done.err();
    ensure!(done.code() != 0, "it worked: {}", done.tail());
    for word in words {
        ensure!(
            said.contains(word),
            "the error does not say {word:?}: {}",
            done.tail()
        );
    }
    let lines = said.lines().filter(|line| !line.trim().is_empty()).count();
    ensure!(
        lines == 1 && said.len() < 1000,
        "{lines} lines, {} bytes: {}",
        said.len(),
        done.tail()
    );
    ensure!(
        !said.contains("panicked") && !said.contains("deadline exceeded"),
        "{}",
        done.tail()
    );
    Ok(())
}

/// A mount over something of the node, gone with this value.
struct Covered<'a>(&'a Path);

impl<'a> Covered<'a> {
    fn with_file(target: &'a Path, source: &Path) -> Result<Self> {
        mount(
            Some(source),
            target,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .with_context(|| format!("mount {} over {}", source.display(), target.display()))?;
        Ok(Self(target))
    }

    fn with_tmpfs(target: &'a Path, options: &str) -> Result<Self> {
        mount(
            Some("small"),
            target,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options),
        )
        .with_context(|| format!("mount a tmpfs on {}", target.display()))?;
        Ok(Self(target))
    }
}

impl Drop for Covered<'_> {
    fn drop(&mut self) {
        // What stays mounted shows in the comparison after the case.
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

/// Husk's configuration for the time of a case.
pub(super) struct Configured {
    earlier: Option<String>,
}

const CONFIGURATION: &str = "/etc/husk/config.toml";

impl Configured {
    pub(super) fn with(text: &str) -> Result<Self> {
        let earlier = fs::read_to_string(CONFIGURATION).ok();
        fs::create_dir_all("/etc/husk")?;
        let base = earlier.clone().unwrap_or_default();
        fs::write(CONFIGURATION, format!("{text}\n{base}"))?;
        Ok(Self { earlier })
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        let _ = match &self.earlier {
            Some(text) => fs::write(CONFIGURATION, text),
            None => fs::remove_file(CONFIGURATION),
        };
    }
}

/// A container that can't start with this configuration.
fn with_configuration(bench: &Bench, text: &str, words: &[&str]) -> Result<()> {
    let configured = Configured::with(text)?;
    let done = bench.ctr.run(&[], &bench.id(), &["true"])?;
    drop(configured);
    ensure_clear(&done, words)
}

fn missing_kernel(bench: &Bench) -> Result<()> {
    with_configuration(
        bench,
        "kernel = '/nowhere/vmlinux'",
        &["/nowhere/vmlinux", "kernel"],
    )
}

fn corrupt_kernel(bench: &Bench) -> Result<()> {
    let file = bench.folder().join("vmlinux");
    let kernel = vec![0x7f; 1 << 20];
    fs::write(&file, &kernel)?;
    let configuration = format!("kernel = '{}'", file.display());
    let sums = bench.folder().join(SUMS);
    let [name, beside] = [&file, &sums].map(|path| path.display().to_string());
    with_configuration(bench, &configuration, &[&name, &beside])?;
    let line = format!("{}  vmlinux\n", sha256(&kernel));
    fs::write(sums, line)?;
    // Then it is the VMM that has something against it.
    with_configuration(bench, &configuration, &["kernel"])
}

/// A byte of the node's own initramfs is another, as of a bad disk.
fn changed_initramfs(bench: &Bench) -> Result<()> {
    let folder = bench.folder();
    for name in ["initramfs.cpio", SUMS] {
        fs::copy(Path::new(IMAGE).join(name), folder.join(name))?;
    }
    let file = folder.join("initramfs.cpio");
    // The guest of another case is not to begin as this one.
    let configuration = format!(
        "template_max_age_seconds = 0\ninitramfs = '{}'",
        file.display()
    );
    let boots = || {
        let configured = Configured::with(&configuration)?;
        let done = bench.ctr.run(&[], &bench.id(), &["echo", "booted"])?;
        drop(configured);
        ensure!(done.ok()?.out() == "booted\n", "it did not boot");
        Ok(())
    };
    boots()?;
    let mut initramfs = fs::read(&file)?;
    let expected = sha256(&initramfs);
    let middle = initramfs.len() / 2;
    let byte = initramfs.get_mut(middle).context("an empty initramfs")?;
    *byte ^= 1;
    fs::write(&file, &initramfs)?;
    let found = sha256(&initramfs);
    with_configuration(
        bench,
        &configuration,
        &[&file.display().to_string(), &expected, &found],
    )?;
    if let Some(byte) = initramfs.get_mut(middle) {
        *byte ^= 1;
    }
    fs::write(&file, &initramfs)?;
    boots()
}

fn missing_vmm(bench: &Bench) -> Result<()> {
    with_configuration(bench, "vmm = '/nowhere/husk-vmm'", &["/nowhere/husk-vmm"])
}

fn bad_configuration(bench: &Bench) -> Result<()> {
    with_configuration(
        bench,
        "kernle = '/boot/vmlinux'",
        &["kernle", CONFIGURATION],
    )
}

const KVM: &str = "/dev/kvm";

fn no_kvm(bench: &Bench) -> Result<()> {
    let away = "/dev/kvm.away";
    fs::rename(KVM, away)?;
    let done = bench.ctr.run(&[], &bench.id(), &["true"]);
    fs::rename(away, KVM)?;
    ensure_clear(&done?, &[KVM])
}

fn kvm_is_no_kvm(bench: &Bench) -> Result<()> {
    let covered = Covered::with_file(Path::new(KVM), Path::new("/dev/null"))?;
    let done = bench.ctr.run(&[], &bench.id(), &["true"])?;
    drop(covered);
    ensure_clear(&done, &["KVM"]).or_else(|_| ensure_clear(&done, &[KVM]))
}

fn memory_limit(bench: &Bench) -> Result<()> {
    // Less than a process needs, and more than any machine has.
    for limit in [4096_u64, 1 << 60] {
        let done = bench.ctr.run(
            &["--memory-limit", &limit.to_string()],
            &bench.id(),
            &["true"],
        )?;
        ensure_clear(&done, &["memory"]).with_context(|| format!("limit {limit}"))?;
    }
    Ok(())
}

fn annotation(bench: &Bench) -> Result<()> {
    for (annotation, words) in [
        (
            "io.husk.vm.memory_mib=plenty",
            &["io.husk.vm.memory_mib", "plenty"][..],
        ),
        ("io.husk.vm.vcpus=0", &["io.husk.vm.vcpus"]),
        ("io.husk.no.such.key=1", &["io.husk.no.such.key"]),
    ] {
        let done = bench
            .ctr
            .run(&["--annotation", annotation], &bench.id(), &["true"])?;
        ensure_clear(&done, words).with_context(|| annotation.to_owned())?;
    }
    Ok(())
}

fn missing_root(bench: &Bench) -> Result<()> {
    let (id, runtime) = (bench.id(), bench.runtime.ctr_name());
    let folder = bench.folder().join("not-there");
    let root = folder.display().to_string();
    let done = bench.ctr.call(&[
        "run",
        "--rm",
        "--runtime",
        runtime,
        "--rootfs",
        &root,
        &id,
        "true",
    ])?;
    ensure_clear(&done, &["no such file"]).or_else(|_| ensure_clear(&done, &["No such file"]))
}

fn missing_mount_source(bench: &Bench) -> Result<()> {
    let source = bench.folder().join("not-there");
    let flag = format!(
        "type=bind,src={},dst=/mnt,options=rbind:ro",
        source.display()
    );
    let done = bench.ctr.run(&["--mount", &flag], &bench.id(), &["true"])?;
    ensure_clear(&done, &["not-there"])
}

fn missing_command_in_pod(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = cri.create(&pod.id, &pod.container(&["/bin/nothing"]), &pod.config)?;
    let said = cri
        .start(&container)
        .err()
        .map(|error| format!("{error:#}"))
        .unwrap_or_default();
    ensure!(
        said.contains("/bin/nothing") && said.lines().count() == 1,
        "{said:?}"
    );
    pod.remove(&cri)
}

fn full_disk(bench: &Bench) -> Result<()> {
    let state = Path::new("/run/husk");
    let made = !state.exists();
    fs::create_dir_all(state)?;
    let covered = Covered::with_tmpfs(state, "size=4k,nr_inodes=2")?;
    let done = bench.ctr.run(&[], &bench.id(), &["true"])?;
    drop(covered);
    if made {
        fs::remove_dir(state)?;
    }
    ensure_clear(&done, &["No space left on device"])?;
    // With room again, it works.
    bench.ctr.run(&[], &bench.id(), &["true"])?.ok()?;
    Ok(())
}
