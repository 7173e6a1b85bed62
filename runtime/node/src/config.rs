//! The node's configuration: an optional file, and drop-ins beside it.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

mod file;
pub mod key;
mod page;

pub use page::page;

/// Where the file is looked for when [`VARIABLE`] is not set.
pub const CONFIG_FILE: &str = "/etc/husk/config.toml";

/// Directory of the files that are read after it.
pub const DROP_INS: &str = "/etc/husk/conf.d";

/// Environment variable that names another file, which is then the only one.
pub const VARIABLE: &str = "HUSK_CONFIG";

/// What is shown of a key that has no value.
pub const NO_VALUE: &str = "none";

/// What is in effect: values of the files, or their defaults. The keys are
/// described in [`key::KEYS`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The VMM's program.
    pub vmm: PathBuf,
    /// The file server's program.
    pub file_server: PathBuf,
    /// Uncompressed guest kernel.
    pub kernel: PathBuf,
    /// Initramfs with the agent.
    pub initramfs: PathBuf,
    /// One directory a pod below it, while the pod exists.
    pub state_dir: PathBuf,
    /// Where templates are.
    pub template_dir: PathBuf,
    /// Oldest template that is used; 0: none is.
    pub template_max_age_seconds: u32,
    /// Each VMM and each file server runs under a user and group of its own, see
    /// [`uid`].
    pub first_uid: u32,
    /// Longest time from a VM's start to the agent's first answer.
    pub boot_timeout_seconds: u32,
    /// Kernel command line parameters added to our own.
    pub kernel_parameters: String,
    /// Programs may be run in the guest itself.
    pub debug_shell: bool,
    /// Pods may have PCI devices of the node.
    pub vfio: bool,
    /// Of each disk, reading and writing together; like the others below, none
    /// limits nothing.
    pub disk_kib_per_second: Option<u32>,
    /// At once.
    pub disk_burst_kib: Option<u32>,
    /// Of each disk.
    pub disk_requests_per_second: Option<u32>,
    /// At once.
    pub disk_burst_requests: Option<u32>,
    /// Of each interface, in each direction.
    pub network_kib_per_second: Option<u32>,
    /// At once.
    pub network_burst_kib: Option<u32>,
    /// Of each interface, in each direction.
    pub network_frames_per_second: Option<u32>,
    /// At once.
    pub network_burst_frames: Option<u32>,
}

/// How many user ids VMMs and file servers have.
pub const UIDS: u32 = 1 << 23;

/// The lowest number of a namespace; the kernel gives the lowest that is free
/// (`PROC_DYNAMIC_FIRST` in fs/proc/generic.c).
const FIRST_NAMESPACE: u64 = 0xf000_0000;

impl Default for Config {
    fn default() -> Self {
        Self {
            vmm: "/usr/libexec/husk/husk-vmm".into(),
            file_server: "/usr/libexec/husk/husk-fs".into(),
            kernel: "/usr/share/husk/vmlinux".into(),
            initramfs: "/usr/share/husk/initramfs.cpio".into(),
            state_dir: "/run/husk".into(),
            template_dir: "/run/husk-templates".into(),
            template_max_age_seconds: 86_400,
            first_uid: 1_010_000_000,
            boot_timeout_seconds: 60,
            kernel_parameters: String::new(),
            debug_shell: false,
            vfio: false,
            disk_kib_per_second: None,
            disk_burst_kib: None,
            disk_requests_per_second: None,
            disk_burst_requests: None,
            network_kib_per_second: None,
            network_burst_kib: None,
            network_frames_per_second: None,
            network_burst_frames: None,
        }
    }
}

/// Which files are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    file: PathBuf,
    /// Its absence is an error.
    is_named: bool,
    drop_ins: Option<PathBuf>,
}

/// The configuration and where it was said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// What is in effect.
    pub config: Config,
    /// Where each key was said that has not its default.
    pub places: BTreeMap<&'static str, Place>,
    /// The files that were read, in order.
    pub files: Vec<PathBuf>,
}

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// Counted from 1.
    pub line: usize,
}

/// How long things may take on this node. Where a machine may take long to
/// boot, everything in it may take as much longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    boot_seconds: u32,
}

impl Patience {
    /// How long something may take here that elsewhere takes `usual` at most.
    pub fn of(self, usual: Duration) -> Duration {
        let usual_boot = Config::default().boot_timeout_seconds;
        usual * self.boot_seconds.max(usual_boot) / usual_boot
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file could not be read.
    #[error("configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("configuration {path}, line {line}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong there, and what would be right.
        message: String,
    },
}

impl Sources {
    /// Those of this node.
    pub fn of_node() -> Self {
        match env::var_os(VARIABLE) {
            Some(path) => Self {
                file: path.into(),
                is_named: true,
                drop_ins: None,
            },
            None => Self {
                file: CONFIG_FILE.into(),
                is_named: false,
                drop_ins: Some(DROP_INS.into()),
            },
        }
    }

    /// Reads them.
    ///
    /// # Errors
    /// A file that was asked for is not there, or the first that is wrong in one.
    pub fn load(&self) -> Result<Loaded, ConfigError> {
        let mut said = Table::new();
        let mut loaded = Loaded::default();
        for path in self.files()? {
            let text = match read(&path) {
                Ok(text) => text,
                Err(source) if !self.is_named && source.kind() == io::ErrorKind::NotFound => {
                    continue;
                }
                Err(source) => return Err(ConfigError::Read { path, source }),
            };
            let read = file::parse(&path, &text).map_err(first)?;
            for (key, (value, line)) in read {
                let place = Place {
                    path: path.clone(),
                    line,
                };
                loaded.places.insert(key, place);
                said.insert(key.to_owned(), value);
            }
            loaded.files.push(path);
        }
        // Each value was checked with its line; nothing is left that could be wrong.
        loaded.config = said.try_into().map_err(|error: toml::de::Error| {
            let path = self.file.clone();
            let message = error.message().to_owned();
            ConfigError::Parse {
                path,
                line: 1,
                message,
            }
        })?;
        Ok(loaded)
    }

    fn files(&self) -> Result<Vec<PathBuf>, ConfigError> {
        let mut files = Vec::new();
        if let Some(dir) = &self.drop_ins {
            let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
            match entries {
                Ok(entries) => files.extend(entries.iter().map(fs::DirEntry::path)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    let path = dir.clone();
                    return Err(ConfigError::Read { path, source });
                }
            }
        }
        // An editor's hidden files are not meant.
        let is_meant = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            name.ends_with(b".toml") && !name.starts_with(b".")
        };
        files.retain(is_meant);
        files.sort();
        files.insert(0, self.file.clone());
        Ok(files)
    }
}

/// Everything that is wrong in a file, which need not be the node's.
///
/// # Errors
/// All of it, in the order of the lines.
pub fn check(path: &Path) -> Result<(), Vec<ConfigError>> {
    let text = read(path).map_err(|source| {
        let path = path.to_owned();
        vec![ConfigError::Read { path, source }]
    })?;
    file::parse(path, &text).map(drop)
}

impl Config {
    /// Reads the node's configuration, if there is one.
    ///
    /// # Errors
    /// A file that was asked for is not there, or its content is wrong.
    pub fn load() -> Result<Self, ConfigError> {
        Ok(Sources::of_node().load()?.config)
    }

    /// What is added to the initramfs where debug shells are allowed.
    pub fn debug_initramfs(&self) -> PathBuf {
        self.initramfs.with_file_name("debug.cpio")
    }

    /// How long things may take.
    pub fn patience(&self) -> Patience {
        Patience {
            boot_seconds: self.boot_timeout_seconds,
        }
    }

    /// The value of a key, as a file would say it; [`NO_VALUE`] where it has none.
    pub fn value(&self, key: &str) -> Value {
        let table = Table::try_from(self).unwrap_or_default();
        let value = table.get(key).cloned();
        value.unwrap_or_else(|| Value::String(NO_VALUE.to_owned()))
    }
}

/// The user and the group of a process that has a PID namespace to itself, of this
/// number. All namespaces of a node have different ones, whoever made them and
/// wherever; this one's is given to no other before the process is reaped. None: so
/// many namespaces there are on the node.
pub fn uid(first_uid: u32, pid_namespace: u64) -> Option<u32> {
    let offset = u32::try_from(pid_namespace.checked_sub(FIRST_NAMESPACE)?).ok()?;
    (offset < UIDS).then(|| first_uid.saturating_add(offset))
}

fn read(path: &Path) -> io::Result<String> {
    /// Nobody writes so much by hand.
    const LONGEST: u64 = 1 << 20;
    let mut text = String::new();
    let file = fs::File::open(path)?;
    io::Read::read_to_string(&mut io::Read::take(file, LONGEST), &mut text)?;
    Ok(text)
}

fn first(mut errors: Vec<ConfigError>) -> ConfigError {
    errors.swap_remove(0)
}

#[cfg(test)]
mod tests;
