//! Husk's own files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use husk_node::config::{Config, ConfigError, Loaded};
use husk_node::sums::{Hash, Listed, SumsError};

use super::{Finding, Node, Verdict};

/// The shim; containerd finds it by its name in its own PATH.
pub const SHIM: &str = "containerd-shim-husk-v2";

/// Where containerd looks mostly.
const PATH: [&str; 4] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];

pub fn check(node: &Node, loaded: Result<Loaded, ConfigError>) -> Vec<Finding> {
    let (config, first) = match loaded {
        Ok(loaded) => {
            let found = match loaded.files.len() {
                0 => "defaults".to_owned(),
                count => format!("files that are right: {count}"),
            };
            (loaded.config, Finding::ok("configuration", found))
        }
        Err(error) => {
            let found = format!("{:#}", anyhow::Error::from(error));
            let advice = "no pod starts until it is mended: husk config --check FILE";
            let problem = Finding::problem("configuration", found, advice);
            (Config::default(), problem)
        }
    };
    let programs = [("VMM", &config.vmm), ("file server", &config.file_server)];
    let programs = programs.map(|(about, path)| file(node, about, path, true, b"\x7fELF"));
    let rest = [
        // newc, as initramfs-buffer-format.rst of the kernel has it.
        ("initramfs", &config.initramfs, b"070701".as_slice()),
        ("guest kernel", &config.kernel, b"\x7fELF"),
    ];
    let rest = rest.map(|(about, path, magic)| booted(node, about, path, magic));
    let mut findings = vec![first, shim(node)];
    findings.extend(programs);
    findings.extend(rest);
    if config.debug_shell {
        let archive = config.debug_initramfs();
        findings.push(booted(node, "debug shell", &archive, b"070701"));
    }
    findings
}

fn shim(node: &Node) -> Finding {
    let mut dirs = PATH.iter();
    let found = dirs.find(|dir| node.path(dir).join(SHIM).exists());
    match found {
        Some(dir) => {
            let path = format!("{dir}/{SHIM}");
            file(node, "shim", Path::new(&path), true, b"\x7fELF")
        }
        None => Finding::problem(
            "shim",
            format!("no {SHIM} in {}", PATH.join(", ")),
            "install the package, or put the shim into /usr/bin",
        ),
    }
}

/// The shim of this node, as a shell here or containerd would find it.
pub fn installed_shim() -> Option<PathBuf> {
    let own = std::env::var_os("PATH").unwrap_or_default();
    let usual = PATH.iter().map(PathBuf::from);
    let mut dirs = std::env::split_paths(&own).chain(usual);
    dirs.find_map(|dir| Some(dir.join(SHIM)).filter(|path| path.is_file()))
}

/// A file that guests boot from, which begins with `magic` and is what is said of it.
fn booted(node: &Node, about: &'static str, path: &Path, magic: &[u8]) -> Finding {
    let finding = file(node, about, path, false, magic);
    if finding.verdict == Verdict::Problem {
        return finding;
    }
    let shown = path.display();
    let path = node.path(&shown.to_string());
    let compared = Listed::of(&path).and_then(|listed| {
        let file = fs::File::open(&path).map_err(|error| listed.unread(error))?;
        let (found, _) = Hash::of(&file).map_err(|error| listed.unread(error))?;
        listed.compare(found)
    });
    let found = match compared {
        Ok(()) => return finding,
        Err(SumsError::Missing { .. }) => format!("{shown} has no SHA256SUMS beside it"),
        Err(SumsError::Unlisted { .. }) => format!("{shown} is not in the SHA256SUMS beside it"),
        Err(SumsError::Differs { .. }) => format!("{shown} is another than SHA256SUMS says"),
        Err(error) => format!("{:#}", anyhow::Error::from(error)),
    };
    let advice = "install the package again; for files of your own, in their folder: sha256sum \
                  vmlinux initramfs.cpio > SHA256SUMS";
    Finding::problem(about, found, advice)
}

/// A file that begins with `magic`.
fn file(node: &Node, about: &'static str, path: &Path, runs: bool, magic: &[u8]) -> Finding {
    const ADVICE: &str = "install the package again, or mend the key of the configuration";
    let shown = path.display().to_string();
    let place = node.path(&shown);
    let read = fs::File::open(&place).and_then(|mut file| {
        let mut start = vec![0; magic.len()];
        std::io::Read::read_exact(&mut file, &mut start)?;
        Ok((start, file.metadata()?))
    });
    match read {
        Err(error) => Finding::problem(about, format!("{shown}: {error}"), ADVICE),
        Ok((start, _)) if start != magic => {
            Finding::problem(about, format!("{shown} is something else"), ADVICE)
        }
        // Root runs it.
        Ok((_, found)) if found.uid() != 0 => Finding::problem(
            about,
            format!("{shown} belongs to user {}", found.uid()),
            format!("chown 0:0 {shown}, and look whether it is still what was installed"),
        ),
        Ok((_, found)) if runs && found.mode() & 0o111 == 0 => Finding::problem(
            about,
            format!("{shown} is not executable"),
            format!("chmod 755 {shown}"),
        ),
        // Who can replace it is root on this node.
        Ok((_, found)) if found.mode() & 0o022 != 0 => Finding::warning(
            about,
            format!("{shown} may be written by others than its owner"),
            format!("chmod go-w {shown}"),
        ),
        Ok(_) => Finding::ok(about, shown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict::{Ok as Fine, Problem, Warning};
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn knows_what_belongs_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let node = Node::at(dir.path());
        let put = |path: &str, text: &str, mode: u32| {
            let path = node.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        };
        let sums = |names: &[&str]| {
            let dir = node.path("/usr/share/husk");
            let line = |name: &&str| {
                let file = fs::File::open(dir.join(name)).unwrap();
                format!("{}  {name}\n", Hash::of(&file).unwrap().0)
            };
            let lines: String = names.iter().map(line).collect();
            fs::write(dir.join("SHA256SUMS"), lines).unwrap();
        };
        let verdicts = || -> Vec<Verdict> {
            let findings = check(&node, Ok(Loaded::default()));
            findings.iter().map(|finding| finding.verdict).collect()
        };
        assert_eq!(
            verdicts(),
            [Fine, Problem, Problem, Problem, Problem, Problem]
        );
        put("/usr/bin/containerd-shim-husk-v2", "\x7fELF…", 0o755);
        put("/usr/libexec/husk/husk-vmm", "\x7fELF…", 0o644);
        put("/usr/libexec/husk/husk-fs", "\x7fELF…", 0o777);
        put("/usr/share/husk/vmlinux", "MZ a bzImage", 0o644);
        put("/usr/share/husk/initramfs.cpio", "0707010000", 0o644);
        sums(&["initramfs.cpio"]);
        let path = node.path("/usr/libexec/husk/husk-fs");
        if fs::metadata(&path).unwrap().uid() != 0 {
            assert_eq!(verdicts()[1..], [Problem; 5]);
            return;
        }
        assert_eq!(verdicts(), [Fine, Fine, Problem, Warning, Fine, Problem]);
        std::os::unix::fs::chown(&path, Some(1), None).unwrap();
        assert_eq!(verdicts()[3], Problem);
        // Nobody misses what is not used.
        let mut loaded = Loaded::default();
        loaded.config.debug_shell = true;
        let last = |loaded: &Loaded| check(&node, Ok(loaded.clone())).pop().unwrap();
        assert_eq!(last(&loaded).verdict, Problem);
        put("/usr/share/husk/debug.cpio", "0707010000", 0o644);
        let found = |loaded: &Loaded| {
            let last = last(loaded);
            assert!(last.verdict == Fine || last.advice.contains("sha256sum"));
            (last.about, last.verdict, last.found)
        };
        let problem = |words: &str| {
            let found = format!("/usr/share/husk/debug.cpio {words}");
            ("debug shell", Problem, found)
        };
        let unlisted = problem("is not in the SHA256SUMS beside it");
        assert_eq!(found(&loaded), unlisted);
        sums(&["debug.cpio"]);
        let fine = ("debug shell", Fine, "/usr/share/husk/debug.cpio".to_owned());
        assert_eq!(found(&loaded), fine);
        put("/usr/share/husk/debug.cpio", "0707010001", 0o644);
        let changed = problem("is another than SHA256SUMS says");
        assert_eq!(found(&loaded), changed);
        fs::remove_file(node.path("/usr/share/husk/SHA256SUMS")).unwrap();
        let alone = problem("has no SHA256SUMS beside it");
        assert_eq!(found(&loaded), alone);
    }
}
