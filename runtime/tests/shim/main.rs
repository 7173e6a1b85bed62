//! The shim's real program, driven at its edges: containerd on one side, a
//! pretended VMM with a pretended agent on the other. This program is all three,
//! told apart by its arguments.

// A failed test is a panic.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agent;
mod case;
mod cgroups;
mod containerd;
mod crio;
mod devices;
mod ends;
mod errors;
mod faults;
mod guest_shell;
mod hostile;
mod image;
mod interfaces;
mod joined;
mod liar;
mod lifecycle;
mod names;
mod program;
mod sandbox;
mod scarce;
mod second_line;
mod shell;
mod stuck;
mod template;
mod traces;
mod users;
mod vmm;
mod volumes;

use std::process::ExitCode;

type Case = (&'static str, fn());

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("--uid") => {
            vmm::run();
            return ExitCode::SUCCESS;
        }
        Some("--socket-fd") => {
            vmm::serve_files();
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let cases: Vec<Case> = [
        program::CASES,
        errors::CASES,
        image::CASES,
        faults::CASES,
        scarce::CASES,
        lifecycle::CASES,
        cgroups::CASES,
        ends::CASES,
        sandbox::CASES,
        crio::CASES,
        joined::CASES,
        names::CASES,
        interfaces::CASES,
        devices::CASES,
        volumes::CASES,
        users::CASES,
        template::CASES,
        liar::CASES,
        hostile::CASES,
        second_line::CASES,
        shell::CASES,
        stuck::CASES,
        traces::CASES,
    ]
    .concat();
    if !rustix::process::geteuid().is_root() {
        println!("skipped: the shim's tests need root");
        return ExitCode::SUCCESS;
    }
    let filter = arguments.iter().find(|argument| !argument.starts_with('-'));
    let mut ended = [0, 0];
    for (name, case) in cases {
        if filter.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        let began = std::time::Instant::now();
        let passed = std::panic::catch_unwind(case).is_ok();
        let word = if passed { "ok" } else { "FAILED" };
        println!("{name} ... {word} ({} ms)", began.elapsed().as_millis());
        ended[usize::from(!passed)] += 1;
    }
    let [passed, failed] = ended;
    println!("{passed} passed, {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}
