//! Requests that containerd traces: what is written down of them for `husk traces`.
//! Where it traces nothing, nothing is.

use std::collections::HashMap;
use std::io;

use husk_node::trace::{self, Line, Parent, Request, Stage};

use crate::clock;
use crate::error::{self, Error};
use crate::state_dir::StateDir;

/// The metadata of a request that has its [`Parent`].
const TRACEPARENT: &str = "traceparent";

/// A request that is under way.
pub struct Trace {
    dir: StateDir,
    /// None: its trace is not recorded.
    request: Option<Request>,
}

impl Trace {
    /// The trace that a request belongs to, by its metadata. An empty `exec` is the
    /// first process of the container.
    pub fn of(
        metadata: &HashMap<String, Vec<String>>,
        dir: &StateDir,
        method: &'static str,
        [container, exec]: [&str; 2],
    ) -> Option<Box<Self>> {
        let [text] = &metadata.get(TRACEPARENT)?[..] else {
            return None;
        };
        let parent = Parent::read(text)?;
        let request = parent.is_sampled().then(|| Request {
            parent,
            method: method.to_owned(),
            container: trace::name(container),
            exec: trace::name(exec),
            begin_ns: clock::monotonic_ns(),
            end_ns: 0,
            error: None,
            stages: Vec::new(),
        });
        Some(Box::new(Self {
            dir: dir.clone(),
            request,
        }))
    }

    /// A part of it is over.
    pub fn passed(&mut self, what: &str) {
        if let Some(request) = &mut self.request {
            request.stages.push(Stage {
                what: what.to_owned(),
                end_ns: clock::monotonic_ns(),
            });
        }
    }

    /// It is about to be answered.
    pub fn end(self, error: Option<&Error>) {
        let Some(mut request) = self.request else {
            return;
        };
        request.end_ns = clock::monotonic_ns();
        request.error = error.map(|error| trace::error(&error::chain(error)));
        note(&self.dir, &Line::Request(request));
    }
}

/// Writes a line. A pod that has no directory yet, or none any more, has nobody who
/// would read it.
pub fn note(dir: &StateDir, line: &Line) {
    match trace::append(dir.path(), line) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, "a traced request is not written down");
        }
        _ => {}
    }
}
