//! `husk metrics --listen`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::node::{Node, Part, expect};

const PATIENCE: Duration = Duration::from_secs(60);

struct Endpoint(Child, String);

impl Endpoint {
    fn start(node: &Node) -> Self {
        let mut command = node.command(&["metrics", "--listen", "127.0.0.1:0"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let output = child.stdout.as_mut().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        let address = line.strip_prefix("http://").unwrap();
        let address = address.strip_suffix("/metrics\n").unwrap();
        Self(child, address.to_owned())
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.1).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The status line and the body.
    fn ask(&self, line: &str) -> (String, String) {
        let mut stream = self.connect();
        write!(stream, "{line}\r\nHost: node\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let length = format!("Content-Length: {}\r\n", body.len());
        assert!(head.contains(&length), "{answer}");
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    #[track_caller]
    fn await_line(&self, wanted: &str) {
        let began = Instant::now();
        loop {
            let (status, page) = self.ask("GET /metrics HTTP/1.1");
            assert_eq!(status, "HTTP/1.1 200 OK");
            if page.lines().any(|line| line == wanted) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "no {wanted} in {page}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn starts_are_counted_while_nobody_asks() {
    let node = Node::new();
    let started = json!({ "request_ns": 1_000_000, "vmm_exec_ns": 5_000_000,
                          "container_started_ns": 151_000_000 });
    node.pod("before", &json!({ "timeline": started }).to_string());
    let endpoint = Endpoint::start(&node);
    let shim = Part::start(&["sleep", "100"]);
    for id in ["one", "two"] {
        let mut state = json!({ "shim": shim.value() });
        node.pod(id, &state.to_string());
        endpoint.await_line(&format!(
            "husk_pods{{status=\"starting\"}} {}",
            if id == "one" { 1 } else { 2 }
        ));
        state["timeline"] = started.clone();
        node.pod(id, &state.to_string());
    }
    endpoint.await_line("husk_starts_seconds_count{stage=\"all\"} 2");
    endpoint.await_line("husk_starts_seconds_bucket{stage=\"all\",le=\"0.200\"} 2");
    endpoint.await_line("husk_starts_seconds_sum{stage=\"node\"} 0.008000000");
    endpoint.await_line("husk_events_total{event=\"added\"} 2");
    endpoint.await_line("husk_pods{status=\"abandoned\"} 1");
}

#[test]
fn whoever_asks_badly_harms_nobody() {
    let node = Node::new();
    let endpoint = Endpoint::start(&node);
    // More than are let in, and they say nothing.
    let silent: Vec<_> = (0..40).map(|_| endpoint.connect()).collect();
    for (line, status) in [
        ("GET / HTTP/1.1", "HTTP/1.1 404 Not Found"),
        ("POST /metrics HTTP/1.1", "HTTP/1.1 405 Method Not Allowed"),
        ("nonsense", "HTTP/1.1 405 Method Not Allowed"),
        ("GET /metrics?a=b HTTP/1.0", "HTTP/1.1 200 OK"),
    ] {
        let began = Instant::now();
        // Until those who were let in have had their time.
        let answer = loop {
            let mut stream = endpoint.connect();
            let _ = write!(stream, "{line}\r\n\r\n");
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            if !answer.is_empty() {
                break String::from_utf8(answer).unwrap();
            }
            assert!(began.elapsed() < PATIENCE, "nobody is let in any more");
            std::thread::sleep(Duration::from_millis(100));
        };
        assert!(answer.starts_with(status), "{line}: {answer}");
    }
    drop(silent);
    let mut long = endpoint.connect();
    let _ = long.write_all(&[b'a'; 20_000]);
    let mut answer = Vec::new();
    let _ = long.read_to_end(&mut answer);
    assert!(answer.is_empty());
    endpoint.await_line("husk_pods{status=\"running\"} 0");
}

#[test]
fn what_is_taken_is_refused() {
    let node = Node::new();
    let endpoint = Endpoint::start(&node);
    let second = node.husk(&["metrics", "--listen", &endpoint.1]);
    expect(&second, 1, &format!("listen at {}", endpoint.1));
    expect(&node.husk(&["metrics", "--listen", "here"]), 2, "--listen");
}
