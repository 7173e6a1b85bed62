//! A collector of OpenTelemetry: takes what exporters send by OTLP over HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::resource::v1::Resource;
pub use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;

/// Largest message, bytes.
const LARGEST: usize = 16 << 20;

/// How long one may take to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// Spans so far, with the name of the service whose they are.
type Spans = Arc<Mutex<Vec<(String, Span)>>>;

/// A collector, as long as the process lives.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    spans: Spans,
}

impl Collector {
    /// Begins to listen.
    ///
    /// # Errors
    /// There is no port.
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, spans) = (listener.local_addr()?, Spans::default());
        let taken = Arc::clone(&spans);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                match take(stream) {
                    Ok(new) => lock(&taken).extend(new),
                    Err(error) => println!("the collector: {error:#}"),
                }
            }
        });
        Ok(Self { address, spans })
    }

    /// What exporters are told.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Those of a service.
    pub fn of(&self, service: &str) -> Vec<Span> {
        let spans = lock(&self.spans);
        let of_service = spans.iter().filter(|(of, _)| of == service);
        of_service.map(|(_, span)| span.clone()).collect()
    }
}

fn lock(spans: &Spans) -> std::sync::MutexGuard<'_, Vec<(String, Span)>> {
    spans.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take(mut stream: TcpStream) -> Result<Vec<(String, Span)>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(&stream);
    let (mut length, mut is_json) = (0, false);
    loop {
        let mut line = String::new();
        ensure!(reader.read_line(&mut line)? > 0, "no message");
        let line = line.trim_end().to_ascii_lowercase();
        match line.split_once(": ") {
            Some(("content-length", value)) => length = value.parse()?,
            Some(("content-type", value)) => is_json = value.starts_with("application/json"),
            _ if line.is_empty() => break,
            _ => {}
        }
    }
    ensure!(length <= LARGEST, "a message of {length} bytes");
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    stream.write_all(answer.as_bytes())?;
    let message = match is_json {
        true => serde_json::from_slice(&body).context("no message in JSON")?,
        false => ExportTraceServiceRequest::decode(&body[..]).context("no message")?,
    };
    let mut spans = Vec::new();
    for resource in message.resource_spans {
        let service = resource.resource.as_ref().map(service).unwrap_or_default();
        let of_scopes = resource.scope_spans.into_iter();
        spans.extend(
            of_scopes
                .flat_map(|scope| scope.spans)
                .map(|span| (service.clone(), span)),
        );
    }
    Ok(spans)
}

fn service(resource: &Resource) -> String {
    let mut attributes = resource.attributes.iter();
    let name = attributes.find(|attribute| attribute.key == "service.name");
    let value = name.and_then(|name| name.value.as_ref()?.value.clone());
    match value {
        Some(Value::StringValue(name)) => name,
        _ => String::new(),
    }
}

/// What an attribute of a span says.
pub fn attribute<'a>(span: &'a Span, key: &str) -> &'a str {
    let mut attributes = span.attributes.iter();
    let found = attributes.find(|attribute| attribute.key == key);
    match found.and_then(|found| found.value.as_ref()?.value.as_ref()) {
        Some(Value::StringValue(text)) => text,
        _ => "",
    }
}
