//! Exec, Attach and PortForward through containerd's streaming server.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Bench, Case, case};
use crate::pod::Pod;
use crate::process::eventually;
use crate::stream::{Stream, channel};

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("streaming/exec", 40, exec),
    case("streaming/exec-stdin", 40, exec_stdin),
    case("streaming/exec-terminal", 40, exec_terminal),
    case("streaming/attach", 40, attach),
    case("streaming/attach-terminal", 40, attach_terminal),
    case("streaming/port-forward", 60, port_forward),
    case("streaming/port-forward-bulk", 60, port_forward_bulk),
];

fn exec(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let script = "echo out; echo err >&2; exit 6";
    let mut stream = Stream::open(&cri.exec_url(&container, &["sh", "-c", script], false)?)?;
    stream.until_closed(bench.seconds(10))?;
    ensure!(
        stream.text(channel::STDOUT) == "out\n",
        "{:?}",
        stream.text(channel::STDOUT)
    );
    ensure!(
        stream.text(channel::STDERR) == "err\n",
        "{:?}",
        stream.text(channel::STDERR)
    );
    ensure!(stream.exit_code()? == 6);
    pod.remove(&cri)
}

fn exec_stdin(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let wait = bench.seconds(15);
    let script = "read line; echo got $line; head -c 300000 | sha256sum; cat >/dev/null";
    let mut stream = Stream::open(&cri.exec_url(&container, &["sh", "-c", script], false)?)?;
    stream.send(channel::STDIN, b"a word\n")?;
    stream.until_text(channel::STDOUT, "got a word\n", wait)?;
    for _ in 0..10 {
        stream.send(channel::STDIN, &[b'x'; 30_000])?;
    }
    // sha256 of 300,000 times "x".
    stream.until_text(channel::STDOUT, "  -\n", wait)?;
    let sum = crate::image::sha256(&[b'x'; 300_000]);
    ensure!(
        stream.text(channel::STDOUT).contains(&sum),
        "{}",
        stream.text(channel::STDOUT)
    );
    if stream.can_half_close() {
        stream.end_stdin()?;
        stream.until_closed(wait)?;
        ensure!(stream.exit_code()? == 0);
    }
    pod.remove(&cri)
}

fn exec_terminal(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let wait = bench.seconds(10);
    let mut stream = Stream::open(&cri.exec_url(&container, &["sh"], true)?)?;
    stream.resize(33, 101)?;
    stream.send(channel::STDIN, b"tty && echo on-$((40 + 2))\n")?;
    stream.until_text(channel::STDOUT, "on-42", wait)?;
    stream.asks_until(b"stty size\n", "33 101", wait)?;
    stream.send(channel::STDIN, b"exit 4\n")?;
    stream.until_closed(wait)?;
    ensure!(stream.exit_code()? == 4);
    pod.remove(&cri)
}

fn attach(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let mut config = pod.container(&[
        "sh",
        "-c",
        "while read line; do echo got $line; echo err $line >&2; done",
    ]);
    config.stdin = true;
    let container = pod.start_config(&cri, &config)?;
    let wait = bench.seconds(10);
    let mut stream = Stream::open(&cri.attach_url(&container, false)?)?;
    stream.send(channel::STDIN, b"one\n")?;
    stream.until_text(channel::STDOUT, "got one\n", wait)?;
    stream.until_text(channel::STDERR, "err one\n", wait)?;
    // A second client sees what comes after it; detaching ends nothing.
    let mut second = Stream::open(&cri.attach_url(&container, false)?)?;
    eventually("the second client sees a line", wait, || {
        stream.send(channel::STDIN, b"two\n")?;
        let seen = second.until_text(channel::STDOUT, "got two\n", Duration::from_secs(1));
        Ok(seen.is_ok().then_some(()))
    })?;
    drop((stream, second));
    let mut third = Stream::open(&cri.attach_url(&container, false)?)?;
    third.send(channel::STDIN, b"three\n")?;
    third.until_text(channel::STDOUT, "got three\n", wait)?;
    pod.await_log(&cri, &container, "stdout F got two")?;
    pod.remove(&cri)
}

fn attach_terminal(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let mut config = pod.container(&["sh"]);
    (config.stdin, config.tty) = (true, true);
    let container = pod.start_config(&cri, &config)?;
    let wait = bench.seconds(10);
    let mut stream = Stream::open(&cri.attach_url(&container, true)?)?;
    stream.resize(44, 122)?;
    stream.send(channel::STDIN, b"echo on-$((40 + 2))\n")?;
    stream.until_text(channel::STDOUT, "on-42", wait)?;
    stream.asks_until(b"stty size\n", "44 122", wait)?;
    stream.send(channel::STDIN, b"exit 8\n")?;
    let status = pod.await_exit(&cri, &container)?;
    ensure!(status.exit_code == 8, "{status:?}");
    pod.remove(&cri)
}

fn port_forward(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    // Reachable on the pod's localhost alone, as most debug ports are.
    let server = pod.start(&cri, &["probe", "echo", "127.0.0.1:8080"])?;
    pod.await_log(&cri, &server, "listening")?;
    let wait = bench.seconds(10);
    for text in ["first connection", "second connection"] {
        let mut stream = Stream::open_port(&cri.port_forward_url(&pod.id, 8080)?, 8080)?;
        stream.send(channel::STDIN, text.as_bytes())?;
        stream.until_text(channel::STDIN, text, wait)?;
    }
    // Nobody listens: an error on the error channel or a closed connection.
    let mut refused = Stream::open_port(&cri.port_forward_url(&pod.id, 8081)?, 8081)?;
    refused.send(channel::STDIN, b"anybody?")?;
    refused.until_closed(wait)?;
    ensure!(
        refused.bytes(channel::STDIN).is_empty(),
        "{:?}",
        refused.text(channel::STDIN)
    );
    pod.remove(&cri)
}

fn port_forward_bulk(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let server = pod.start(&cri, &["probe", "echo", "127.0.0.1:8080"])?;
    pod.await_log(&cri, &server, "listening")?;
    let mut stream = Stream::open_port(&cri.port_forward_url(&pod.id, 8080)?, 8080)?;
    let sent: Vec<u8> = (0..1_u32 << 20)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for (index, block) in sent.chunks(16 << 10).enumerate() {
        stream.send(channel::STDIN, block)?;
        // One thread both sends and receives: keep what is in flight small.
        let behind = (index + 1) * (16 << 10) - (128 << 10).min((index + 1) * (16 << 10));
        stream.until(bench.seconds(20), |stream| {
            stream.bytes(channel::STDIN).len() >= behind
        })?;
    }
    stream.until(bench.seconds(20), |stream| {
        stream.bytes(channel::STDIN).len() >= sent.len()
    })?;
    ensure!(
        stream.bytes(channel::STDIN) == sent,
        "other bytes came back"
    );
    pod.remove(&cri)
}
