//! What a shim leaves in a pod's directory of requests that are parts of a trace,
//! for `husk traces`. Where containerd traces nothing there is no such file.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::state::Timeline;

/// Its name in the pod's directory.
pub const FILE: &str = "requests";

/// What [`FILE`] is before it takes an old one's place.
pub const NEW_FILE: &str = "requests.new";

/// Longest line of it, bytes.
pub const LINE: usize = 8 << 10;

/// Length from which on another file is begun, bytes.
const LONG: u64 = 64 << 10;

/// Most of a name that is written down, and of an error, characters.
const NAME: usize = 128;
const ERROR: usize = 512;

/// The span of somebody else's below which one's own belong: `traceparent` of W3C
/// Trace Context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Parent {
    /// The trace, not 0.
    pub trace: u128,
    /// The span in it, not 0.
    pub span: u64,
    flags: u8,
}

/// A request that somebody traces, answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Whose part it is.
    pub parent: Parent,
    /// What was asked.
    pub method: String,
    /// Of which container.
    pub container: String,
    /// Of which process that was added to it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub exec: String,
    /// When it came, `CLOCK_MONOTONIC` in nanoseconds.
    pub begin_ns: u64,
    /// When it was answered.
    pub end_ns: u64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What was done for it that no timeline has, one after the other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<Stage>,
}

/// A part of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// In a word or two.
    pub what: String,
    /// When it was over; it began where the one before it, or the request, did.
    pub end_ns: u64,
}

/// What parts of requests are called.
pub mod stage {
    /// On the node: root file system, volumes and what else it is made of.
    pub const FILES: &str = "files";
    /// In the guest: the container is made.
    pub const CREATE: &str = "create";
    /// On the node: what has come to the network since.
    pub const NETWORK: &str = "network";
    /// In the guest: the program is executed.
    pub const START: &str = "start";
    /// On the node: streams are opened.
    pub const STREAMS: &str = "streams";
    /// In the guest: a program more is executed.
    pub const EXEC: &str = "exec";
}

/// A line of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// The pod's start, as far as it has come.
    Timeline(Timeline),
    /// A request.
    Request(Request),
}

impl Parent {
    /// The one that a `traceparent` names, if it is one.
    pub fn read(text: &str) -> Option<Self> {
        let version = hex(text.get(..2)?)?;
        // Of a later version, what may follow is not ours to understand.
        let is_whole = text.len() == 55 || (version > 0 && text.as_bytes().get(55) == Some(&b'-'));
        if !is_whole || version == 0xff {
            return None;
        }
        let mut fields = text.get(2..55)?.strip_prefix('-')?.split('-');
        let trace = fields.next().filter(|field| field.len() == 32)?;
        let span = fields.next().filter(|field| field.len() == 16)?;
        let flags = fields.next().filter(|field| field.len() == 2)?;
        let parent = Self {
            trace: hex(trace)?,
            span: u64::try_from(hex(span)?).ok()?,
            flags: u8::try_from(hex(flags)?).ok()?,
        };
        (parent.trace > 0 && parent.span > 0 && fields.next().is_none()).then_some(parent)
    }

    /// Its trace is recorded.
    pub fn is_sampled(self) -> bool {
        self.flags & 1 == 1
    }
}

/// Digits as W3C has them: small letters, and no sign.
fn hex(text: &str) -> Option<u128> {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let is_hex = text.bytes().all(is_digit);
    is_hex
        .then(|| u128::from_str_radix(text, 16).ok())
        .flatten()
}

impl fmt::Display for Parent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "00-{:032x}-{:016x}-{:02x}",
            self.trace, self.span, self.flags
        )
    }
}

impl TryFrom<String> for Parent {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::read(&text).ok_or("no traceparent")
    }
}

impl From<Parent> for String {
    fn from(parent: Parent) -> Self {
        parent.to_string()
    }
}

/// As much of a name as is written down.
pub fn name(text: &str) -> String {
    text.chars().take(NAME).collect()
}

/// As much of an error as is written down.
pub fn error(text: &str) -> String {
    text.chars().take(ERROR).collect()
}

/// Adds a line to the file in a pod's directory; it never becomes long. Whoever
/// has the one open whose place another takes has missed nothing.
///
/// # Errors
/// There is no such directory, or it cannot be written to.
pub fn append(dir: &Path, line: &Line) -> io::Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    let path = dir.join(FILE);
    let mut options = OpenOptions::new();
    options.create(true).mode(0o600);
    let mut file = options.clone().append(true).open(&path)?;
    if file.metadata()?.len() < LONG {
        return file.write_all(text.as_bytes());
    }
    let new = dir.join(NEW_FILE);
    let mut file = options.write(true).truncate(true).open(&new)?;
    file.write_all(text.as_bytes())?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn only_what_w3c_has_is_a_parent() {
        let parent = Parent::read(GOOD).unwrap();
        assert_eq!(parent.trace, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c);
        assert_eq!(parent.span, 0xb7ad_6b71_6920_3331);
        assert!(parent.is_sampled());
        assert_eq!(parent.to_string(), GOOD);
        let unsampled = GOOD.replace("-01", "-02");
        assert!(!Parent::read(&unsampled).unwrap().is_sampled());
        // Versions to come: what is known of them is read, whatever follows it.
        for later in [
            GOOD.replace("00-", "cc-"),
            GOOD.replace("00-", "01-") + "-x",
        ] {
            assert_eq!(Parent::read(&later), Some(parent), "{later}");
        }
        for bad in [
            String::new(),
            GOOD.replace("00-", "ff-"),
            GOOD.replace("00-", "0-"),
            GOOD.replace("00-", "01-") + "x",
            GOOD.to_owned() + "-00",
            GOOD.to_owned() + " ",
            format!(" {GOOD}"),
            GOOD.to_uppercase(),
            GOOD.replace("0af", "+af"),
            GOOD.replace("0af", "é f"),
            GOOD.replace("-b7ad", "b-7ad"),
            GOOD.replace("-01", "-0g"),
            GOOD[..54].to_owned(),
            format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)),
            format!("00-0af7651916cd43dd8448eb211c80319c-{}-01", "0".repeat(16)),
            "é".repeat(40),
        ] {
            assert_eq!(Parent::read(&bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_file_stays_short() {
        let dir = tempfile::tempdir().unwrap();
        let request = |number: u64| {
            Line::Request(Request {
                parent: Parent::read(GOOD).unwrap(),
                method: "Start".into(),
                container: name(&"\u{1}".repeat(1000)),
                exec: name(&"\u{1}".repeat(1000)),
                begin_ns: number,
                end_ns: number,
                error: Some(error(&"\u{1}".repeat(10_000))),
                stages: Vec::new(),
            })
        };
        let path = dir.path().join(FILE);
        for number in 0..100 {
            append(dir.path(), &request(number)).unwrap();
            assert!(fs::metadata(&path).unwrap().len() < LONG + LINE as u64);
        }
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.lines().all(|line| line.len() < LINE));
        let last: Line = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(last, request(99));
        assert!(!dir.path().join(NEW_FILE).exists());
        append(&dir.path().join("none"), &request(0)).unwrap_err();
    }
}
