//! Where output goes on the node.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

use super::StdioError;
use crate::blocking;

/// What takes the output of one stream.
pub enum Sink {
    /// Somebody's reading end, which may come and go.
    Pipe(pipe::Sender),
    /// A file that grows.
    File(Arc<File>),
}

impl Sink {
    /// Opens the fifo, or the file of a `file://`.
    ///
    /// # Errors
    /// It is neither, or cannot be opened.
    pub fn open(stream: &'static str, uri: &str) -> Result<Self, StdioError> {
        let path = local_path(stream, uri)?;
        let fail = |source| StdioError::Open {
            stream,
            path: path.clone(),
            source,
        };
        let is_file = uri.starts_with("file://");
        if !is_file && path.metadata().map_err(fail)?.file_type().is_fifo() {
            // Both ways: opening does not wait for a reader, and readers may
            // come and go.
            let fifo = pipe::OpenOptions::new()
                .read_write(true)
                .open_sender(&path)
                .map_err(fail)?;
            return Ok(Self::Pipe(fifo));
        }
        let file = OpenOptions::new()
            .append(true)
            .create(is_file)
            .open(&path)
            .map_err(fail)?;
        Ok(Self::File(Arc::new(file)))
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// Nobody can read it any more.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(fifo) => fifo.write_all(bytes).await,
            Self::File(file) => {
                let (mut other, copy) = (Arc::clone(file), bytes.to_vec());
                match blocking::run(move || other.write_all(&copy)).await {
                    Ok(written) => written,
                    // Late is better than lost.
                    Err(_) => file.as_ref().write_all(bytes),
                }
            }
        }
    }
}

/// The path of a stream that is a file.
///
/// # Errors
/// It is something else.
pub fn local_path(stream: &'static str, uri: &str) -> Result<PathBuf, StdioError> {
    match uri.split_once("://") {
        None => Ok(PathBuf::from(uri)),
        Some(("file" | "fifo", path)) => {
            Ok(PathBuf::from(path.split('?').next().unwrap_or_default()))
        }
        Some(_) => Err(StdioError::Scheme {
            stream,
            uri: uri.to_owned(),
        }),
    }
}
