//! `husk`: what an operator of a node needs besides containerd.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

mod answer;
mod arguments;
mod bench;
mod check;
mod config;
mod events;
mod inspect;
mod install;
mod logs;
mod manual;
mod memory;
mod metrics;
mod pods;
mod ps;
mod shell;
mod support;
mod template;
mod text;
mod timeline;
mod top;
mod traces;

use answer::Answer;
use arguments::{Arguments, Command};
use install::Task;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let answer = match run(arguments) {
        Ok(answer) => answer,
        Err(error) => {
            eprintln!("husk: {}", text::plain_lines(&format!("{error:#}")));
            return ExitCode::from(answer::code_of(&error));
        }
    };
    match io::stdout().write_all(answer.text.as_bytes()) {
        // Whoever reads may have seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("husk: standard output: {error}");
            ExitCode::from(answer::FAILED)
        }
        _ => ExitCode::from(answer.code),
    }
}

fn run(arguments: Arguments) -> anyhow::Result<Answer> {
    let json = arguments.json;
    match arguments.command {
        Command::Install {
            pod_annotations,
            place,
        } => {
            let task = match pod_annotations {
                true => Task::InstallWithAnnotations,
                false => Task::Install,
            };
            install::run(&place, task, json)
        }
        Command::Uninstall(place) => install::run(&place, Task::Uninstall, json),
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { dir } => manual::pages(&dir),
        Command::Logs(asked) => logs::run(&asked, json),
        Command::Events { pod } => events::run(pod.as_deref(), json),
        Command::Top(asked) => top::run(&asked, json),
        Command::Metrics(asked) => metrics::run(&asked),
        Command::Traces { otlp } => traces::run(otlp.as_ref()),
        Command::Exec(asked) => shell::run(
            shell::Asking {
                pod: &asked.pod,
                args: asked.args,
                stdin: asked.stdin,
                terminal: asked.tty,
            },
            json,
        ),
        Command::Console { pod } => shell::run(
            shell::Asking {
                pod: &pod,
                args: Vec::new(),
                stdin: true,
                terminal: true,
            },
            json,
        ),
        Command::Template(command) => template::run(&command, json),
        Command::SupportBundle { output, no_logs } => support::run(output, !no_logs),
        Command::Bench(asked) => bench::run(&asked, json),
        Command::Check => check::run(json),
        Command::Config(asked) => config::run(&asked, json),
        Command::Ps => ps::run(json),
        Command::Inspect { pod } => inspect::run(&pod, json),
        Command::Timeline { pod, svg } => timeline::run(&pod, svg, json),
    }
}
