//! What a command answers, and the exit codes.

use std::io;

use serde::Serialize;

use crate::text;

/// Done, and all is well.
pub const DONE: u8 = 0;
/// Could not be done.
pub const FAILED: u8 = 1;
/// No such pod, or several.
pub const NO_POD: u8 = 3;
/// What was looked at is wrong.
pub const WRONG: u8 = 4;
/// Nothing was run in a guest: programs have other codes, as a rule.
pub const NOT_RUN: u8 = 125;

/// For standard output, and the exit code.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Ends with a newline.
    pub text: String,
    /// One of the above.
    pub code: u8,
}

/// The error of a pod that is not there, or not only one.
#[derive(Debug)]
pub struct NoPod(pub String);

impl std::fmt::Display for NoPod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoPod {}

/// The error of a program that was not run in a guest, or of whose end nobody knows.
#[derive(Debug)]
pub struct NotRun(pub anyhow::Error);

impl std::fmt::Display for NotRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for NotRun {}

impl Answer {
    /// All is well.
    pub fn done(text: String) -> Self {
        Self { text, code: DONE }
    }

    /// `value` in JSON.
    ///
    /// # Errors
    /// It cannot be written so.
    pub fn json(value: &impl Serialize) -> anyhow::Result<Self> {
        let mut text = text::ascii(&serde_json::to_string_pretty(value)?);
        text.push('\n');
        Ok(Self::done(text))
    }

    /// Of a command that has written to standard output as it went on: whoever
    /// read that may have seen enough.
    ///
    /// # Errors
    /// What the command says, but for that.
    pub fn streamed(result: anyhow::Result<()>) -> anyhow::Result<Self> {
        match result {
            Err(error) if !is_broken_pipe(&error) => Err(error),
            _ => Ok(Self::done(String::new())),
        }
    }

    /// The same with another exit code.
    pub fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// The exit code of an error.
pub fn code_of(error: &anyhow::Error) -> u8 {
    if error.is::<NoPod>() {
        NO_POD
    } else if error.is::<NotRun>() {
        NOT_RUN
    } else {
        FAILED
    }
}
