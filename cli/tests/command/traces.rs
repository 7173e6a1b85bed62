//! `husk traces`, with a collector that understands what OpenTelemetry's own messages
//! do.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStderr, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use husk_node::state::Timeline;
use husk_node::trace::{self, Line, Parent, Request, Stage};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::json;

use crate::node::{Node, Part, expect};

const PATIENCE: Duration = Duration::from_secs(60);
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// One that answers what it is told to.
struct Collector(TcpListener);

impl Collector {
    fn start() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    fn url(&self) -> String {
        format!("http://{}", self.0.local_addr().unwrap())
    }

    /// Takes a message and answers so.
    fn take(&self, answer: &str) -> Vec<Span> {
        self.0.set_nonblocking(true).unwrap();
        let began = Instant::now();
        let mut stream = loop {
            match self.0.accept() {
                Ok((stream, _)) => break stream,
                Err(_) => assert!(began.elapsed() < PATIENCE, "nothing comes"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = body(&mut stream);
        write!(stream, "HTTP/1.1 {answer}\r\nContent-Length: 2\r\n\r\n{{}}").unwrap();
        spans(&body)
    }
}

fn body(stream: &mut TcpStream) -> Vec<u8> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, "POST /v1/traces HTTP/1.1\r\n");
    let (mut length, mut is_json) = (0, false);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        match line.trim_end().split_once(": ") {
            None => break,
            Some(("Content-Length", value)) => length = value.parse().unwrap(),
            Some(("Content-Type", value)) => is_json = value == "application/json",
            Some(_) => {}
        }
    }
    assert!(is_json && length > 0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    body
}

fn spans(text: &[u8]) -> Vec<Span> {
    let message: ExportTraceServiceRequest = serde_json::from_slice(text).unwrap();
    let [resource] = &message.resource_spans[..] else {
        panic!("{message:?}");
    };
    let attributes = format!("{:?}", resource.resource.as_ref().unwrap().attributes);
    assert!(attributes.contains("service.name") && attributes.contains("\"husk\""));
    let scopes = resource.scope_spans.iter();
    scopes.flat_map(|scope| scope.spans.clone()).collect()
}

fn find<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let found = spans.iter().find(|span| span.name == name);
    found.unwrap_or_else(|| panic!("no {name} in {spans:?}"))
}

struct Traces(Child, BufReader<ChildStderr>);

impl Traces {
    fn start(node: &Node, to: &str) -> Self {
        let mut command = node.command(&["traces", "--otlp", to]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        let output = child.stdout.as_mut().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        assert_eq!(line, format!("spans go to {to}/v1/traces\n"));
        let errors = BufReader::new(child.stderr.take().unwrap());
        Self(child, errors)
    }

    fn complaint(&mut self) -> String {
        let mut line = String::new();
        self.1.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn timeline() -> Timeline {
    Timeline {
        request_ns: 1_000_000,
        vmm_exec_ns: 5_000_000,
        guest_entered_ns: 9_000_000,
        agent_ready_ns: 90_000_000,
        container_started_ns: 151_000_000,
        ..Timeline::default()
    }
}

fn request(method: &str) -> Line {
    let stage = |what: &str, end_ns| Stage {
        what: what.into(),
        end_ns,
    };
    Line::Request(Request {
        parent: Parent::read(PARENT).unwrap(),
        method: method.into(),
        container: "web".into(),
        exec: "e1".into(),
        begin_ns: 200_000_000,
        end_ns: 230_000_000,
        error: Some("no such \u{1b}[2J program".into()),
        stages: vec![stage("streams", 201_000_000), stage("exec", 229_000_000)],
    })
}

#[test]
fn a_start_that_nobody_traces_is_a_trace() {
    let node = Node::new();
    let collector = Collector::start();
    let started = json!({ "timeline": timeline() });
    node.pod("before", &started.to_string());
    let _traces = Traces::start(&node, &collector.url());
    node.pod("after", &started.to_string());
    let spans = collector.take("200 OK");
    let whole = find(&spans, "start of a pod");
    assert!(whole.parent_span_id.is_empty() && whole.trace_id.len() == 16);
    let took = whole.end_time_unix_nano - whole.start_time_unix_nano;
    assert_eq!(took, 150_000_000);
    let guest = find(&spans, "guest: kernel and agent");
    assert_eq!(guest.parent_span_id, whole.span_id);
    assert_eq!(
        guest.start_time_unix_nano - whole.start_time_unix_nano,
        8_000_000
    );
    let told = format!("{spans:?}");
    assert!(
        told.contains("\"after\"") && !told.contains("\"before\""),
        "{told}"
    );
}

#[test]
fn requests_are_parts_of_others_traces() {
    let node = Node::new();
    let collector = Collector::start();
    let _traces = Traces::start(&node, &collector.url());
    let shim = Part::start(&["sleep", "100"]);
    let state = json!({ "shim": shim.value(), "timeline": timeline() });
    let dir = node.path().join("state/k8s.io/pod");
    std::fs::create_dir_all(&dir).unwrap();
    trace::append(&dir, &Line::Timeline(timeline())).unwrap();
    node.pod("pod", &state.to_string());
    let mut create = request("Create");
    if let Line::Request(create) = &mut create {
        (create.begin_ns, create.end_ns) = (900_000, 160_000_000);
        create.stages.clear();
        create.error = None;
    }
    trace::append(&dir, &create).unwrap();
    let spans = collector.take("200 OK");
    let whole = find(&spans, "Create");
    assert_eq!(whole.trace_id[..2], [0x0a, 0xf7]);
    assert_eq!(whole.parent_span_id[..2], [0xb7, 0xad]);
    let guest = find(&spans, "guest: kernel and agent");
    assert_eq!(guest.parent_span_id, whole.span_id);
    assert_eq!(guest.trace_id, whole.trace_id);
    // It is not told a second time as a trace of its own; and what is said last is not
    // lost, though the pod is gone.
    trace::append(&dir, &request("Start")).unwrap();
    std::fs::remove_file(dir.join(trace::FILE)).unwrap();
    node.remove_last("pod");
    let spans = collector.take("200 OK");
    let whole = find(&spans, "Start");
    let status = whole.status.as_ref().unwrap();
    assert_eq!(
        (status.code, &status.message[..]),
        (2, "no such \u{1b}[2J program")
    );
    let exec = find(&spans, "guest: the added program is executed");
    assert_eq!(exec.parent_span_id, whole.span_id);
    assert_eq!(
        exec.end_time_unix_nano - exec.start_time_unix_nano,
        28_000_000
    );
    assert_eq!(spans.len(), 3, "{spans:?}");
}

#[test]
fn a_collector_that_is_away_is_told_of_once() {
    let node = Node::new();
    let collector = Collector::start();
    let mut traces = Traces::start(&node, &collector.url());
    let started = json!({ "timeline": timeline() });
    node.pod("one", &started.to_string());
    collector.take("503 Service Unavailable");
    let complaint = traces.complaint();
    assert!(
        complaint.contains("takes no spans: HTTP/1.1 503"),
        "{complaint}"
    );
    // Twice as long until the next: what comes meanwhile waits.
    collector.take("429 Too Many Requests");
    node.pod("two", &started.to_string());
    let spans = collector.take("200 OK");
    assert!(format!("{spans:?}").contains("\"one\""));
    let complaint = traces.complaint();
    assert!(
        complaint.contains("takes spans again; 0 were lost"),
        "{complaint}"
    );
    let spans = collector.take("400 Bad Request");
    assert!(format!("{spans:?}").contains("\"two\""));
    let complaint = traces.complaint();
    assert!(
        complaint.contains("spans: HTTP/1.1 400 Bad Request"),
        "{complaint}"
    );
    node.pod("three", &started.to_string());
    let spans = collector.take("200 OK");
    assert!(format!("{spans:?}").contains("\"three\""), "{spans:?}");
}

#[test]
fn without_a_collector_spans_are_lines() {
    let node = Node::new();
    node.pod("before", "{}");
    let mut command = node.command(&["traces"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let started = json!({ "timeline": timeline() }).to_string();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        // Nobody reads any more from here on.
        tell.send(line).unwrap();
    });
    // It says nothing of when it has begun: until one is new to it.
    let (mut line, began) = (None, Instant::now());
    while line.is_none() {
        assert!(began.elapsed() < PATIENCE, "nothing is told");
        node.pod(&format!("p{}", began.elapsed().as_millis()), &started);
        line = told.recv_timeout(Duration::from_millis(200)).ok();
    }
    let spans = spans(line.unwrap().as_bytes());
    find(&spans, "start of a pod");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_bad_endpoint_is_refused() {
    let node = Node::new();
    let refused = node.husk(&["traces", "--otlp", "https://collector:4318"]);
    expect(&refused, 2, "it must begin with http://");
    let refused = node.husk(&["traces", "--otlp", "http://collector:4318"]);
    expect(&refused, 2, "an address or localhost");
}
