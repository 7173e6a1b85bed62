//! Spans as OTLP has them in JSON: an `ExportTraceServiceRequest` of
//! opentelemetry/proto/collector/trace/v1, with numbers of 64 bits as text and ids in
//! hexadecimal digits, as its specification wants it.

use std::fs;

use serde_json::{Value, json};

use super::span::Span;
use crate::text;

/// `SPAN_KIND_INTERNAL` and `SPAN_KIND_SERVER`.
const INTERNAL: u32 = 1;
const SERVER: u32 = 2;

/// `STATUS_CODE_ERROR`.
const ERROR: u32 = 2;

/// Flags of a span: its trace is recorded; it is known whether its parent is
/// somebody else's; it is.
const SAMPLED: u32 = 1;
const IS_REMOTE_KNOWN: u32 = 1 << 8;
const IS_REMOTE: u32 = 1 << 9;

/// Longest value of an attribute, characters: names are those of tenants.
const VALUE: usize = 512;

/// A message with these spans, on one line.
///
/// # Errors
/// None while there is memory.
pub fn text(spans: &[Span]) -> serde_json::Result<String> {
    let version = env!("CARGO_PKG_VERSION");
    let mut resource = vec![
        attribute("service.name", "husk"),
        attribute("service.version", version),
    ];
    if let Ok(host) = fs::read_to_string("/proc/sys/kernel/hostname") {
        resource.push(attribute("host.name", host.trim()));
    }
    let spans: Vec<Value> = spans.iter().map(value).collect();
    let message = json!({ "resourceSpans": [{
        "resource": { "attributes": resource },
        "scopeSpans": [{ "scope": { "name": "husk", "version": version }, "spans": spans }],
    }] });
    // It may be a terminal's to show.
    Ok(text::ascii(&serde_json::to_string(&message)?))
}

fn value(span: &Span) -> Value {
    let attributes: Vec<Value> = span
        .attributes
        .iter()
        .map(|(key, value)| attribute(key, value))
        .collect();
    let (kind, remote) = match span.is_remote {
        true => (SERVER, IS_REMOTE),
        false => (INTERNAL, 0),
    };
    let mut value = json!({
        "traceId": format!("{:032x}", span.trace),
        "spanId": format!("{:016x}", span.id),
        "flags": SAMPLED | IS_REMOTE_KNOWN | remote,
        "name": span.name,
        "kind": kind,
        "startTimeUnixNano": span.begin_ns.to_string(),
        "endTimeUnixNano": span.end_ns.to_string(),
        "attributes": attributes,
    });
    if span.parent > 0 {
        value["parentSpanId"] = format!("{:016x}", span.parent).into();
    }
    if let Some(error) = &span.error {
        value["status"] = json!({ "code": ERROR, "message": error });
    }
    value
}

fn attribute(key: &str, value: &str) -> Value {
    let value: String = value.chars().take(VALUE).collect();
    json!({ "key": key, "value": { "stringValue": value } })
}
