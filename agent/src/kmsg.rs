//! The log: lines in the kernel's ring buffer, which the console carries out.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;

use log::{Level, Log, Metadata, Record};

use crate::kernel_file;
use crate::settings::Settings;

/// The kernel cuts records at about 1 KiB.
const LINE_BYTES: usize = 900;

struct Kmsg {
    file: File,
}

static KMSG: OnceLock<Kmsg> = OnceLock::new();

/// Starts the log. Without its file there is none, which is no reason to stop.
pub fn init(settings: &Settings) {
    let (path, level) = (&settings.log_path, settings.log_level);
    let Ok(file) = OpenOptions::new().append(true).create(true).open(path) else {
        return;
    };
    if settings.log_to_console {
        // The console shows what is below this level.
        let console = level.to_level().map_or(0, priority) + 1;
        let _ = kernel_file::write("/proc/sys/kernel/printk", console.to_string());
    }
    if log::set_logger(KMSG.get_or_init(|| Kmsg { file })).is_ok() {
        log::set_max_level(level);
    }
}

/// As syslog(2) numbers them.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

impl Log for Kmsg {
    fn enabled(&self, metadata: &Metadata) -> bool {
        // The libraries speak only when something is wrong.
        metadata.target().starts_with("husk_agent") || metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let priority = priority(record.level());
        let mut line = format!("<{priority}>husk-agent: {}", record.args()).replace('\n', " ");
        if line.len() > LINE_BYTES {
            let mut end = LINE_BYTES;
            while !line.is_char_boundary(end) {
                end -= 1;
            }
            line.truncate(end);
        }
        line.push('\n');
        // One write is one record. There is nowhere to report a failure to.
        let _ = (&self.file).write_all(line.as_bytes());
    }

    fn flush(&self) {}
}
