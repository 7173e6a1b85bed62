//! The shim's log: lines in the form of logrus, which containerd copies into
//! its own log from a fifo in the bundle.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use husk_node::pod_log;

use crate::clock;
use crate::flags::Flags;

/// Name of the fifo in the bundle.
const FIFO: &str = "log";

/// Longest line, bytes: more is not written at once (`PIPE_BUF` of pipe(7)).
const LINE: usize = 4096;

/// Starts logging to the fifo in `bundle`; without one to nowhere. Each line
/// names the pod: containerd's log has those of all.
pub fn start(bundle: &Path, flags: &Flags) {
    let level = if flags.debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    };
    let writer = Log(open(&bundle.join(FIFO)).ok().map(Arc::new));
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .event_format(Logrus {
            pod: pod_log::mark(&flags.namespace, &flags.id),
        })
        .with_writer(move || writer.clone())
        .finish();
    // It fails only when there is one already; then that one serves.
    drop(tracing::subscriber::set_global_default(subscriber));
}

/// Both ways, so that opening does not wait for containerd and writing does not
/// fail while containerd restarts; without waiting, so that a full fifo costs
/// lines and not the pod.
fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

#[derive(Clone)]
struct Log(Option<Arc<OwnedFd>>);

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(fifo) = &self.0 {
            // One write a line; what does not fit is dropped whole.
            let _ = match line.get(..LINE - 1) {
                None => rustix::io::write(fifo, line),
                Some(start) => rustix::io::write(fifo, &[start, b"\n"].concat()),
            };
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Logrus {
    /// What names the pod in each line.
    pod: String,
}

impl<S, N> FormatEvent<S, N> for Logrus
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut line = Line::default();
        event.record(&mut line);
        writeln!(
            writer,
            "time={:?} level={level} msg={:?}{}{}",
            clock::rfc3339_now(),
            line.message,
            self.pod,
            line.fields
        )
    }
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else {
            // Writing to a String does not fail.
            let _ = write!(self.fields, " {}={text:?}", field.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn each_line_names_its_pod() {
        let pod = pod_log::mark("k8s.io", "abc");
        let file = Arc::new(Mutex::new(tempfile::tempfile().unwrap()));
        let writer = Arc::clone(&file);
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .event_format(Logrus { pod })
            .with_writer(move || writer.lock().unwrap().try_clone().unwrap())
            .finish();
        let forged = pod_log::mark("k8s.io", "other");
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(console = forged, "guest");
            tracing::warn!("{forged}");
        });
        let mut text = String::new();
        let mut file = file.lock().unwrap();
        io::Seek::rewind(&mut *file).unwrap();
        io::Read::read_to_string(&mut *file, &mut text).unwrap();
        let pods: Vec<_> = text.lines().map(pod_log::pod_of).collect();
        assert_eq!(pods, [Some("abc"); 2], "{text}");
        assert!(text.contains("level=info msg=\"guest\" runtime=io.containerd.husk.v2 "));
    }
}
