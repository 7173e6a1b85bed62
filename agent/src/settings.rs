//! How this agent was started: by the kernel as PID 1 of a guest, or by a test
//! on an ordinary machine.

use std::path::PathBuf;

use husk_protocol::path;
use log::LevelFilter;

use crate::socket::Dialler;

/// Where this agent runs and whom it talks to.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Whether the machine is ours: early set-up, clock, power-off.
    pub guest: bool,
    /// How to reach the shim.
    pub dialler: Dialler,
    /// Mount point of the cgroup v2 tree.
    pub cgroup_root: PathBuf,
    /// What to log.
    pub log_level: LevelFilter,
    /// Whether the kernel's console shall show it, whatever `quiet` hides.
    pub log_to_console: bool,
    /// Where to log.
    pub log_path: String,
    /// Whether the shim may have programs run beside all containers.
    pub debug_shell: bool,
}

impl Settings {
    /// Of a guest, by its kernel command line. Keys that it doesn't know are
    /// left alone: a newer shim may speak to an older agent.
    pub fn from_kernel_command_line(line: &str) -> Self {
        let level = line
            .split_ascii_whitespace()
            .filter_map(|word| word.strip_prefix("husk.log="))
            .next_back();
        Self {
            guest: true,
            dialler: Dialler::Vsock,
            cgroup_root: PathBuf::from("/sys/fs/cgroup"),
            log_level: level
                .and_then(|level| level.parse().ok())
                .unwrap_or(LevelFilter::Warn),
            log_to_console: level.is_some(),
            log_path: "/dev/kmsg".to_owned(),
            debug_shell: line
                .split_ascii_whitespace()
                .any(|word| word == path::DEBUG_SHELL),
        }
    }

    /// Of a test: `--connect unix:PATH [--cgroup-root DIR] [--log FILE]
    /// [--debug-shell yes]`.
    pub fn from_arguments(arguments: &[String]) -> Result<Self, String> {
        let mut dialler = None;
        let mut cgroup_root = PathBuf::from("/sys/fs/cgroup");
        let mut log_path = "/dev/null".to_owned();
        let mut debug_shell = false;
        for pair in arguments.chunks(2) {
            match pair {
                [key, value] if key == "--connect" => {
                    let path = value.strip_prefix("unix:").ok_or("--connect unix:PATH")?;
                    dialler = Some(Dialler::Unix(PathBuf::from(path)));
                }
                [key, value] if key == "--cgroup-root" => cgroup_root = PathBuf::from(value),
                [key, value] if key == "--log" => log_path = value.clone(),
                [key, value] if key == "--debug-shell" => debug_shell = value == "yes",
                _ => return Err(format!("unexpected argument {:?}", pair.join(" "))),
            }
        }
        Ok(Self {
            guest: false,
            dialler: dialler.ok_or("--connect is required")?,
            cgroup_root,
            log_level: LevelFilter::Debug,
            log_to_console: false,
            log_path,
            debug_shell,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_level_comes_from_the_kernel_command_line() {
        let level = |line| Settings::from_kernel_command_line(line).log_level;
        assert_eq!(level("quiet husk.log=debug panic=-1"), LevelFilter::Debug);
        assert_eq!(level("husk.log=info husk.log=error"), LevelFilter::Error);
        assert_eq!(level("husk.log=loud"), LevelFilter::Warn);
        assert_eq!(level("quiet"), LevelFilter::Warn);
    }

    #[test]
    fn a_debug_shell_is_asked_for_in_full() {
        let allowed = |line| Settings::from_kernel_command_line(line).debug_shell;
        assert!(allowed("quiet husk.debug_shell=1 panic=-1"));
        for line in [
            "quiet",
            "husk.debug_shell=0",
            "husk.debug_shell",
            "husk.debug_shell=12",
        ] {
            assert!(!allowed(line), "{line}");
        }
    }
}
