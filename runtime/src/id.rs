//! Names that containerd gives to pods, containers and processes.

use std::fmt;

/// Longest name taken, bytes (`husk_protocol::limit::ID_BYTES`).
const LONGEST: usize = husk_protocol::limit::ID_BYTES;

/// A name that is safe as one component of a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(String);

/// A name that could leave its directory or is unreasonably long.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} {text:?} must be 1 to {LONGEST} letters, digits, '-', '_' or '.', and not start with '.'"
)]
pub struct IdError {
    what: &'static str,
    text: String,
}

impl Id {
    /// Checks `text`, which names a `what`.
    ///
    /// # Errors
    /// It is empty, too long or has another character.
    pub fn new(what: &'static str, text: &str) -> Result<Self, IdError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let sound = (1..=LONGEST).contains(&text.len())
            && text.chars().all(allowed)
            && !text.starts_with('.');
        if sound {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError {
                what,
                text: text.chars().take(LONGEST).collect(),
            })
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_containerd_makes() {
        for text in ["t1", "k8s.io", "moby", "a_b-c.d", &"f".repeat(64)] {
            assert!(Id::new("id", text).is_ok(), "{text}");
        }
    }

    #[test]
    fn refuses_paths() {
        for text in ["", ".", "..", "a/b", "a\0b", ".hidden", &"f".repeat(129)] {
            assert!(Id::new("id", text).is_err(), "{text}");
        }
    }
}
