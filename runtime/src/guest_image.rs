//! The files that a machine boots from, opened, and known to be those that
//! `SHA256SUMS` beside them names.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use husk_node::sums::{Hash, Listed};
use husk_node::verified::Verified;

use crate::blocking;
use crate::config::Config;
use crate::machine;
use crate::vm_process::VmError;

/// Opens one of them. What was hashed once is not again until it is changed: what is
/// compared then is what the descriptor is of.
///
/// # Errors
/// It is not there, is another than is said beside it, or nothing is said of it.
pub async fn open(what: &'static str, path: &Path, config: &Config) -> Result<OwnedFd, VmError> {
    let file = File::from(machine::open(what, path, false)?);
    let listed = Listed::of(path)?;
    let verified = Verified::new(&config.template_dir);
    let now = file.metadata().map_err(|error| listed.unread(error))?;
    let known = verified.hash_of(&now);
    if known.is_some_and(|known| listed.compare(known).is_ok()) {
        return Ok(file.into());
    }
    let hashed = blocking::run(move || Hash::of(&file).map(|hashed| (file, hashed)));
    let hashed = hashed.await.map_err(|source| VmError::Io {
        what: "thread of the shim",
        source,
    })?;
    let (file, (found, as_hashed)) = hashed.map_err(|error| listed.unread(error))?;
    listed.compare(found)?;
    tracing::debug!(path = %path.display(), sha256 = %found, "hashed");
    if let Err(error) = verified.note(&as_hashed, found) {
        tracing::debug!(%error, "hashed again next time");
    }
    Ok(file.into())
}
