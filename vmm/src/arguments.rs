//! The command line: `--uid N --gid N`, nothing else.

use std::ffi::OsString;

use husk_vmm_spec::JailSpec;

/// A command line that says something else.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// An option of another name.
    #[error("unknown argument {0:?}; usage: husk-vmm --uid N --gid N")]
    Unknown(OsString),
    /// No number, or root's.
    #[error("{option} must be a number from 1 to 4294967294")]
    Value {
        /// Which option.
        option: &'static str,
    },
}

/// Reads the arguments that follow the program's name.
///
/// # Errors
/// Anything but two ids that are not root's.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<JailSpec, ArgumentError> {
    let mut arguments = arguments.into_iter();
    let (mut uid, mut gid) = (None, None);
    while let Some(argument) = arguments.next() {
        let slot = match argument.to_str() {
            Some("--uid") => &mut uid,
            Some("--gid") => &mut gid,
            _ => return Err(ArgumentError::Unknown(argument)),
        };
        *slot = arguments.next();
    }
    Ok(JailSpec {
        uid: id("--uid", uid)?,
        gid: id("--gid", gid)?,
    })
}

fn id(option: &'static str, value: Option<OsString>) -> Result<u32, ArgumentError> {
    value
        .and_then(|value| value.to_str()?.parse().ok())
        // All ones means "unchanged" to the kernel.
        .filter(|id| (1..u32::MAX).contains(id))
        .ok_or(ArgumentError::Value { option })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str) -> Result<JailSpec, ArgumentError> {
        parse(text.split_whitespace().map(OsString::from))
    }

    #[test]
    fn takes_two_ids() {
        let spec = JailSpec { uid: 7, gid: 8 };
        assert_eq!(parse_text("--uid 7 --gid 8"), Ok(spec));
        assert_eq!(parse_text("--gid 8 --uid 7"), Ok(spec));
    }

    #[test]
    fn never_runs_as_root() {
        let uid = Err(ArgumentError::Value { option: "--uid" });
        for text in [
            "--uid 0 --gid 8",
            "--uid 4294967295 --gid 8",
            "--gid 8",
            "--uid",
        ] {
            assert_eq!(parse_text(text), uid, "{text}");
        }
        let gid = Err(ArgumentError::Value { option: "--gid" });
        assert_eq!(parse_text("--uid 7 --gid 0"), gid);
        assert!(matches!(
            parse_text("--no-jail"),
            Err(ArgumentError::Unknown(_))
        ));
    }
}
