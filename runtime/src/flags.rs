//! The command line, in the syntax of Go's flag package that containerd and
//! CRI-O write: `-name value`, `-name=value`, one dash or two.

use std::path::PathBuf;

/// What this run of the program is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Invocation {
    /// Print the version.
    Version,
    /// Print a `RuntimeInfo` message.
    Info,
    /// Find or start the shim of a pod and print its address.
    Start(Flags),
    /// Clean up after a shim that died.
    Delete(Flags),
    /// Make the node's templates, or that of this much memory, MiB.
    Template(Option<u32>),
    /// Print their names.
    TemplateNames,
    /// Be the shim of a pod.
    Serve(Flags),
}

/// Values of the flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// containerd's namespace.
    pub namespace: String,
    /// The task, or with `Serve` the pod.
    pub id: String,
    /// containerd's own socket.
    pub address: String,
    /// Program that publishes events; not used.
    pub publish_binary: String,
    /// Where a shim serves; only given with `Serve`.
    pub socket: Option<PathBuf>,
    /// Only given with `Delete`; else the working directory is the bundle.
    pub bundle: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
}

/// A command line that cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// No flag of that name.
    #[error("unknown flag -{0}")]
    Unknown(String),
    /// A flag without its value.
    #[error("flag -{0} needs a value")]
    NoValue(String),
    /// A switch with a value that is no truth value.
    #[error("flag -{flag} is {value:?}; it must be true or false")]
    NoTruth {
        /// The switch.
        flag: String,
        /// As given.
        value: String,
    },
    /// No such action.
    #[error("unknown action {0:?}; known are start and delete")]
    Action(String),
    /// A flag that must be there.
    #[error("flag -{0} is missing")]
    Missing(&'static str),
}

/// Reads the arguments that follow the program's name.
///
/// # Errors
/// The first argument that cannot be.
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Invocation, FlagError> {
    let mut arguments = arguments.into_iter();
    let mut flags = Flags::default();
    let (mut version, mut info) = (false, false);
    let mut action = None;
    while let Some(argument) = arguments.next() {
        let Some(text) = argument.strip_prefix('-').filter(|text| !text.is_empty()) else {
            action = Some(argument);
            break;
        };
        if text == "-" {
            action = arguments.next();
            break;
        }
        let text = text.strip_prefix('-').unwrap_or(text);
        let (name, given) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, None),
        };
        let mut value = || {
            given
                .clone()
                .or_else(|| arguments.next())
                .ok_or_else(|| FlagError::NoValue(name.to_owned()))
        };
        match name {
            "namespace" => flags.namespace = value()?,
            "id" => flags.id = value()?,
            "address" => flags.address = value()?,
            "publish-binary" => flags.publish_binary = value()?,
            "socket" => flags.socket = Some(value()?.into()),
            "bundle" => flags.bundle = Some(value()?.into()),
            "debug" => flags.debug = truth(name, given)?,
            "v" | "version" => version = truth(name, given)?,
            "info" => info = truth(name, given)?,
            _ => return Err(FlagError::Unknown(name.to_owned())),
        }
    }
    if version {
        return Ok(Invocation::Version);
    }
    if info {
        return Ok(Invocation::Info);
    }
    if action.as_deref() == Some("template") {
        return match arguments.next().as_deref() {
            None => Ok(Invocation::Template(None)),
            Some("names") => Ok(Invocation::TemplateNames),
            Some(other) => match other.parse() {
                Ok(memory_mib) => Ok(Invocation::Template(Some(memory_mib))),
                Err(_) => Err(FlagError::Action(format!("template {other}"))),
            },
        };
    }
    if flags.namespace.is_empty() {
        return Err(FlagError::Missing("namespace"));
    }
    if flags.id.is_empty() {
        return Err(FlagError::Missing("id"));
    }
    match action.as_deref() {
        Some("start") => Ok(Invocation::Start(flags)),
        Some("delete") => Ok(Invocation::Delete(flags)),
        Some(other) => Err(FlagError::Action(other.to_owned())),
        None => Ok(Invocation::Serve(flags)),
    }
}

fn truth(flag: &str, given: Option<String>) -> Result<bool, FlagError> {
    match given.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(FlagError::NoTruth {
            flag: flag.to_owned(),
            value: value.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str) -> Result<Invocation, FlagError> {
        parse(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn reads_what_containerd_writes() {
        let line = "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd \
                    -id abc -debug start";
        let expected = Flags {
            namespace: "k8s.io".into(),
            id: "abc".into(),
            address: "/run/c.sock".into(),
            publish_binary: "/usr/bin/containerd".into(),
            socket: None,
            bundle: None,
            debug: true,
        };
        assert_eq!(parse_text(line), Ok(Invocation::Start(expected)));
    }

    #[test]
    fn reads_both_spellings() {
        let short = parse_text("-namespace n -id a -bundle /b -debug=false delete");
        let long = parse_text("--namespace=n --id=a --bundle=/b delete");
        assert!(matches!(&short, Ok(Invocation::Delete(f)) if !f.debug));
        assert_eq!(short, long);
    }

    #[test]
    fn needs_no_names_for_version_and_info() {
        assert_eq!(parse_text("-v"), Ok(Invocation::Version));
        assert_eq!(parse_text("-info"), Ok(Invocation::Info));
        assert_eq!(parse_text("template"), Ok(Invocation::Template(None)));
        let one = Ok(Invocation::Template(Some(128)));
        assert_eq!(parse_text("template 128"), one);
        assert_eq!(parse_text("template names"), Ok(Invocation::TemplateNames));
        let other = Err(FlagError::Action("template drop".into()));
        assert_eq!(parse_text("template drop"), other);
    }

    #[test]
    fn names_what_is_wrong() {
        assert_eq!(
            parse_text("-surprise"),
            Err(FlagError::Unknown("surprise".into()))
        );
        assert_eq!(parse_text("-id"), Err(FlagError::NoValue("id".into())));
        assert_eq!(
            parse_text("-id a start"),
            Err(FlagError::Missing("namespace"))
        );
        assert_eq!(
            parse_text("-namespace n -id a stop"),
            Err(FlagError::Action("stop".into()))
        );
        assert!(matches!(
            parse_text("-debug=maybe"),
            Err(FlagError::NoTruth { .. })
        ));
    }
}
