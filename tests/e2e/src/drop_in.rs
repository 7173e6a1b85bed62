//! A part of the node's configuration for a while.

use std::fs;

use anyhow::{Context, Result};

const FOLDER: &str = "/etc/husk/conf.d";
const FILE: &str = "/etc/husk/conf.d/60-e2e.toml";

/// Configures the shims that start while it lives. There is one at a time.
#[derive(Debug)]
pub struct DropIn(());

impl DropIn {
    /// Writes it.
    ///
    /// # Errors
    /// This is not for us to write.
    pub fn with(text: &str) -> Result<Self> {
        fs::create_dir_all(FOLDER)?;
        fs::write(FILE, text).with_context(|| format!("write {FILE}"))?;
        Ok(Self(()))
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        let _ = fs::remove_file(FILE);
        // The operator may have others in it.
        let _ = fs::remove_dir(FOLDER);
    }
}
