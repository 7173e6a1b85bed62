use super::*;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use tokio::time::Instant;

fn fifo(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    path.to_str().unwrap().to_owned()
}

fn far(guest: &mut GuestStreams, port: u32) -> StdStream {
    let index = guest
        .host_ports
        .iter()
        .position(|(p, _)| *p == port)
        .unwrap();
    let stream: StdStream = guest.host_ports.remove(index).1.into();
    stream.set_nonblocking(false).unwrap();
    stream
}

fn nothing() -> OnFirstOutput {
    Box::new(|| {})
}

fn slow_reader(seconds: u64) -> Limits {
    Limits {
        slow_reader: Duration::from_secs(seconds),
        stalled: Duration::from_secs(60),
        others: Duration::from_secs(60),
    }
}

#[tokio::test]
async fn input_ends_only_when_closed_and_after_its_data() {
    let dir = tempfile::tempdir().unwrap();
    let paths = StdioPaths {
        stdin: fifo(dir.path(), "in"),
        ..StdioPaths::default()
    };
    let (mut stdio, mut guest) = Stdio::open(&paths, &Owner::default(), nothing())
        .await
        .unwrap();
    let port = guest.ports.stdin_port;
    let mut process = far(&mut guest, port);
    for text in ["first ", "second"] {
        // Each writer is a client that attaches and detaches.
        let path = paths.stdin.clone();
        tokio::task::spawn_blocking(move || std::fs::write(path, text))
            .await
            .unwrap()
            .unwrap();
    }
    stdio.close_input();
    let read = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        process.read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(read.await.unwrap(), "first second");
}

#[tokio::test]
async fn output_arrives_whole_before_drain_returns() {
    let dir = tempfile::tempdir().unwrap();
    let paths = StdioPaths {
        stdout: fifo(dir.path(), "out"),
        stderr: format!("file://{}", dir.path().join("err").display()),
        ..StdioPaths::default()
    };
    let (mut stdio, mut guest) = Stdio::open(&paths, &Owner::default(), nothing())
        .await
        .unwrap();
    let (out, err) = (guest.ports.stdout_port, guest.ports.stderr_port);
    let mut out = far(&mut guest, out);
    let mut err = far(&mut guest, err);
    let path = paths.stdout.clone();
    let reader = tokio::task::spawn_blocking(move || std::fs::read(path).unwrap());
    let writer = tokio::task::spawn_blocking(move || {
        out.write_all(&vec![7; 1 << 20]).unwrap();
        err.write_all(b"complaint").unwrap();
    });
    writer.await.unwrap();
    stdio.drain(slow_reader(60)).await;
    let err = std::fs::read(dir.path().join("err")).unwrap();
    assert_eq!(err, b"complaint");
    assert_eq!(reader.await.unwrap().len(), 1 << 20);
}

#[tokio::test]
async fn drain_does_not_wait_for_others_that_hold_the_output() {
    let dir = tempfile::tempdir().unwrap();
    let paths = StdioPaths {
        stdout: fifo(dir.path(), "out"),
        ..StdioPaths::default()
    };
    let (mut stdio, guest) = Stdio::open(&paths, &Owner::default(), nothing())
        .await
        .unwrap();
    timeout(Duration::from_secs(5), stdio.drain(slow_reader(60)))
        .await
        .unwrap();
    drop(guest);
}

#[tokio::test]
async fn drain_waits_for_a_guest_that_takes_its_time() {
    let dir = tempfile::tempdir().unwrap();
    let paths = StdioPaths {
        stdout: format!("file://{}", dir.path().join("out").display()),
        ..StdioPaths::default()
    };
    let (mut stdio, mut guest) = Stdio::open(&paths, &Owner::default(), nothing())
        .await
        .unwrap();
    let port = guest.ports.stdout_port;
    let mut out = far(&mut guest, port);
    stdio.expect(Written {
        stdout: 4,
        stderr: 0,
    });
    let writer = tokio::task::spawn_blocking(move || {
        std::thread::sleep(Duration::from_millis(1500));
        out.write_all(b"tail").unwrap();
        out
    });
    stdio.drain(slow_reader(60)).await;
    assert_eq!(std::fs::read(dir.path().join("out")).unwrap(), b"tail");
    drop(writer.await);
}

#[tokio::test]
async fn drain_waits_for_a_slow_reader_as_long_as_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let paths = StdioPaths {
        stdout: fifo(dir.path(), "out"),
        ..StdioPaths::default()
    };
    let (mut stdio, mut guest) = Stdio::open(&paths, &Owner::default(), nothing())
        .await
        .unwrap();
    let port = guest.ports.stdout_port;
    let mut out = far(&mut guest, port);
    // More than the fifo holds, and the process has gone.
    let size = 100 << 10;
    out.write_all(&vec![7; size]).unwrap();
    drop(out);
    let began = Instant::now();
    stdio.drain(slow_reader(1)).await;
    assert!(began.elapsed() >= Duration::from_secs(1));

    let path = paths.stdout.clone();
    let reader = tokio::task::spawn_blocking(move || {
        let mut file = File::open(path).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        let mut text = Vec::new();
        file.read_to_end(&mut text).unwrap();
        text.len()
    });
    stdio.drain(slow_reader(60)).await;
    drop(stdio);
    assert_eq!(reader.await.unwrap(), size);
}

#[tokio::test]
async fn names_what_it_cannot_open() {
    let cases = [
        ("syslog:///dev/log", "syslog:///dev/log"),
        ("/does/not/exist", "stdout /does/not/exist"),
    ];
    for (uri, expected) in cases {
        let paths = StdioPaths {
            stdout: uri.to_owned(),
            ..StdioPaths::default()
        };
        let error = Stdio::open(&paths, &Owner::default(), nothing())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    }
}
