//! Files of the kernel's own file systems, which are there or aren't: nothing
//! here makes one.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

/// Writes a value in one call.
pub fn write(path: impl AsRef<Path>, value: impl AsRef<[u8]>) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.write_all(value.as_ref())
}
