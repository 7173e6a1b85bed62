//! The node's configuration: one optional file.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

/// Where the file is looked for when [`VARIABLE`] is not set.
const DEFAULT_FILE: &str = "/etc/husk/config.toml";

/// Environment variable that names another file.
const VARIABLE: &str = "HUSK_CONFIG";

/// Values of the configuration file, or their defaults.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
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
    /// Each VMM runs under a user and group of its own: this number plus the
    /// process id of its shim.
    pub first_uid: u32,
    /// Longest time from a VM's start to the agent's first answer.
    pub boot_timeout_seconds: u32,
    /// Kernel command line parameters added to our own.
    pub kernel_parameters: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vmm: "/usr/libexec/husk/husk-vmm".into(),
            file_server: "/usr/libexec/husk/husk-fs".into(),
            kernel: "/usr/share/husk/vmlinux".into(),
            initramfs: "/usr/share/husk/initramfs.cpio".into(),
            state_dir: "/run/husk".into(),
            first_uid: 1_000_000_000,
            boot_timeout_seconds: 60,
            kernel_parameters: String::new(),
        }
    }
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
    /// The file could not be read.
    #[error("configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not what it should be.
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

impl Config {
    /// Reads the node's configuration file, if there is one.
    ///
    /// # Errors
    /// A file that was asked for is not there, or its content is wrong.
    pub fn load() -> Result<Self, ConfigError> {
        match env::var_os(VARIABLE) {
            Some(path) => Self::read(Path::new(&path)),
            None => match Self::read(Path::new(DEFAULT_FILE)) {
                Err(ConfigError::Read { source, .. })
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    Ok(Self::default())
                }
                other => other,
            },
        }
    }

    /// How long things may take.
    pub fn patience(&self) -> Patience {
        Patience {
            boot_seconds: self.boot_timeout_seconds,
        }
    }

    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        // toml's own text has several lines; containerd's errors have one.
        toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            line: error
                .span()
                .and_then(|span| text.get(..span.start))
                .map_or(1, |before| before.matches('\n').count() + 1),
            message: error.message().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_defaults_of_what_is_not_said() {
        let config: Config = toml::from_str("kernel = '/k'").unwrap();
        assert_eq!(config.kernel, Path::new("/k"));
        assert_eq!(config.vmm, Config::default().vmm);
    }

    #[test]
    fn is_as_patient_as_with_the_boot() {
        let usual = Duration::from_secs(10);
        for (seconds, expected) in [(1, 10), (60, 10), (180, 30), (u32::MAX, 715_827_882)] {
            let config = Config {
                boot_timeout_seconds: seconds,
                ..Config::default()
            };
            let patience = config.patience().of(usual);
            assert_eq!(patience.as_secs(), expected);
        }
    }

    #[test]
    fn names_what_is_wrong_in_one_line() {
        let path = Path::new("/etc/husk/config.toml");
        let cases = [
            (
                "vmm = '/v'\nkernal = '/k'",
                "line 2: unknown field `kernal`",
            ),
            ("first_uid = 'x'", "line 1: invalid type: string"),
            ("kernel = ", "line 1: "),
        ];
        for (text, expected) in cases {
            let error = Config::parse(path, text).unwrap_err().to_string();
            let expected = format!("configuration {}, {expected}", path.display());
            assert!(error.starts_with(&expected), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
