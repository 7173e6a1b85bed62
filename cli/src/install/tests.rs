use super::*;

/// A node's `/etc`, made of files.
struct Node(tempfile::TempDir);

impl Node {
    fn with(files: &[(&str, &str)]) -> Self {
        let node = Self(tempfile::tempdir().unwrap());
        for (path, text) in files {
            let place = node.files().place(path);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::write(place, text).unwrap();
        }
        node
    }

    fn files(&self) -> Files {
        Files::at(self.0.path())
    }

    fn text(&self, path: &str) -> String {
        self.files().read(path).unwrap().unwrap_or_default()
    }

    fn run(&self, engine: Engine, what: Task) -> anyhow::Result<Answer> {
        self.run_for(&[engine], what)
    }

    fn run_for(&self, engines: &[Engine], what: Task) -> anyhow::Result<Answer> {
        let place = Place {
            engines: engines.to_vec(),
            handler: "husk".to_owned(),
            root: self.0.path().to_owned(),
            dry_run: false,
            yes: true,
            no_restart: false,
        };
        run(&place, what, false)
    }

    /// All files with what they say.
    fn all(&self) -> Vec<(PathBuf, String)> {
        let mut all = Vec::new();
        let mut dirs = vec![self.0.path().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    all.push((path.clone(), "a directory".to_owned()));
                    dirs.push(path);
                } else {
                    let text = fs::read_to_string(&path).unwrap();
                    all.push((path, text));
                }
            }
        }
        all.sort();
        all
    }

    /// Installs, again, and uninstalls; what was there is there again.
    #[track_caller]
    fn there_and_back(&self, engine: Engine) {
        let before = self.all();
        let done = self.run(engine, Task::Install).unwrap();
        assert!(done.text.contains("wrote /etc/"), "{}", done.text);
        let installed = self.all();
        assert_ne!(installed, before);
        let again = self.run(engine, Task::Install).unwrap();
        assert!(again.text.contains("nothing to do"), "{}", again.text);
        assert_eq!(self.all(), installed);
        let widened = self.run(engine, Task::InstallWithAnnotations).unwrap();
        if engine != Engine::Docker {
            assert!(widened.text.contains("wrote"), "{}", widened.text);
        }
        self.run(engine, Task::Uninstall).unwrap();
        assert_eq!(self.all(), before);
        let nothing = self.run(engine, Task::Uninstall).unwrap();
        assert!(nothing.text.contains("nothing to do"), "{}", nothing.text);
    }
}

const MAIN: &str = "/etc/containerd/config.toml";
const DROP_IN: &str = "/etc/containerd/conf.d/husk.toml";

fn runtime_type(text: &str, section: &str) -> String {
    let table: toml::Table = text.parse().unwrap();
    table["plugins"][section]["containerd"]["runtimes"]["husk"]["runtime_type"].to_string()
}

#[test]
fn version_2_gets_a_block_beside_its_settings() {
    // The second has no line break at its end, the third is of a newer containerd.
    for text in [
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"pause\"\n",
        "version = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"native\"",
        "version = 2\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n\n",
    ] {
        let node = Node::with(&[(MAIN, text)]);
        node.there_and_back(Engine::Containerd);
        node.run(Engine::Containerd, Task::Install).unwrap();
        let new = node.text(MAIN);
        assert!(new.starts_with(text), "{new}");
        assert_eq!(
            runtime_type(&new, "io.containerd.grpc.v1.cri"),
            "\"io.containerd.husk.v2\""
        );
        assert!(!new.contains("pod_annotations"));
    }
}

#[test]
fn version_3_gets_a_drop_in() {
    for (text, imports) in [
        ("version = 3\n[plugins]\n", 1),
        ("version = 3\nimports = []\n", 1),
        (
            "version = 3\nimports = ['/a.toml',\n  \"/b.toml\",]\n[grpc]\n",
            3,
        ),
        (
            "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n",
            1,
        ),
    ] {
        let node = Node::with(&[(MAIN, text)]);
        node.there_and_back(Engine::Containerd);
        node.run(Engine::Containerd, Task::Install).unwrap();
        let table: toml::Table = node.text(MAIN).parse().unwrap();
        assert_eq!(
            table["imports"].as_array().unwrap().len(),
            imports,
            "{text}"
        );
        assert_eq!(
            runtime_type(&node.text(DROP_IN), "io.containerd.cri.v1.runtime"),
            "\"io.containerd.husk.v2\""
        );
    }
}

#[test]
fn a_node_without_configuration_gets_one() {
    let node = Node::with(&[("/etc/containerd/other", "")]);
    node.there_and_back(Engine::Containerd);
    let newer = Node::with(&[("/etc/containerd/conf.d/10-other.toml", "version = 3\n")]);
    newer.there_and_back(Engine::Containerd);
    newer.run(Engine::Containerd, Task::Install).unwrap();
    assert!(newer.text(MAIN).is_empty() && !newer.text(DROP_IN).is_empty());
    // The directories go, too.
    let bare = Node::with(&[("/etc/other", "")]);
    bare.there_and_back(Engine::Containerd);
    bare.there_and_back(Engine::Crio);
}

#[test]
fn what_others_add_to_our_file_is_theirs() {
    let node = Node::with(&[("/etc/containerd/other", "")]);
    node.run(Engine::Containerd, Task::Install).unwrap();
    let made = node.text(MAIN);
    let theirs = "[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"pause\"\n";
    fs::write(node.files().place(MAIN), format!("{made}{theirs}")).unwrap();
    node.run(Engine::Containerd, Task::InstallWithAnnotations)
        .unwrap();
    let new = node.text(MAIN);
    assert!(
        new.contains(theirs) && new.contains("pod_annotations"),
        "{new}"
    );
    let again = node
        .run(Engine::Containerd, Task::InstallWithAnnotations)
        .unwrap();
    assert!(again.text.contains("nothing to do"), "{}", again.text);
    node.run(Engine::Containerd, Task::Uninstall).unwrap();
    assert_eq!(node.text(MAIN), format!("version = 2\n{theirs}"));
    // The same when nobody installed again in between.
    fs::write(node.files().place(MAIN), format!("{made}{theirs}")).unwrap();
    node.run(Engine::Containerd, Task::Uninstall).unwrap();
    assert_eq!(node.text(MAIN), format!("version = 2\n{theirs}"));
}

#[test]
fn a_link_stays_and_so_does_its_owner() {
    use std::os::unix::fs::symlink;
    let node = Node::with(&[
        ("/opt/real.toml", "version = 2\n"),
        ("/etc/containerd/x", ""),
    ]);
    let (real, link) = (
        node.0.path().join("opt/real.toml"),
        node.0.path().join(&MAIN[1..]),
    );
    symlink("../../opt/real.toml", &link).unwrap();
    fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
    // Only root may give a file away.
    let is_root = std::os::unix::fs::chown(&real, Some(12), Some(34)).is_ok();
    node.there_and_back(Engine::Containerd);
    assert!(link.is_symlink());
    // One from the root means that of the node.
    fs::remove_file(&link).unwrap();
    symlink("/opt/real.toml", &link).unwrap();
    node.run(Engine::Containerd, Task::Install).unwrap();
    assert!(link.is_symlink());
    assert!(fs::read_to_string(&real).unwrap().contains("husk"));
    let found = fs::metadata(&real).unwrap();
    assert_eq!(found.mode() & 0o777, 0o640);
    assert!(!is_root || (found.uid(), found.gid()) == (12, 34));
}

#[test]
fn dockers_copy_is_for_those_whom_the_file_is_for() {
    const FILE: &str = "/etc/docker/daemon.json";
    let node = Node::with(&[(FILE, "{\"proxies\": {}}")]);
    let place = node.files().place(FILE);
    fs::set_permissions(&place, fs::Permissions::from_mode(0o600)).unwrap();
    let is_root = std::os::unix::fs::chown(&place, Some(12), Some(34)).is_ok();
    node.run(Engine::Docker, Task::Install).unwrap();
    for path in [FILE, "/etc/docker/daemon.json.before-husk"] {
        let found = fs::metadata(node.files().place(path)).unwrap();
        assert_eq!(found.mode() & 0o777, 0o600, "{path}");
        assert!(!is_root || (found.uid(), found.gid()) == (12, 34), "{path}");
    }
}

#[test]
fn docker_forgets_every_handler_of_ours() {
    const FILE: &str = "/etc/docker/daemon.json";
    let text = "{ \"runtimes\": {\"crun\": {\"path\": \"/c\"}} }";
    let node = Node::with(&[(FILE, text)]);
    let files = node.files();
    for name in ["vm", "husk"] {
        let handler = Handler {
            name: name.to_owned(),
            pod_annotations: false,
        };
        for change in docker::install(&files, &handler).unwrap() {
            files.apply(&change).unwrap();
        }
    }
    assert!(node.text(FILE).contains("\"vm\""));
    // What it was is there until it is what it was.
    let changes = docker::uninstall(&files).unwrap();
    let paths: Vec<_> = changes.iter().map(|change| change.path.as_str()).collect();
    assert_eq!(paths, [FILE, "/etc/docker/daemon.json.before-husk"]);
    node.run(Engine::Docker, Task::Uninstall).unwrap();
    assert_eq!(node.text(FILE), text);
    assert_eq!(
        node.all().iter().filter(|(path, _)| path.is_file()).count(),
        1
    );
}

#[test]
fn what_would_break_something_is_refused() {
    let handler = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.husk]\nx = 1\n";
    let inline = "version = 2\nplugins = { \"io.containerd.grpc.v1.cri\" = { a = 1 } }\n";
    for (main, words) in [
        (format!("version = 2\n{handler}"), "already"),
        ("[plugins.cri]\n".to_owned(), "config migrate"),
        ("version = \n".to_owned(), "no TOML"),
        (inline.to_owned(), "by hand"),
    ] {
        let node = Node::with(&[(MAIN, &main)]);
        let error = node.run(Engine::Containerd, Task::Install).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(words), "{error}");
        assert_eq!(node.text(MAIN), main);
    }
    // containerd 1.7 would not see the block.
    let imports = "version = 2\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n";
    let other = "[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/x\"\n";
    let node = Node::with(&[(MAIN, imports), ("/etc/containerd/conf.d/cni.toml", other)]);
    let error = node.run(Engine::Containerd, Task::Install).unwrap_err();
    assert!(
        error.to_string().contains("cni.toml has a section"),
        "{error}"
    );
}

#[test]
fn docker_keeps_what_others_wrote() {
    const FILE: &str = "/etc/docker/daemon.json";
    for text in [
        "{}",
        "",
        "{\n\t\"debug\": true,\n\t\"bip\": \"10.0.0.1/24\"\n}",
        "{\"runtimes\": {}}",
    ] {
        Node::with(&[(FILE, text)]).there_and_back(Engine::Docker);
    }
    Node::with(&[("/etc/docker/key.json", "")]).there_and_back(Engine::Docker);
    let node = Node::with(&[(FILE, "{\"runtimes\": {\"crun\": {\"path\": \"/c\"}}}")]);
    node.there_and_back(Engine::Docker);
    node.run(Engine::Docker, Task::Install).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&node.text(FILE)).unwrap();
    assert_eq!(
        config["runtimes"]["husk"]["runtimeType"],
        "io.containerd.husk.v2"
    );
    // Changed meanwhile: that stays.
    config["debug"] = true.into();
    fs::write(node.files().place(FILE), config.to_string()).unwrap();
    node.run(Engine::Docker, Task::Uninstall).unwrap();
    let config: serde_json::Value = serde_json::from_str(&node.text(FILE)).unwrap();
    assert_eq!(
        config,
        json!({"debug": true, "runtimes": {"crun": {"path": "/c"}}})
    );
    assert!(!node.files().has("/etc/docker/daemon.json.before-husk"));
    let other = Node::with(&[(FILE, "{\"runtimes\": {\"husk\": {\"path\": \"/c\"}}}")]);
    assert!(other.run(Engine::Docker, Task::Install).is_err());
}

#[test]
fn crio_gets_a_drop_in() {
    let node = Node::with(&[("/etc/crio/crio.conf.d/10-crun.conf", "[crio]\n")]);
    node.there_and_back(Engine::Crio);
}

#[test]
fn finds_the_engines_of_the_node() {
    let node = Node::with(&[("/usr/bin/dockerd", ""), ("/etc/containerd/x", "")]);
    let files = node.files();
    assert_eq!(engines(&files, &[]), [Engine::Containerd, Engine::Docker]);
    assert_eq!(engines(&files, &[Engine::Crio]), [Engine::Crio]);
    let empty = Place {
        engines: Vec::new(),
        handler: "husk".to_owned(),
        root: tempfile::tempdir().unwrap().path().to_owned(),
        dry_run: true,
        yes: false,
        no_restart: false,
    };
    let error = run(&empty, Task::Install, false).unwrap_err();
    assert!(error.to_string().contains("--for"), "{error}");
    let nothing = run(&empty, Task::Uninstall, false).unwrap();
    assert!(nothing.text.contains("nothing to do"), "{}", nothing.text);
    let named = Place {
        handler: "../x".to_owned(),
        ..empty
    };
    assert!(run(&named, Task::Install, false).is_err());
}

#[test]
fn a_containerd_without_pods_is_left_alone() {
    // As Docker's package of containerd brings it.
    let theirs = "# nothing\ndisabled_plugins = [\"cri\"]\n";
    let node = Node::with(&[(MAIN, theirs), ("/etc/docker/x", "")]);
    node.run_for(&[], Task::Install).unwrap();
    assert_eq!(node.text(MAIN), theirs);
    assert!(node.text("/etc/docker/daemon.json").contains("husk"));
    node.run_for(&[], Task::Uninstall).unwrap();
    assert_eq!(node.text(MAIN), theirs);
    // Whoever asks for it is told.
    let named = node.run(Engine::Containerd, Task::Install);
    assert!(named.unwrap_err().to_string().contains("version = 2"));
}
