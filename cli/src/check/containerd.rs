//! containerd, as it says of itself.

use std::process::Command;

use toml::{Table, Value};

use super::{Finding, Node};

/// The oldest whose shims may be ours.
const OLDEST: (u32, u32) = (1, 7);

/// What runs the cases of `docs/compatibility.md`.
const SNAPSHOTTERS: [&str; 6] = [
    "overlayfs",
    "native",
    "blockfile",
    "devmapper",
    "erofs",
    "btrfs",
];

/// The installed containerd.
#[derive(Clone, Debug, Default)]
pub struct Installed {
    /// What `containerd --version` says.
    version: Option<String>,
    /// What `containerd config dump` says: the file and all its drop-ins.
    config: Option<String>,
}

impl Installed {
    /// Asks it.
    pub fn ask() -> Self {
        let say = |words: &[&str]| {
            let done = Command::new("containerd").args(words).output().ok()?;
            let is_fine = done.status.success();
            is_fine.then(|| String::from_utf8_lossy(&done.stdout).into_owned())
        };
        Self {
            version: say(&["--version"]),
            config: say(&["config", "dump"]),
        }
    }
}

pub fn check(node: &Node, installed: &Installed) -> Vec<Finding> {
    let Some(version) = &installed.version else {
        if node.path("/usr/bin/crio").exists() {
            let advice = "Husk's handler for it is written by husk install, and not tried yet";
            return vec![Finding::warning("engine", "CRI-O, no containerd", advice)];
        }
        let advice = "install containerd 1.7 or newer; with Docker, its own containerd will do";
        return vec![Finding::problem(
            "containerd",
            "no containerd in PATH",
            advice,
        )];
    };
    let mut findings = vec![version_is(version)];
    match installed.config.as_deref().map(str::parse::<Table>) {
        Some(Ok(config)) => findings.extend(configuration(&config)),
        _ => findings.push(Finding::problem(
            "containerd's configuration",
            "containerd config dump fails",
            "run it and see what is wrong with /etc/containerd/config.toml",
        )),
    }
    findings
}

/// `containerd NAME VERSION REVISION`.
fn version_is(text: &str) -> Finding {
    const ABOUT: &str = "containerd";
    let (major, minor) = OLDEST;
    let advice = format!("Husk needs containerd {major}.{minor} or newer");
    let words = text.split_whitespace();
    let mut numbers = words.filter_map(|word| {
        let word = word.trim_start_matches('v');
        let mut numbers = word.split(['.', '-', '+', '~']);
        let mut number = || numbers.next()?.parse::<u32>().ok();
        Some((number()?, number()?))
    });
    match numbers.next() {
        Some(version) if version >= OLDEST => Finding::ok(ABOUT, text.trim()),
        Some(_) => Finding::problem(ABOUT, text.trim(), advice),
        None => Finding::warning(ABOUT, format!("version {:?}", text.trim()), advice),
    }
}

/// The CRI plugin's section; it was moved in version 3.
fn cri(config: &Table) -> Option<&Table> {
    let plugins = config.get("plugins")?;
    let section = plugins
        .get("io.containerd.cri.v1.runtime")
        .or_else(|| plugins.get("io.containerd.grpc.v1.cri"))?;
    section.get("containerd")?.as_table()
}

fn configuration(config: &Table) -> Vec<Finding> {
    let Some(cri) = cri(config) else {
        return vec![Finding::warning(
            "handler",
            "containerd runs without its CRI plugin",
            "Kubernetes cannot use it; ctr and Docker can",
        )];
    };
    let runtimes = cri.get("runtimes").and_then(Value::as_table);
    let ours = |runtime: &&Value| {
        runtime.get("runtime_type").and_then(Value::as_str) == Some("io.containerd.husk.v2")
    };
    let handler = runtimes
        .into_iter()
        .flatten()
        .find(|(_, runtime)| ours(runtime));
    let mut findings = vec![match handler {
        Some((name, _)) => Finding::ok("handler", format!("{name} is for Husk")),
        None => Finding::warning(
            "handler",
            "no handler of the CRI plugin is for Husk",
            "Kubernetes cannot ask for it: husk install; ctr and Docker need none",
        ),
    }];
    // One for the handler alone, or that of all; version 3 has it elsewhere.
    let of_all = cri.get("snapshotter").and_then(Value::as_str);
    let of_images = config
        .get("plugins")
        .and_then(|plugins| {
            plugins
                .get("io.containerd.cri.v1.images")?
                .get("snapshotter")
        })
        .and_then(Value::as_str);
    let own = handler
        .and_then(|(_, runtime)| runtime.get("snapshotter")?.as_str())
        .filter(|name| !name.is_empty());
    if let Some(name) = own.or(of_images).or(of_all) {
        findings.push(snapshotter(name));
    }
    findings
}

fn snapshotter(name: &str) -> Finding {
    const ABOUT: &str = "snapshotter";
    if SNAPSHOTTERS.contains(&name) {
        return Finding::ok(ABOUT, name);
    }
    Finding::warning(
        ABOUT,
        name,
        "not tried with Husk; whatever it hands over as an overlay, a bind mount or a disk works",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict::{self, Ok as Fine, Problem, Warning};

    fn nowhere() -> Node {
        Node::at(std::path::Path::new("/nowhere"))
    }

    fn verdicts(version: &str, config: &str) -> Vec<Verdict> {
        let installed = Installed {
            version: Some(version.to_owned()),
            config: Some(config.to_owned()),
        };
        check(&nowhere(), &installed)
            .iter()
            .map(|finding| finding.verdict)
            .collect()
    }

    #[test]
    fn knows_both_versions_of_the_configuration() {
        let old = r#"version = 2
            [plugins."io.containerd.grpc.v1.cri".containerd]
            snapshotter = "overlayfs"
            [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.husk]
            runtime_type = "io.containerd.husk.v2"
            snapshotter = """#;
        let new = r#"version = 3
            [plugins."io.containerd.cri.v1.images"]
            snapshotter = "nydus"
            [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.vm]
            runtime_type = "io.containerd.husk.v2""#;
        let none = r#"version = 3
            [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
            runtime_type = "io.containerd.runc.v2""#;
        let version = "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-1\n";
        assert_eq!(verdicts(version, old), [Fine, Fine, Fine]);
        let version = "containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7193e4";
        assert_eq!(verdicts(version, new), [Fine, Fine, Warning]);
        assert_eq!(verdicts(version, none), [Fine, Warning]);
        assert_eq!(verdicts(version, "version = 3"), [Fine, Warning]);
        assert_eq!(verdicts(version, "version = "), [Fine, Problem]);
        assert_eq!(verdicts("containerd x v1.6.20 y", old)[0], Problem);
        assert_eq!(verdicts("containerd of ours", old)[0], Warning);
        let none = check(&nowhere(), &Installed::default());
        assert_eq!((none.len(), none[0].verdict), (1, Problem));
    }
}
