//! What goes in and out of a container as Kubernetes asks for it, and what is
//! said when nothing runs.

use std::fs;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::case::{Bench, Case, case};
use crate::pod::Pod;
use crate::process::{self, eventually};
use crate::stream::{Stream, channel};
use crate::tasks::Tasks;
use crate::tasks::api::Mount;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("lifecycle/stdin-once", 40, stdin_once),
    case("lifecycle/terminal-size", 40, terminal_size),
    case("lifecycle/exec-refused", 40, exec_refused),
    case("lifecycle/log-bytes", 60, log_bytes),
];

/// `stdinOnce`: the first client's end is the end of the input.
fn stdin_once(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let mut config = pod.container(&["sh", "-c", "cat; echo at the end; exit 3"]);
    (config.stdin, config.stdin_once) = (true, true);
    let container = pod.start_config(&cri, &config)?;
    let mut stream = Stream::open(&cri.attach_url(&container, false)?)?;
    stream.send(channel::STDIN, b"a word\n")?;
    stream.until_text(channel::STDOUT, "a word\n", bench.seconds(10))?;
    drop(stream);
    let status = pod.await_exit(&cri, &container)?;
    ensure!(status.exit_code == 3, "{status:?}");
    pod.await_log(&cri, &container, "stdout F at the end")?;
    pod.remove(&cri)
}

/// The mounts of a snapshot, from the commands that `ctr` shows.
fn mounts(bench: &Bench, snapshot: &str) -> Result<Vec<Mount>> {
    let shown = bench
        .ctr
        .call(&["snapshots", "mounts", "/mnt", snapshot])?
        .ok()?
        .out();
    let mount = |line: &str| -> Result<Mount> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["mount", "-t", kind, source, _, rest @ ..] = &words[..] else {
            anyhow::bail!("a mount of another form: {line}");
        };
        let options = rest.iter().filter(|word| **word != "-o");
        Ok(Mount {
            r#type: (*kind).to_owned(),
            source: (*source).to_owned(),
            options: options
                .flat_map(|word| word.split(','))
                .map(str::to_owned)
                .collect(),
            ..Default::default()
        })
    };
    shown.lines().map(mount).collect()
}

/// Reads what has come, until it holds `wanted`.
fn read_until(fifo: &mut File, wanted: &str, patience: Duration) -> Result<()> {
    let mut seen = Vec::new();
    let done = eventually(&format!("{wanted:?} on the terminal"), patience, || {
        let mut block = [0; 4096];
        // Nothing there is an error of a descriptor that does not wait.
        while let Ok(length @ 1..) = fifo.read(&mut block) {
            seen.extend(&block[..length]);
        }
        Ok(String::from_utf8_lossy(&seen)
            .contains(wanted)
            .then_some(()))
    });
    done.with_context(|| format!("shown: {:?}", String::from_utf8_lossy(&seen)))
}

/// A client may tell its terminal's size to a container that it has not started.
fn terminal_size(bench: &Bench) -> Result<()> {
    let (id, ctr) = (bench.id(), &bench.ctr);
    let script = "stty size; until [ \"$(stty size)\" = '44 144' ]; do sleep 0.1; done; \
                  echo resized; sleep 1000";
    let runtime = bench.runtime.ctr_name();
    let create = ["container", "create", "--tty", "--runtime", runtime];
    let command = [crate::image::BASE, &id, "sh", "-c", script];
    ctr.call(&[&create[..], &command].concat())?.ok()?;
    // ctr removes the fifo, and its folder when that is empty.
    let streams = bench.folder().join("streams");
    fs::create_dir(&streams)?;
    let output = streams.join("output");
    mkfifo(&output, Mode::S_IRWXU)?;
    let open = |path: &Path| {
        let mut options = OpenOptions::new();
        // Writable, too: so it has no end until this is dropped.
        options.read(true).write(true);
        options.custom_flags(libc::O_NONBLOCK).open(path)
    };
    let mut fifo = open(&output)?;
    let tasks = Tasks::connect(bench.node.socket.clone(), ctr.deadline())?;
    tasks.create_on_terminal(&id, mounts(bench, &id)?, &output)?;
    ensure!(ctr.state(&id)? == Some("CREATED"), "{:?}", ctr.state(&id)?);
    tasks.resize(&id, 113, 37)?;
    tasks.start(&id)?;
    let wait = bench.seconds(10);
    read_until(&mut fifo, "37 113\r\n", wait)?;
    tasks.resize(&id, 144, 44)?;
    read_until(&mut fifo, "resized\r\n", wait)?;
    ctr.remove(&id)
}

/// What can't be executed: within a second more than what can, with the reason
/// in the words that clients tell exit codes 127 and 126 by.
fn exec_refused(bench: &Bench) -> Result<()> {
    const MISSING: &[&str] = &["executable file not found", "no such file or directory"];
    const UNFIT: &[&str] = &["permission denied", "is a directory"];
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let prepare = "printf '#!/no/such/shell\\n' > /tmp/lost; echo text > /tmp/text; \
                   chmod 755 /tmp/lost /tmp/text; echo ready; exec sleep 1000";
    let container = pod.start(&cri, &["sh", "-c", prepare])?;
    pod.await_log(&cri, &container, "ready")?;
    let begun = Instant::now();
    cri.exec_sync(&container, &["true"], 10)?.ok()?;
    let usual = begun.elapsed();
    for (command, reasons) in [
        ("no-such-command", MISSING),
        ("/no/such/command", MISSING),
        ("/tmp/lost", MISSING),
        ("/bin/not-executable", UNFIT),
        ("/etc", UNFIT),
        ("/tmp/text", &["exec format error"]),
    ] {
        let begun = Instant::now();
        let refused = cri.exec_sync(&container, &[command], 10);
        let extra = begun.elapsed().saturating_sub(usual);
        let said = match refused {
            Ok(done) => format!("it worked: {done:?}"),
            Err(error) => format!("{error:#}"),
        };
        ensure!(
            said.contains(command)
                && reasons
                    .iter()
                    .any(|reason| said.to_lowercase().contains(reason)),
            "{command}: {said}"
        );
        ensure!(
            extra < Duration::from_secs(1),
            "{command}: answered after {extra:?} more than an exec that works"
        );
    }
    // None of them stays in the way.
    cri.exec_sync(&container, &["true"], 10)?.ok()?;
    pod.remove(&cri)
}

/// What a container wrote, from the lines of its log.
fn logged(bytes: &[u8]) -> Vec<u8> {
    let mut written = Vec::new();
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let mut fields = line.splitn(4, |byte| *byte == b' ').skip(2);
        let (tag, text) = (
            fields.next().unwrap_or_default(),
            fields.next().unwrap_or_default(),
        );
        let text = match tag {
            b"P" => text.strip_suffix(b"\n").unwrap_or(text),
            _ => text,
        };
        written.extend(text);
    }
    written
}

/// A line of 1 MB, and bytes that are no text.
fn log_bytes(bench: &Bench) -> Result<()> {
    const LONG: usize = 1 << 20;
    const BINARY: &str = "5000";
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let script = format!(
        "head -c {LONG} /dev/zero | tr '\\0' x; echo; probe pattern {BINARY}; echo; echo the end"
    );
    let container = pod.start(&cri, &["sh", "-c", &script])?;
    let status = pod.await_exit(&cri, &container)?;
    ensure!(status.exit_code == 0, "{status:?}");
    let pattern = process::run(
        std::process::Command::new(bench.node.work.join("probe")).args(["pattern", BINARY]),
        bench.seconds(10),
    )?
    .ok()?
    .stdout;
    let mut expected = vec![b'x'; LONG];
    expected.push(b'\n');
    expected.extend(&pattern);
    expected.extend(b"\nthe end\n");
    let file = pod.log_file(&cri, &container)?;
    let seen = eventually("the end of the log", bench.seconds(10), || {
        let seen = logged(&fs::read(&file)?);
        Ok(seen.ends_with(b"the end\n").then_some(seen))
    })?;
    let same = seen
        .iter()
        .zip(&expected)
        .take_while(|(seen, expected)| seen == expected)
        .count();
    ensure!(
        seen == expected,
        "{} bytes, expected {}; the first {same} are the same",
        seen.len(),
        expected.len()
    );
    pod.remove(&cri)
}
