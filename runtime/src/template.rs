//! Templates: machines that have booted and wait, saved once, from which many
//! pods begin (docs/decisions/templates.md).
//!
//! A template is a directory below `template_dir`, named by what it was made from:
//!
//! ```text
//! KEY/state       processors and devices
//! KEY/memory      guest memory
//! KEY.failed      why there is none
//! KEY.discarded   since when one was of no use
//! KEY.doubted     the last copy did not begin, which may be its pod's fault
//! KEY.…           half made, or given up
//! lock            held by whoever makes one
//! verified        hashes of the files of the node that were booted
//! ```

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_node::sums;
use husk_node::verified::trusted;
use rustix::fs::{Mode, OFlags, openat};
use sha2::{Digest, Sha256};

use crate::bundle::PodSpec;
use crate::config::Config;
use crate::debug_shell;
use crate::vm_plan::{self, HostFacts, Room, VmSize};

mod large_pages;
pub mod make;

/// What templates' machines begin with, MiB; what a pod has beyond it is plugged,
/// which takes time and memory of the guest's, so that the first is that of the pods
/// that say nothing. Where it is the last, kernel and agent fit, and the least limits.
const SIZES_MIB: [u32; 2] = [vm_plan::DEFAULT_MEMORY_MIB, 128];

/// Largest pod that begins as a template: what the guest's kernel keeps about each
/// page that is plugged (`struct page`) comes from the memory it began with.
const LARGEST_MIB: u32 = 2048;

/// How long nobody tries again to make a template that could not be made.
const AFTER_FAILURE: Duration = Duration::from_secs(600);

/// Extension of the file that says why a template could not be made.
const FAILED: &str = "failed";

/// Extension of the file that is made when a copy did not start.
const DISCARDED: &str = "discarded";

/// Extension of the file that is there from a copy that could not have what its pod
/// asked for, or was killed, until another has begun.
const DOUBTED: &str = "doubted";

/// Length of a template's name.
const NAME: usize = 32;

/// What a template of this node is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateKey {
    /// Beside the other templates.
    dir: PathBuf,
    /// What the saved machine must have been made from.
    origin: String,
    /// What its kernel was told.
    command_line: String,
    max_age: Duration,
    size: VmSize,
    vcpus_max: u8,
}

/// A template, opened.
#[derive(Debug)]
pub struct Template {
    /// Processors and devices.
    pub state: OwnedFd,
    /// Guest memory.
    pub memory: OwnedFd,
}

/// How a pod's machine is made from a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// As the template is.
    pub size: VmSize,
    /// What may be added, of which some is at once.
    pub room: Room,
}

impl TemplateKey {
    /// Those of this node, as it is configured, the largest first. None where
    /// templates are off, or something that they are made from is missing.
    pub fn all_of_node(config: &Config, host: HostFacts) -> Vec<Self> {
        if config.template_max_age_seconds == 0 {
            return Vec::new();
        }
        let files = files(config);
        let of_size = |memory_mib| Some(Self::of_size(config, host, files.as_ref()?, memory_mib));
        SIZES_MIB.into_iter().filter_map(of_size).collect()
    }

    fn of_size(config: &Config, host: HostFacts, files: &[String], memory_mib: u32) -> Self {
        let size = VmSize {
            memory_mib,
            vcpus: 1,
        };
        let room = Room {
            vcpus: vm_plan::usual_vcpus(host),
            // It is plugged or not; the kernel is told what to do with it.
            pluggable_mib: LARGEST_MIB,
        };
        let extra = debug_shell::kernel_parameters(config);
        let command_line = vm_plan::command_line(size, room, &extra, false);
        let mut digest = Sha256::new();
        let mut add = |part: &str| {
            digest.update(part);
            digest.update([0]);
        };
        add(env!("CARGO_PKG_VERSION"));
        files.iter().for_each(|file| add(file));
        add(&command_line);
        add(&format!("{size:?} {}", room.vcpus));
        let origin: String = digest
            .finalize()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let name = origin.get(..NAME).unwrap_or(&origin);
        Self {
            dir: config.template_dir.join(name),
            origin,
            command_line,
            max_age: Duration::from_secs(config.template_max_age_seconds.into()),
            size,
            vcpus_max: room.vcpus,
        }
    }

    /// Memory with which its machine begins, MiB.
    pub fn memory_mib(&self) -> u32 {
        self.size.memory_mib
    }

    /// What it is called among the others.
    pub fn name(&self) -> String {
        let name = self.dir.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// What the saved machine must have been made from.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// How the machine of `pod`, of `size` and with `room` to grow, is made from a
    /// template; none where it must boot.
    pub fn shape(&self, pod: &PodSpec, size: VmSize, room: Room) -> Option<Shape> {
        let fits = (self.size.memory_mib..=LARGEST_MIB).contains(&size.memory_mib)
            && size.vcpus <= self.vcpus_max
            && room.vcpus <= self.vcpus_max;
        let unit = husk_vmm_spec::PLUGGABLE_UNIT_MIB;
        let beyond = size.memory_mib.checked_sub(self.size.memory_mib)?;
        let pluggable_mib = (beyond + room.pluggable_mib).next_multiple_of(unit);
        // What is not plugged the guest could use unasked, and only in a pod's
        // cgroup the node counts it.
        let is_counted = pod.limits_are_a_sum || beyond.is_multiple_of(unit);
        (fits && is_counted).then_some(Shape {
            size: self.size,
            room: Room {
                vcpus: self.vcpus_max,
                pluggable_mib,
            },
        })
    }

    /// Opens the template, unless there is none or it is too old.
    pub fn open(&self) -> Option<Template> {
        match self.try_open() {
            Ok(template) => template,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(template = %self.dir.display(), %error, "not used");
                None
            }
        }
    }

    fn try_open(&self) -> io::Result<Option<Template>> {
        // Both files are those of one template, also where it is replaced meanwhile.
        let all = File::open(self.beside())?;
        trusted(&all.metadata()?)?;
        let name = self.dir.file_name().unwrap_or_default();
        let dir = open_in(&all, Path::new(name))?;
        let (state, memory) = (
            open_in(&dir, Path::new("state"))?,
            open_in(&dir, Path::new("memory"))?,
        );
        let age = state.metadata()?.modified()?.elapsed();
        // A clock that was set back says nothing about the age.
        if age.is_ok_and(|age| age > self.max_age) {
            tracing::info!(template = %self.dir.display(), "too old");
            return Ok(None);
        }
        Ok(Some(Template {
            state: state.into(),
            memory: memory.into(),
        }))
    }

    /// Where all templates are.
    fn beside(&self) -> &Path {
        self.dir.parent().unwrap_or(Path::new("/"))
    }

    /// A copy could not have what its pod asked for, or was killed. A pod may ask for what
    /// cannot be, and others shall not suffer for it; but twice running is no accident.
    pub fn doubt(&self) {
        let doubted = File::create_new(self.dir.with_extension(DOUBTED));
        match doubted {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.discard(),
            Err(error) => tracing::warn!(%error, "it is not noted that a copy failed"),
        }
    }

    /// A copy has done what its pod asked for.
    pub fn proved(&self) {
        // Mostly there is none.
        let _ = fs::remove_file(self.dir.with_extension(DOUBTED));
    }

    /// Forgets a template from which a pod could not begin. Another is made at once,
    /// unless that was of no use either.
    pub fn discard(&self) {
        // One of several pods that fail together does it.
        let old = self.dir.with_extension(std::process::id().to_string());
        match fs::rename(&self.dir, &old) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                tracing::warn!(template = %self.dir.display(), %error, "stays");
                return;
            }
            Ok(()) => tracing::warn!(template = %self.dir.display(), "discarded"),
        }
        self.proved();
        if let Err(error) = fs::remove_dir_all(&old) {
            tracing::warn!(path = %old.display(), %error, "stays");
        }
        let discarded = self.dir.with_extension(DISCARDED);
        let noted = match is_recent(&discarded) {
            false => fs::write(&discarded, ""),
            true => fs::write(
                self.dir.with_extension(FAILED),
                "machines that began as copies did not start\n",
            ),
        };
        if let Err(error) = noted {
            tracing::warn!(%error, "it is not noted that a template was of no use");
        }
    }

    /// Whether to try to make one.
    pub fn is_worth_making(&self) -> bool {
        let is_possible = match fs::metadata(self.beside()) {
            Ok(all) => trusted(&all).is_ok(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        is_possible && !is_recent(&self.dir.with_extension(FAILED))
    }
}

/// A file that is there was written within [`AFTER_FAILURE`].
fn is_recent(path: &Path) -> bool {
    let written = fs::metadata(path).and_then(|file| file.modified());
    let since = written.map(|at| at.elapsed());
    matches!(since, Ok(Ok(since)) if since < AFTER_FAILURE)
}

/// The template of which a file beside the templates is, `lock` apart, and what comes
/// behind its name.
fn key_of(name: &str) -> Option<(&str, &str)> {
    let (key, extension) = name.split_once('.').unwrap_or((name, ""));
    let is_key = key.len() == NAME && key.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_key.then_some((key, extension))
}

/// Which files a template of this node is made from.
fn files(config: &Config) -> Option<Vec<String>> {
    let mut paths = vec![
        config.vmm.clone(),
        config.kernel.clone(),
        config.initramfs.clone(),
    ];
    if config.debug_shell {
        paths.push(config.debug_initramfs());
    }
    // Whoever makes one boots what these say, or nothing.
    paths.push(config.kernel.with_file_name(sums::FILE));
    paths.push(config.initramfs.with_file_name(sums::FILE));
    paths.dedup();
    paths.iter().map(|path| identity(path).ok()).collect()
}

/// Opens what nobody else can write to.
fn open_in(dir: &File, name: &Path) -> io::Result<File> {
    let how = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(openat(dir.as_fd(), name, how, Mode::empty())?);
    trusted(&file.metadata()?)?;
    Ok(file)
}

/// Which file it is, and since when.
fn identity(path: &Path) -> io::Result<String> {
    let file = fs::metadata(path)?;
    Ok(format!("{} {}", path.display(), sums::identity(&file)))
}

#[cfg(test)]
mod tests;
