//! The operator's command and the guest: shells in it, the machines that it begins
//! as, and how it ends.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Bench, Case, PROGRAM, Skip, husk, husk_case, json, listed};
use crate::drop_in::DropIn;
use crate::process::{self, OnTerminal, eventually};
use crate::template;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    husk_case("cli/exec", 60, exec),
    husk_case("cli/console", 60, console),
    husk_case("cli/template", 120, templates),
    husk_case("cli/ended", 40, ended),
];

/// Shells are allowed; the node's templates stay what they are.
const SHELLS: &str = "debug_shell = true\ntemplate_max_age_seconds = 0\n";
const TEMPLATES: &str = "/run/husk-cli-templates";

/// A pod that sleeps.
fn pod(bench: &Bench) -> Result<String> {
    let id = bench.id();
    bench.ctr.run_detached(&[], &id, &["sleep", "1000"])?.ok()?;
    Ok(id)
}

fn exec(bench: &Bench) -> Result<()> {
    let before = pod(bench)?;
    let refused = husk(bench, &["exec", &before, "--", "true"])?.expect_code(125)?;
    ensure!(
        refused.err().contains("debug_shell = true"),
        "{}",
        refused.tail()
    );

    let on = DropIn::with(SHELLS)?;
    let refused = husk(bench, &["exec", &before, "--", "true"])?.expect_code(125)?;
    ensure!(
        refused.err().contains("the pod began while"),
        "{}",
        refused.tail()
    );
    let id = pod(bench)?;
    let run = |words: &[&str]| husk(bench, &[&["exec", &id, "--"], words].concat());
    let machine = json(bench, &["inspect", &id])?["machine"].clone();
    let kernel = run(&["uname", "-r"])?.ok()?;
    ensure!(
        machine["kernel_release"] == kernel.out().trim(),
        "{}",
        kernel.tail()
    );
    // The guest's own first process, and the container's file system from outside.
    let agent = run(&["readlink", "/proc/1/exe"])?.ok()?;
    ensure!(agent.out() == "/init\n", "{}", agent.tail());
    let containers = run(&["ls", "/run/husk/shared"])?.ok()?;
    ensure!(containers.out().contains(&id), "{}", containers.tail());
    run(&["sh", "-c", "echo out; echo err >&2; exit 7"])?.expect_code(7)?;
    run(&["no-such-program"])?.expect_code(127)?;
    // Nothing can be left in what all containers' agent runs from.
    run(&["touch", "/bin/new"])?.expect_code(1)?;
    let mut command = Command::new(PROGRAM);
    let mut cat = process::start(command.args(["exec", "-i", &id, "--", "cat"]))?;
    let text = "line\n".repeat(100_000);
    cat.write(text.as_bytes())?;
    let done = cat.finish(bench.seconds(20))?.ok()?;
    ensure!(
        done.out() == text,
        "{} of {} bytes",
        done.stdout.len(),
        text.len()
    );
    // What runs there ends with whoever asked for it.
    let mut command = Command::new(PROGRAM);
    let sleep = process::start(command.args(["exec", &id, "--", "sleep", "54321"]))?;
    let is_there = || anyhow::Ok(run(&["ps"])?.ok()?.out().contains("sleep 54321"));
    eventually("the program", bench.seconds(10), || {
        Ok(is_there()?.then_some(()))
    })?;
    sleep.signal(nix::sys::signal::Signal::SIGKILL)?;
    sleep.wait(bench.seconds(10))?;
    eventually("the program's end", bench.seconds(10), || {
        Ok((!is_there()?).then_some(()))
    })?;
    bench.ctr.exec(&[], &id, "still", &["true"])?.ok()?;
    bench.ctr.remove(&id)?;
    drop(on);
    bench.ctr.remove(&before)
}

fn console(bench: &Bench) -> Result<()> {
    let _on = DropIn::with(SHELLS)?;
    let id = pod(bench)?;
    if !fs::exists(PROGRAM)? {
        return Err(Skip(format!("no {PROGRAM}")).into());
    }
    let mut command = Command::new(PROGRAM);
    command.args(["console", &id]).env("TERM", "vt100");
    let mut terminal = OnTerminal::start(&mut command, 40, 100)?;
    terminal.write("stty size; echo $TERM; tty\n")?;
    terminal.read_until("/dev/pts/", bench.seconds(20))?;
    terminal.resize(25, 80)?;
    terminal.write("until stty size | grep '25 80'; do sleep 1; done; echo re''sized\n")?;
    terminal.read_until("resized", bench.seconds(20))?;
    // Ctrl-C is for what runs in front, and not for the command.
    terminal.write("echo wa''its; sleep 1000\n")?;
    terminal.read_until("waits", bench.seconds(10))?;
    std::thread::sleep(bench.seconds(1));
    terminal.write("\u{3}")?;
    terminal.write("echo wo''ken\n")?;
    terminal.read_until("woken", bench.seconds(10))?;
    terminal.write("exit 9\n")?;
    let (shown, code) = terminal.finish(bench.seconds(10))?;
    ensure!(code == 9, "exit code {code}: {shown}");
    let mut terminal = OnTerminal::start(&mut command, 40, 100)?;
    terminal.write("echo re''ady\n")?;
    terminal.read_until("ready", bench.seconds(20))?;
    terminal.write("\u{1d}")?;
    let (shown, code) = terminal.finish(bench.seconds(10))?;
    ensure!(code == 125, "exit code {code}: {shown}");
    bench.ctr.remove(&id)
}

/// Templates of the case's own are gone with it.
struct OwnTemplates<'a>(&'a Bench, DropIn);

impl Drop for OwnTemplates<'_> {
    fn drop(&mut self) {
        let _ = template::await_maker(self.0.seconds(30));
        let _ = fs::remove_dir_all(TEMPLATES);
    }
}

fn templates(bench: &Bench) -> Result<()> {
    let settings = format!(
        "template_max_age_seconds = 3600\ntemplate_dir = \"{TEMPLATES}\"\ndebug_shell = true\n"
    );
    let _own = OwnTemplates(bench, DropIn::with(&settings)?);
    let list = || json(bench, &["template", "list"]);
    ensure!(list()?["templates"] == serde_json::json!([]), "{}", list()?);
    let mut command = Command::new(PROGRAM);
    if !fs::exists(PROGRAM)? {
        return Err(Skip(format!("no {PROGRAM}")).into());
    }
    let built = process::run(command.args(["template", "build"]), bench.seconds(60))?.ok()?;
    ensure!(built.out().starts_with("made "), "{}", built.tail());
    let id = pod(bench)?;
    let machine = json(bench, &["inspect", &id])?["machine"].clone();
    let templates = list()?["templates"].clone();
    let all = templates.as_array().context("no list")?;
    ensure!(all.len() == 2, "{templates}");
    for template in all {
        let is_its = machine["from_template"] == true && machine["template"] == template["name"];
        ensure!(template["fits"] == true, "{template}");
        ensure!(template["pods"] == u32::from(is_its), "{template}");
        ensure!(template["bytes"].as_u64() > Some(8 << 20), "{template}");
    }
    ensure!(
        all.iter().any(|template| template["pods"] == 1),
        "{templates}"
    );
    // As the template is, so is its copy.
    husk(bench, &["exec", &id, "--", "sh", "-c", "exit 5"])?.expect_code(5)?;
    // The pod keeps what it has mapped.
    let dropped = husk(bench, &["template", "drop"])?.ok()?;
    ensure!(dropped.out().starts_with("dropped "), "{}", dropped.tail());
    ensure!(list()?["templates"] == serde_json::json!([]), "{}", list()?);
    let much = ["sh", "-c", "head -c 50000000 /dev/urandom | sha256sum"];
    bench.ctr.exec(&[], &id, "goes-on", &much)?.ok()?;
    bench.ctr.remove(&id)
}

fn ended(bench: &Bench) -> Result<()> {
    let id = bench.id();
    let flags = ["--privileged"];
    bench
        .ctr
        .run_detached(&flags, &id, &["sleep", "1000"])?
        .ok()?;
    let panic = "[ -w /proc/sysrq-trigger ] || exit 99; echo c > /proc/sysrq-trigger";
    let done = bench.ctr.exec(&[], &id, "panic", &["sh", "-c", panic])?;
    if done.code() == 99 {
        bench.ctr.remove(&id)?;
        return Err(Skip("the guest has no sysrq".into()).into());
    }
    let pod = eventually("the pod's end", bench.seconds(10), || {
        let pod = listed(bench, &id)?.context("it is gone altogether")?;
        Ok((pod["status"] == "ended" && !pod["end"].is_null()).then_some(pod))
    })?;
    ensure!(pod["end"] == "the guest's kernel panicked", "{pod}");
    let shown = husk(bench, &["inspect", &id])?.ok()?;
    let lines = shown.out();
    ensure!(
        lines.contains(": the guest's kernel panicked") && lines.contains("\nconsole "),
        "{}",
        shown.tail()
    );
    bench.ctr.remove(&id)
}
