//! Standard streams and terminals of `ctr run` and `ctr task exec`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Bench, Case, case};
use crate::process;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("stdio/stdin", 20, stdin),
    case("stdio/bulk-out", 120, bulk_out),
    case("stdio/bulk-in", 120, bulk_in),
    case("stdio/bulk-both-ways", 180, bulk_both_ways),
    case("stdio/backpressure", 30, backpressure),
    case("stdio/early-end", 30, early_end),
    case("stdio/terminal", 30, terminal),
    case("stdio/terminal-keys", 30, terminal_keys),
    case("stdio/exec-terminal", 30, exec_terminal),
    case("stdio/detach-attach", 30, detach_attach),
    case("stdio/log-program", 30, log_program),
    case("stdio/log-file", 30, log_file),
];

fn stdin(bench: &Bench) -> Result<()> {
    let id = bench.id();
    let script = "cat; echo at the end";
    let mut running = bench.ctr.start(&[], &id, &["sh", "-c", script])?;
    running.write(b"a line\nand no newline")?;
    // ctr forgets an end of input that it sees before it has the task.
    bench.ctr.await_state(&id, "RUNNING", bench.seconds(15))?;
    thread::sleep(Duration::from_millis(500));
    let done = running.finish(bench.ctr.deadline())?.ok()?;
    ensure!(
        done.out() == "a line\nand no newlineat the end\n",
        "{}",
        done.tail()
    );
    Ok(())
}

fn bulk_bytes(bench: &Bench) -> u64 {
    bench.node.bulk_mib << 20
}

/// The probe that the image holds, on the host's side of a pipe.
fn probe(bench: &Bench, command: &str, bytes: u64) -> std::process::Command {
    let mut probe = std::process::Command::new(bench.node.work.join("probe"));
    probe.arg(command).arg(bytes.to_string());
    probe
}

fn bulk_out(bench: &Bench) -> Result<()> {
    let bytes = bulk_bytes(bench);
    let mut source =
        bench
            .ctr
            .run_rm_command(&[], &bench.id(), &["probe", "pattern", &bytes.to_string()]);
    let mut source = source.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let pipe = source.stdout.take().context("piped")?;
    let mut check = probe(bench, "check", bytes);
    let check = check.stdin(pipe).output()?;
    let ended = source.wait()?;
    ensure!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stderr)
    );
    ensure!(ended.success(), "ctr: {ended}");
    Ok(())
}

fn bulk_in(bench: &Bench) -> Result<()> {
    let bytes = bulk_bytes(bench);
    let mut source = probe(bench, "pattern", bytes)
        .stdout(Stdio::piped())
        .spawn()?;
    let pipe = source.stdout.take().context("piped")?;
    let mut sink =
        bench
            .ctr
            .run_rm_command(&[], &bench.id(), &["probe", "check", &bytes.to_string()]);
    let done = sink.stdin(pipe).output()?;
    source.wait()?;
    let (out, err) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    ensure!(
        done.status.success() && out == format!("{bytes} bytes as expected\n"),
        "{out}{err}"
    );
    Ok(())
}

fn bulk_both_ways(bench: &Bench) -> Result<()> {
    let bytes = bulk_bytes(bench);
    let mut source = probe(bench, "pattern", bytes)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut through = bench.ctr.run_rm_command(&[], &bench.id(), &["cat"]);
    let mut through = through
        .stdin(source.stdout.take().context("piped")?)
        .stdout(Stdio::piped())
        .spawn()?;
    let check = probe(bench, "check", bytes)
        .stdin(through.stdout.take().context("piped")?)
        .output()?;
    source.wait()?;
    let ended = through.wait()?;
    ensure!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stderr)
    );
    ensure!(ended.success(), "ctr: {ended}");
    Ok(())
}

/// A reader that does not read must stop the writer, not lose or hoard.
fn backpressure(bench: &Bench) -> Result<()> {
    let (id, folder) = (bench.id(), bench.folder());
    let mount = format!(
        "type=bind,src={},dst=/mnt,options=rbind:rw",
        folder.display()
    );
    let script = "i=0; while [ $i -lt 4096 ]; do probe pattern 65536; i=$((i+1)); echo $i > /mnt/written; done";
    let mut command = bench
        .ctr
        .run_rm_command(&["--mount", &mount], &id, &["sh", "-c", script]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let blocks = || -> u64 {
        let text = std::fs::read_to_string(folder.join("written")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    process::eventually("the container writes", bench.seconds(10), || {
        Ok((blocks() > 0).then_some(()))
    })?;
    let mut last = blocks();
    process::eventually("the writer stops", bench.seconds(10), || {
        thread::sleep(Duration::from_secs(1));
        let now = blocks();
        Ok((std::mem::replace(&mut last, now) == now).then_some(()))
    })?;
    // Pipes and sockets on the way hold some, 32 MiB is no pipe.
    ensure!(
        last < 512,
        "{last} blocks of 64 KiB written that nobody has read"
    );
    drop(child.stdout.take());
    bench
        .ctr
        .call(&["task", "kill", "--signal", "SIGKILL", &id])?
        .ok()?;
    child.wait()?;
    Ok(())
}

/// A process that ends without reading its input must not hang the client.
fn early_end(bench: &Bench) -> Result<()> {
    let mut running = bench
        .ctr
        .start(&[], &bench.id(), &["sh", "-c", "echo done; exit 3"])?;
    let mut stdin = running.take_stdin()?;
    let writer = thread::spawn(move || {
        let block = vec![0; 1 << 16];
        // Ends with an error once nobody reads any more.
        for _ in 0..64 {
            if stdin.write_all(&block).is_err() {
                break;
            }
        }
    });
    let done = running.wait(bench.ctr.deadline())?.expect_code(3)?;
    ensure!(done.out() == "done\n", "{}", done.tail());
    ensure!(writer.join().is_ok());
    Ok(())
}

fn terminal(bench: &Bench) -> Result<()> {
    let script = "test -t 0 && test -t 1 && test -t 2 && echo on a terminal; stty size; echo name $(tty); exit 5";
    let terminal = bench
        .ctr
        .run_on_terminal(&[], &bench.id(), &["sh", "-c", script])?;
    let (shown, code) = terminal.finish(bench.ctr.deadline())?;
    ensure!(shown.contains("on a terminal\r"), "{shown:?}");
    ensure!(shown.contains("name /dev/"), "{shown:?}");
    ensure!(code == 5, "exit code {code}: {shown}");
    Ok(())
}

fn terminal_keys(bench: &Bench) -> Result<()> {
    let wait = bench.ctr.deadline();
    let mut terminal = bench.ctr.run_on_terminal(&[], &bench.id(), &["sh"])?;
    terminal.write("echo started\n")?;
    terminal.read_until("\nstarted", wait)?;
    // ^C reaches the foreground process, not the shell.
    terminal.write("echo now-$((40 + 2)); sleep 1000\n")?;
    terminal.read_until("now-42", wait)?;
    thread::sleep(Duration::from_secs(1));
    terminal.write("\x03")?;
    terminal.write("echo $?\n")?;
    terminal.read_until("130", wait)?;
    // ctr learns of a new size by SIGWINCH and passes it on.
    terminal.resize(41, 141)?;
    terminal.write("sleep 1; stty size\n")?;
    // An end of input is one for the shell only once it prompts for a line.
    let shown = terminal.read_until("41 141", wait)?;
    if !shown
        .rsplit("41 141")
        .next()
        .is_some_and(|after| after.contains("# "))
    {
        terminal.read_until("# ", wait)?;
    }
    terminal.write("\x04")?;
    let (shown, code) = terminal.finish(wait)?;
    ensure!(code == 130 || code == 0, "exit code {code}: {shown}");
    Ok(())
}

fn exec_terminal(bench: &Bench) -> Result<()> {
    let id = bench.id();
    bench.ctr.run_detached(&[], &id, &["sleep", "1000"])?;
    let mut command = bench.ctr.exec_command(&["--tty"], &id, "shell", &["sh"]);
    let mut terminal = process::OnTerminal::start(&mut command, 25, 90)?;
    terminal.write("tty && echo term-$((40 + 2)); exit 9\n")?;
    let (shown, code) = terminal.finish(bench.ctr.deadline())?;
    ensure!(shown.contains("term-42"), "{shown}");
    ensure!(code == 9, "exit code {code}: {shown}");
    bench.ctr.remove(&id)
}

fn detach_attach(bench: &Bench) -> Result<()> {
    let id = bench.id();
    let mut run = bench.ctr.run_command(
        &["--detach"],
        &id,
        &["sh", "-c", "read line; echo got $line; exit 6"],
    );
    // Not /dev/null for the container: ctr makes fifos, and attach opens them.
    process::run(&mut run, bench.ctr.deadline())?.ok()?;
    let mut attached = process::start(&mut bench.ctr.command(&["task", "attach", &id]))?;
    attached.write(b"a word\n")?;
    let done = attached.wait(bench.ctr.deadline())?.expect_code(6)?;
    ensure!(done.out() == "got a word\n", "{}", done.tail());
    if bench.ctr.state(&id)?.is_some() {
        bench.ctr.call(&["task", "delete", &id])?;
    }
    bench.ctr.call(&["container", "delete", &id])?.ok()?;
    Ok(())
}

/// As nerdctl has its containers logged.
fn log_program(bench: &Bench) -> Result<()> {
    let (program, log) = (bench.folder().join("logger"), bench.folder().join("log"));
    let text = "#!/bin/sh\nexec 5>&-\n\
        cat <&4 > $2.err & { echo \"$CONTAINER_NAMESPACE $CONTAINER_ID\"; cat <&3; } > $2\nwait\n";
    fs::write(&program, text)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let uri = format!("binary://{}?to={}", program.display(), log.display());
    let id = bench.id();
    let script = "seq 1 20000; echo a complaint >&2; exit 5";
    bench
        .ctr
        .run(&["--log-uri", &uri], &id, &["sh", "-c", script])?
        .expect_code(5)?;
    let text = fs::read_to_string(&log)?;
    let mut lines = text.lines();
    let owner = lines.next().unwrap_or_default();
    ensure!(
        owner == format!("{} {id}", crate::node::NAMESPACE),
        "{owner:?}"
    );
    let numbers = lines.map(str::parse).collect::<Result<Vec<u32>, _>>()?;
    ensure!(
        numbers.iter().copied().eq(1..=20000),
        "{} lines, the last {:?}",
        numbers.len(),
        numbers.last()
    );
    let complaints = fs::read_to_string(log.with_extension("err"))?;
    ensure!(complaints == "a complaint\n", "{complaints:?}");

    let missing = bench.ctr.run(
        &["--log-uri", "binary:///no/such/logger"],
        &bench.id(),
        &["true"],
    )?;
    ensure!(
        missing.code() != 0 && missing.tail().contains("/no/such/logger"),
        "{}",
        missing.tail()
    );
    Ok(())
}

fn log_file(bench: &Bench) -> Result<()> {
    let log = bench.folder().join("log");
    let uri = format!("file://{}", log.display());
    let script = "echo out; echo err >&2";
    for _ in 0..2 {
        bench
            .ctr
            .run(&["--log-uri", &uri], &bench.id(), &["sh", "-c", script])?
            .ok()?;
    }
    let text = fs::read_to_string(&log)?;
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    ensure!(lines == ["err", "err", "out", "out"], "{text:?}");
    Ok(())
}
