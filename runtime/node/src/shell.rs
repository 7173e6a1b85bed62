//! What the operator's command and a pod's shim say to each other when a program is
//! run in the guest itself: frames over a unix socket in the pod's directory. Both
//! sides belong to root; what the guest's program prints is in them as it is.
//!
//! A frame is a byte that tells its kind, the length of what follows (4 bytes, big
//! endian), and that.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The socket's name in the pod's directory. It is there only where debug shells
/// are allowed.
pub const SOCKET: &str = "shell";

/// Most that follows a frame's head, bytes.
pub const LONGEST: usize = 64 << 10;

/// Most words of a command line.
pub const WORDS: usize = 1024;

/// Bytes of a frame before what follows.
pub const HEAD: usize = 5;

/// The socket of a pod as whoever has the pod's directory open names it: the name
/// of the directory may be longer than a socket's may.
pub fn path_in(dir: i32) -> PathBuf {
    Path::new("/proc/self/fd")
        .join(dir.to_string())
        .join(SOCKET)
}

/// What to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Request {
    /// The program and its arguments; empty: a shell.
    pub args: Vec<String>,
    /// It gets input.
    pub stdin: bool,
    /// It gets a terminal instead of three streams.
    pub terminal: Option<TerminalRequest>,
}

/// A terminal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TerminalRequest {
    /// What it understands (`TERM`).
    pub kind: String,
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// From the command to the shim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The first, and there is no other.
    Run(Request),
    /// For standard input.
    Input(Vec<u8>),
    /// There is no more of it.
    EndOfInput,
    /// The terminal has another size.
    Resize {
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
}

/// From the shim to the command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// From standard output, or the terminal.
    Output(Vec<u8>),
    /// From standard error.
    Errors(Vec<u8>),
    /// The program has ended, and all that it printed was told. The last.
    Exit(u8),
    /// Nothing runs, or nobody knows any more what it does. The last.
    Failed(String),
}

/// A frame that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Its length.
    #[error("a frame of {0} bytes")]
    Length(usize),
    /// Its kind, or what follows.
    #[error("a frame of kind {0} that cannot be read")]
    Content(u8),
}

/// A command line that is more than a frame takes.
#[derive(Debug, thiserror::Error)]
#[error(
    "a command line may have {WORDS} words and, with quotes, {LONGEST} bytes; this one has {words} and {bytes}"
)]
pub struct TooLong {
    words: usize,
    bytes: usize,
}

impl From<FrameError> for io::Error {
    fn from(error: FrameError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// The kind of a frame, and how much follows its head.
///
/// # Errors
/// More than may.
pub fn head(bytes: [u8; HEAD]) -> Result<(u8, usize), FrameError> {
    let [kind, a, b, c, d] = bytes;
    let length = u32::from_be_bytes([a, b, c, d]);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    match length <= LONGEST {
        true => Ok((kind, length)),
        false => Err(FrameError::Length(length)),
    }
}

/// Reads a frame; none at the end.
///
/// # Errors
/// The stream fails, or ends within a frame, or the frame is too long.
pub fn read(stream: &mut impl Read) -> io::Result<Option<(u8, Vec<u8>)>> {
    let mut bytes = [0; HEAD];
    match stream.read(&mut bytes[..1])? {
        0 => return Ok(None),
        _ => stream.read_exact(&mut bytes[1..])?,
    }
    let (kind, length) = head(bytes)?;
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest)?;
    Ok(Some((kind, rest)))
}

fn frame(kind: u8, rest: &[u8]) -> Vec<u8> {
    let length = u32::try_from(rest.len()).unwrap_or(u32::MAX);
    [&[kind][..], &length.to_be_bytes(), rest].concat()
}

impl Request {
    /// Whoever is asked takes it.
    ///
    /// # Errors
    /// It is too long.
    pub fn check(&self) -> Result<(), TooLong> {
        let (words, bytes) = (self.args.len(), self.text().len());
        match words <= WORDS && bytes <= LONGEST {
            true => Ok(()),
            false => Err(TooLong { words, bytes }),
        }
    }

    fn text(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}

impl Asked {
    /// As it is sent. What is to be input is cut at [`LONGEST`] by whoever has it.
    pub fn frame(&self) -> Vec<u8> {
        match self {
            Self::Run(request) => frame(b'r', &request.text()),
            Self::Input(bytes) => frame(b'i', bytes),
            Self::EndOfInput => frame(b'e', &[]),
            Self::Resize { width, height } => {
                frame(b's', &[width.to_be_bytes(), height.to_be_bytes()].concat())
            }
        }
    }

    /// As it was sent.
    ///
    /// # Errors
    /// It is none of them.
    pub fn parse(kind: u8, rest: Vec<u8>) -> Result<Self, FrameError> {
        let wrong = FrameError::Content(kind);
        match (kind, &rest[..]) {
            (b'r', text) => serde_json::from_slice(text)
                .map(Self::Run)
                .map_err(|_| wrong),
            (b'i', _) => Ok(Self::Input(rest)),
            (b'e', []) => Ok(Self::EndOfInput),
            (b's', &[a, b, c, d]) => Ok(Self::Resize {
                width: u16::from_be_bytes([a, b]),
                height: u16::from_be_bytes([c, d]),
            }),
            _ => Err(wrong),
        }
    }
}

impl Told {
    /// As it is sent.
    pub fn frame(&self) -> Vec<u8> {
        match self {
            Self::Output(bytes) => frame(b'o', bytes),
            Self::Errors(bytes) => frame(b'e', bytes),
            Self::Exit(code) => frame(b'x', &[*code]),
            Self::Failed(why) => frame(b'f', why.as_bytes()),
        }
    }

    /// As it was sent.
    ///
    /// # Errors
    /// It is none of them.
    pub fn parse(kind: u8, rest: Vec<u8>) -> Result<Self, FrameError> {
        match (kind, &rest[..]) {
            (b'o', _) => Ok(Self::Output(rest)),
            (b'e', _) => Ok(Self::Errors(rest)),
            (b'x', &[code]) => Ok(Self::Exit(code)),
            (b'f', _) => Ok(Self::Failed(String::from_utf8_lossy(&rest).into_owned())),
            _ => Err(FrameError::Content(kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_read() {
        let request = Request {
            args: vec!["ls".into(), "-l".into()],
            stdin: true,
            terminal: Some(TerminalRequest {
                kind: "xterm".into(),
                width: 80,
                height: 25,
            }),
        };
        let asked = [
            Asked::Run(request),
            Asked::Input(vec![7; LONGEST]),
            Asked::EndOfInput,
            Asked::Resize {
                width: 300,
                height: 2,
            },
        ];
        let bytes: Vec<u8> = asked.iter().flat_map(Asked::frame).collect();
        let mut stream = &bytes[..];
        for one in asked {
            let (kind, rest) = read(&mut stream).unwrap().unwrap();
            assert_eq!(Asked::parse(kind, rest).unwrap(), one);
        }
        assert!(read(&mut stream).unwrap().is_none());
        let told = [
            Told::Output(b"out".to_vec()),
            Told::Errors(Vec::new()),
            Told::Exit(255),
            Told::Failed("no".into()),
        ];
        for one in told {
            let (kind, rest) = read(&mut &one.frame()[..]).unwrap().unwrap();
            assert_eq!(Told::parse(kind, rest).unwrap(), one);
        }
    }

    #[test]
    fn a_command_line_has_bounds() {
        let check = |args: Vec<String>| {
            let request = Request {
                args,
                ..Request::default()
            };
            request.check().map_err(|error| error.to_string())
        };
        check(vec!["x".into(); WORDS]).unwrap();
        let error = check(vec!["x".into(); WORDS + 1]).unwrap_err();
        assert!(error.contains("this one has 1025 and"), "{error}");
        let error = check(vec!["x".repeat(LONGEST)]).unwrap_err();
        assert!(error.contains("this one has 1 and 65"), "{error}");
    }

    #[test]
    fn nonsense_is_refused() {
        let long = [b'i', 0, 1, 0, 1];
        assert!(read(&mut &long[..]).is_err());
        assert!(read(&mut &[b'i', 0, 0, 0, 4, 1][..]).is_err());
        assert!(read(&mut &[b'i', 0][..]).is_err());
        for (kind, rest) in [(b'r', "{"), (b'e', "x"), (b's', "abc"), (b'q', "")] {
            assert!(Asked::parse(kind, rest.into()).is_err(), "{kind}");
        }
        assert!(Told::parse(b'x', Vec::new()).is_err());
    }
}
