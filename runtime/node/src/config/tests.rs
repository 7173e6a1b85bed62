use super::*;

fn sources(dir: &Path) -> Sources {
    Sources {
        file: dir.join("config.toml"),
        is_named: false,
        drop_ins: Some(dir.join("conf.d")),
    }
}

#[test]
fn every_key_is_described_and_its_default_would_be_taken() {
    let defaults = Table::try_from(Config::default()).unwrap();
    let text = toml::to_string(&defaults).unwrap();
    let taken = file::parse(Path::new("f"), &text).unwrap();
    assert_eq!(taken.len(), defaults.len());
    // Those without a default have a place as well.
    let mut whole = defaults.clone();
    for key in key::KEYS
        .iter()
        .filter(|key| !defaults.contains_key(key.name))
    {
        assert_eq!(Config::default().value(key.name).as_str(), Some(NO_VALUE));
        whole.insert(key.name.to_owned(), 1.into());
    }
    assert_eq!(whole.len(), key::KEYS.len());
    let config: Config = whole.clone().try_into().unwrap();
    assert_eq!(Table::try_from(config).unwrap(), whole);
}

#[test]
fn later_files_win_key_by_key() {
    let dir = tempfile::tempdir().unwrap();
    let sources = sources(dir.path());
    assert_eq!(sources.load().unwrap(), Loaded::default());
    fs::write(
        dir.path().join("config.toml"),
        "kernel = '/k'\nvmm = '/v'\n",
    )
    .unwrap();
    let drop_ins = dir.path().join("conf.d");
    fs::create_dir(&drop_ins).unwrap();
    for (name, text) in [
        ("20-b.toml", "\nvmm = '/b'"),
        ("10-a.toml", "vmm = '/a'\nfirst_uid = 0x10_0000"),
        (".30-hidden.toml", "vmm = '/hidden'"),
        ("40-other.toml~", "vmm = '/other'"),
    ] {
        fs::write(drop_ins.join(name), text).unwrap();
    }
    let loaded = sources.load().unwrap();
    let expected = Config {
        kernel: "/k".into(),
        vmm: "/b".into(),
        first_uid: 0x10_0000,
        ..Config::default()
    };
    assert_eq!(loaded.config, expected);
    let place = &loaded.places["vmm"];
    assert_eq!(
        (place.path.clone(), place.line),
        (drop_ins.join("20-b.toml"), 2)
    );
    assert_eq!(loaded.places.len(), 3);
    assert_eq!(loaded.files.len(), 3);
}

#[test]
fn a_named_file_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut sources = sources(dir.path());
    sources.is_named = true;
    let error = sources.load().unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }), "{error}");
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
fn no_two_processes_are_the_same_user() {
    let first = Config::default().first_uid;
    // As docs/configuration.md has it.
    let last = first + 8_388_607;
    for (namespace, expected) in [
        (0, None),
        // The node's own, in which nobody is alone.
        (0xefff_fffc, None),
        (0xf000_0000, Some(first)),
        (0xf000_0001, Some(first + 1)),
        (0xf07f_ffff, Some(last)),
        (0xf080_0000, None),
        (u64::from(u32::MAX), None),
        (0x1_f000_0000, None),
        (u64::MAX, None),
    ] {
        assert_eq!(uid(first, namespace), expected, "{namespace:#x}");
    }
    // However high the first is.
    let error = file::parse(Path::new("f"), "first_uid = 4286578686");
    assert!(error.is_err());
    let most = "first_uid = 4286578685";
    assert!(file::parse(Path::new("f"), most).is_ok());
    assert!(uid(4_286_578_685, 0xf07f_ffff).is_some_and(|uid| uid < u32::MAX - 1));
}

#[test]
fn names_what_is_wrong_in_one_line() {
    let path = Path::new("/etc/husk/config.toml");
    let cases = [
        (
            "vmm = '/v'\nkernal = '/k'",
            "line 2: unknown key `kernal`; did you mean `kernel`?",
        ),
        ("boot_timeout = 3", "did you mean `boot_timeout_seconds`?"),
        (
            "memory = 3",
            "unknown key `memory`; known are vmm, file_server",
        ),
        ("\"a\\u001Bb\" = 3", "unknown key `a\\u{1b}b`"),
        (
            "first_uid = 'x'",
            "line 1: `first_uid` is a string; it must be a whole number from 65536 to",
        ),
        ("first_uid = 0", "`first_uid` is 0; it must be"),
        ("first_uid = 99999999999999999999", "it must be"),
        ("boot_timeout_seconds = 3601", "from 1 to 3600"),
        (
            "disk_kib_per_second = 0",
            "`disk_kib_per_second` is 0; it must be a whole number from 1 to 4294967295",
        ),
        (
            "vmm = 'bin/vmm'",
            "`vmm` is \"bin/vmm\"; it must be an absolute path",
        ),
        ("vmm = ['/v']", "`vmm` is a list; it must be"),
        ("kernel_parameters = \"a\\u0007\"", "it must be printable"),
        ("[vmm]\nx = 1", "`vmm` is a table"),
        (
            "debug_shell = 'yes'",
            "`debug_shell` is a string; it must be true or false",
        ),
        (
            "debug_shell = 1",
            "`debug_shell` is a whole number; it must be",
        ),
        ("kernel = ", "line 1: "),
        ("vmm = '/a'\nvmm = '/b'", "line 2: "),
    ];
    for (text, expected) in cases {
        let error = first(file::parse(path, text).unwrap_err()).to_string();
        assert!(
            error.starts_with("configuration /etc/husk/config.toml, line "),
            "{error}"
        );
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn tells_everything_that_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    fs::write(&path, "vmm = 3\nkernle = 4\nfirst_uid = -1\n").unwrap();
    let errors = check(&path).unwrap_err();
    let lines: Vec<_> = errors
        .iter()
        .map(|error| match error {
            ConfigError::Parse { line, .. } => *line,
            ConfigError::Read { .. } => 0,
        })
        .collect();
    assert_eq!(lines, [1, 2, 3]);
    fs::write(&path, "vmm = '/v'\n").unwrap();
    assert!(check(&path).is_ok());
    assert!(check(dir.path()).is_err());
}
