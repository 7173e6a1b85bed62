//! Programs in a guest, against a pretended shim.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use husk_node::shell::{self, Asked, Request, Told};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use super::node::{Node, Part, expect, json, out};

const POD: &str = "0123abc";

/// A pod that runs.
struct Pod {
    node: Node,
    _parts: [Part; 2],
}

impl Pod {
    fn new() -> Self {
        let node = Node::new();
        let parts = [(); 2].map(|()| Part::start(&["sleep", "100"]));
        let state = serde_json::json!({
            "shim": parts[0].value(),
            "vmm": parts[1].value(),
            "machine": {},
            "timeline": {"guest_entered_ns": 1},
        });
        node.pod(POD, &state.to_string());
        Self {
            node,
            _parts: parts,
        }
    }

    /// Answers the next that asks, in the pod's directory.
    fn serve(&self, answer: impl FnOnce(UnixStream) + Send + 'static) {
        let socket = self
            .node
            .path()
            .join("state/k8s.io")
            .join(POD)
            .join(shell::SOCKET);
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(socket).unwrap();
        thread::spawn(move || answer(listener.accept().unwrap().0));
    }
}

fn asked(stream: &mut UnixStream) -> Option<Asked> {
    let (kind, rest) = shell::read(stream).unwrap()?;
    Some(Asked::parse(kind, rest).unwrap())
}

fn request(stream: &mut UnixStream) -> Request {
    match asked(stream) {
        Some(Asked::Run(request)) => request,
        other => panic!("{other:?}"),
    }
}

fn tell(stream: &mut UnixStream, told: &[Told]) {
    for told in told {
        stream.write_all(&told.frame()).unwrap();
    }
}

#[test]
fn a_program_ends_as_it_does_in_the_guest() {
    let pod = Pod::new();
    pod.serve(|mut stream| {
        let request = request(&mut stream);
        assert_eq!(request.args, ["ls", "-l", "--json"]);
        assert!(!request.stdin && request.terminal.is_none());
        let told = [
            Told::Output(b"out\x1b[1m".to_vec()),
            Told::Errors(b"err\n".to_vec()),
            Told::Exit(42),
        ];
        tell(&mut stream, &told);
    });
    let done = pod.node.husk(&["exec", "0123", "--", "ls", "-l", "--json"]);
    expect(&done, 42, "err\n");
    assert_eq!(out(&done), "out\x1b[1m");
}

#[test]
fn input_is_passed_on_where_it_is_wanted() {
    let pod = Pod::new();
    pod.serve(|mut stream| {
        assert!(request(&mut stream).stdin);
        let mut text = Vec::new();
        loop {
            match asked(&mut stream) {
                Some(Asked::Input(bytes)) => text.extend(bytes),
                Some(Asked::EndOfInput) => break,
                other => panic!("{other:?}"),
            }
        }
        for part in text.chunks(shell::LONGEST) {
            tell(&mut stream, &[Told::Output(part.to_vec())]);
        }
        tell(&mut stream, &[Told::Exit(0)]);
    });
    let mut command = pod.node.command(&["exec", "-i", POD, "--", "cat"]);
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let text = "line\n".repeat(50_000);
    stdin.write_all(text.as_bytes()).unwrap();
    drop(stdin);
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success() && out(&done) == text);
}

#[test]
fn whoever_reads_a_programs_output_may_stop() {
    let pod = Pod::new();
    pod.serve(|mut stream| {
        request(&mut stream);
        tell(
            &mut stream,
            &[Told::Output(b"more".to_vec()), Told::Exit(7)],
        );
        let _ = shell::read(&mut stream);
    });
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = pod.node.command(&["exec", POD, "--", "yes"]);
    let done = command.stdout(writer).output().unwrap();
    expect(&done, 0, "");
}

#[test]
fn nothing_runs_where_it_is_not_allowed() {
    let pod = Pod::new();
    let words = ["exec", POD, "--", "true"];
    let inspected = || json(&pod.node.husk(&["inspect", POD, "--json"]));
    assert_eq!(inspected()["debug_shell"], false);
    expect(&pod.node.husk(&words), 125, "`debug_shell = true` in /");
    let state = pod.node.path().join("state");
    let line = format!("state_dir = '{}'\ndebug_shell = true\n", state.display());
    pod.node.configure(&line);
    expect(&pod.node.husk(&words), 125, "the pod began while");
    expect(
        &pod.node.husk(&["exec", "none", "--", "true"]),
        125,
        "husk ps",
    );
    expect(&pod.node.husk(&["exec", POD]), 2, "COMMAND");
    expect(
        &pod.node.husk(&["exec", POD, "--json", "--", "true"]),
        125,
        "JSON",
    );
    pod.serve(drop);
    let none = pod
        .node
        .command(&["console", POD])
        .stdin(Stdio::null())
        .output();
    expect(&none.unwrap(), 125, "standard input is no terminal");
    assert_eq!(inspected()["debug_shell"], true);
    for (told, why) in [
        (
            vec![Told::Failed("no\x1b[2J such".into())],
            "no\\u{1b}[2J such",
        ),
        (Vec::new(), "the pod's machine, or its shim, has ended"),
    ] {
        pod.serve(move |mut stream| {
            request(&mut stream);
            tell(&mut stream, &told);
        });
        expect(&pod.node.husk(&words), 125, why);
    }
    pod.node
        .pod(POD, r#"{"shim": {"pid": 1, "start_ticks": 1}}"#);
    expect(&pod.node.husk(&words), 125, "the pod is abandoned");
}

#[test]
fn a_command_line_that_is_too_long_is_refused_in_words() {
    let pod = Pod::new();
    let mut words = vec!["exec", POD, "--", "ls"];
    words.extend(["x"; 1024]);
    expect(&pod.node.husk(&words), 125, "1024 words");
    let long = "x".repeat(64 << 10);
    expect(
        &pod.node.husk(&["exec", POD, "--", &long]),
        125,
        "65536 bytes",
    );
}

fn size(terminal: &OwnedFd, columns: u16, rows: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
}

/// `husk` on a terminal; the shim's end comes over the channel.
fn on_terminal(
    pod: &Pod,
    words: &[&str],
) -> (std::process::Child, OwnedFd, mpsc::Receiver<UnixStream>) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    unlockpt(&master).unwrap();
    size(&master, 100, 40);
    let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
    let (sender, receiver) = mpsc::channel();
    pod.serve(move |stream| sender.send(stream).unwrap());
    let other = || Stdio::from(slave.try_clone().unwrap());
    let mut command: Command = pod.node.command(words);
    let command = command.env("TERM", "vt100");
    let command = command
        .stdin(other())
        .stdout(other())
        .stderr(Stdio::piped());
    (command.spawn().unwrap(), master, receiver)
}

fn is_raw(terminal: &OwnedFd) -> bool {
    !tcgetattr(terminal)
        .unwrap()
        .local_modes
        .contains(LocalModes::ISIG)
}

fn end(child: &mut std::process::Child) -> std::process::ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if began.elapsed() > Duration::from_secs(20) {
            child.kill().unwrap();
            panic!("it stays");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_console_is_a_terminal() {
    let pod = Pod::new();
    let (mut child, master, shim) = on_terminal(&pod, &["console", POD]);
    let mut stream = shim.recv_timeout(Duration::from_secs(20)).unwrap();
    let request = request(&mut stream);
    assert!(request.args.is_empty() && request.stdin);
    let terminal = request.terminal.unwrap();
    assert_eq!(
        (&*terminal.kind, terminal.width, terminal.height),
        ("vt100", 100, 40)
    );
    assert!(is_raw(&master));
    let mut master_file = File::from(master.try_clone().unwrap());
    // Ctrl-C is for the guest.
    master_file.write_all(b"a\x03").unwrap();
    let mut typed = Vec::new();
    while typed.len() < 2 {
        match asked(&mut stream) {
            Some(Asked::Input(bytes)) => typed.extend(bytes),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(typed, b"a\x03");
    size(&master, 80, 25);
    let resized = Asked::Resize {
        width: 80,
        height: 25,
    };
    assert_eq!(asked(&mut stream), Some(resized));
    tell(&mut stream, &[Told::Output(b"bye".to_vec()), Told::Exit(3)]);
    assert_eq!(child.wait().unwrap().code(), Some(3));
    let mut shown = [0; 3];
    master_file.read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"bye");
    assert!(!is_raw(&master));
}

#[test]
fn a_console_that_does_not_answer_can_be_left() {
    let pod = Pod::new();
    let (mut child, master, shim) = on_terminal(&pod, &["console", POD]);
    let mut stream = shim.recv_timeout(Duration::from_secs(20)).unwrap();
    request(&mut stream);
    File::from(master.try_clone().unwrap())
        .write_all(b"x\x1d")
        .unwrap();
    assert_eq!(asked(&mut stream), Some(Asked::Input(b"x".to_vec())));
    assert_eq!(end(&mut child).code(), Some(125));
    assert!(!is_raw(&master));
}

#[test]
fn a_console_can_be_left_whose_guest_takes_no_more() {
    let pod = Pod::new();
    let (mut child, master, shim) = on_terminal(&pod, &["console", POD]);
    let mut stream = shim.recv_timeout(Duration::from_secs(20)).unwrap();
    request(&mut stream);
    let mut keys = File::from(master.try_clone().unwrap());
    // One frame each, more than a socket and whoever writes to it hold.
    for _ in 0..2000 {
        keys.write_all(b"x").unwrap();
        thread::sleep(Duration::from_micros(300));
    }
    keys.write_all(b"\x1d").unwrap();
    assert_eq!(end(&mut child).code(), Some(125));
    assert!(!is_raw(&master));
}

#[test]
fn without_input_a_terminals_keys_stay_the_commands() {
    let pod = Pod::new();
    let (mut child, master, shim) = on_terminal(&pod, &["exec", "-t", POD, "--", "top"]);
    let mut stream = shim.recv_timeout(Duration::from_secs(20)).unwrap();
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).unwrap();
    let request = request(&mut stream);
    assert!(!request.stdin && request.terminal.is_some());
    size(&master, 80, 25);
    let resized = Asked::Resize {
        width: 80,
        height: 25,
    };
    assert_eq!(asked(&mut stream), Some(resized));
    assert!(!is_raw(&master), "Ctrl-C would do nothing");
    tell(&mut stream, &[Told::Exit(0)]);
    assert_eq!(end(&mut child).code(), Some(0));
}
