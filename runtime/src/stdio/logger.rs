//! A program of the node's that takes a process's output (`binary://`), run as
//! containerd's own shims do it: output on descriptor 3, errors on 4, and it
//! closes 5 when it is ready.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio as ProcessStdio;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::StdioError;
use crate::descriptors;

/// Descriptors of the program: output, errors, readiness.
const DESCRIPTORS: [i32; 3] = [3, 4, 5];

/// How long a program may take to be ready.
const READY: Duration = Duration::from_secs(10);

/// How long one may take to end by itself when its input has ended, and then by
/// `SIGTERM`; the latter is what containerd's own shims give it.
const END: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(12)];

/// Whose output it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// containerd's namespace.
    pub namespace: String,
    /// The container, or the process that was added to one.
    pub id: String,
}

/// The running program. It is told to end when this is dropped.
#[derive(Debug)]
pub struct Logger(Option<Child>);

/// Where it takes its input.
#[derive(Debug)]
pub struct LoggerInput {
    pub stdout: pipe::Sender,
    pub stderr: pipe::Sender,
}

/// The `uri` names a program.
pub fn is_program(uri: &str) -> bool {
    uri.starts_with("binary://")
}

impl Logger {
    /// Runs the program of a `binary://` URI and waits until it is ready.
    ///
    /// # Errors
    /// It cannot be run, or is not ready in time; it has ended then.
    pub async fn start(uri: &str, owner: &Owner) -> Result<(Self, LoggerInput), StdioError> {
        let (path, arguments) = parse(uri).ok_or_else(|| StdioError::Scheme {
            stream: "stdout",
            uri: uri.to_owned(),
        })?;
        let fail = |source| StdioError::Logger {
            path: path.clone(),
            source,
        };
        let (stdout, stdout_far) = pipe::pipe().map_err(fail)?;
        let (stderr, stderr_far) = pipe::pipe().map_err(fail)?;
        let (ready_far, mut ready) = pipe::pipe().map_err(fail)?;
        let far = [
            stdout_far.into_blocking_fd().map_err(fail)?,
            stderr_far.into_blocking_fd().map_err(fail)?,
            ready_far.into_blocking_fd().map_err(fail)?,
        ];
        let mut command = Command::new(&path);
        command
            .args(arguments)
            .env_clear()
            .env("CONTAINER_ID", &owner.id)
            .env("CONTAINER_NAMESPACE", &owner.namespace)
            .stdin(ProcessStdio::null())
            .stdout(ProcessStdio::null())
            .stderr(ProcessStdio::null());
        let child = spawn(command, far).map_err(fail)?;
        let logger = Self(Some(child));
        // One that has ended has closed it, too, as has one that knows nothing
        // of this: what it is given then has no reader.
        match timeout(READY, ready.read(&mut [0])).await {
            Ok(Ok(_)) => Ok((logger, LoggerInput { stdout, stderr })),
            Ok(Err(source)) => Err(fail(source)),
            Err(_) => {
                logger.kill().await;
                Err(fail(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "it did not close descriptor 5 within 10 s, as it does when it is ready",
                )))
            }
        }
    }

    /// Waits until it has taken care of its input, which has ended.
    pub async fn end(mut self) {
        if let Some(child) = self.0.take() {
            end(child).await;
        }
    }

    async fn kill(mut self) {
        if let Some(mut child) = self.0.take() {
            // It may have ended already.
            let _ = child.kill().await;
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if let Some(child) = self.0.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(end(child));
        }
    }
}

async fn end(mut child: Child) {
    let [by_itself, by_signal] = END;
    if timeout(by_itself, child.wait()).await.is_ok() {
        return;
    }
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    if let Some(pid) = pid {
        // It is not reaped before the next line.
        let _ = kill_process(pid, Signal::TERM);
    }
    if timeout(by_signal, child.wait()).await.is_err() {
        tracing::warn!("a logging program does not end; it is killed");
        let _ = child.kill().await;
    }
}

/// The program and its arguments: the query's keys and values, in turn.
fn parse(uri: &str) -> Option<(PathBuf, Vec<String>)> {
    let uri = uri.strip_prefix("binary://")?;
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let path = percent_decode_str(path).decode_utf8().ok()?;
    let arguments = form_urlencoded::parse(query.as_bytes());
    let arguments = arguments
        .flat_map(|(key, value)| [key.into_owned(), value.into_owned()])
        .collect();
    path.starts_with('/')
        .then(|| (PathBuf::from(path.as_ref()), arguments))
}

fn spawn(mut command: Command, descriptors: [OwnedFd; 3]) -> io::Result<Child> {
    // Out of the way of the numbers that they are to get.
    let mut sources = Vec::with_capacity(descriptors.len());
    for descriptor in descriptors {
        sources.push(fcntl_dupfd_cloexec(&descriptor, 10)?);
    }
    let numbers: Vec<i32> = sources.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: between fork and exec only system calls are made, which is
    // async-signal-safe. The low numbers are long taken by the shim's own
    // descriptors, so none that the spawning needs is lost.
    unsafe {
        command.pre_exec(move || {
            for (source, target) in numbers.iter().zip(DESCRIPTORS) {
                if libc::dup2(*source, target) == -1 {
                    return Err(io::Error::last_os_error());
                }
            }
            descriptors::give_back()
        });
    }
    command.spawn()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use tokio::io::AsyncWriteExt;

    fn owner() -> Owner {
        Owner {
            namespace: "k8s.io".into(),
            id: "c1".into(),
        }
    }

    fn script(dir: &Path, text: &str) -> String {
        let path = dir.join("log ger");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        format!(
            "binary://{}",
            path.display().to_string().replace(' ', "%20")
        )
    }

    #[test]
    fn arguments_are_the_query_in_order() {
        let (path, arguments) = parse("binary:///bin/log%20it?b=1&a=x+y%2Fz&c").unwrap();
        assert_eq!(path, Path::new("/bin/log it"));
        assert_eq!(arguments, ["b", "1", "a", "x y/z", "c", ""]);
        assert_eq!(parse("binary://log"), None);
        assert_eq!(parse("file:///log"), None);
    }

    #[tokio::test]
    async fn both_streams_arrive_before_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let uri = script(
            dir.path(),
            "exec 5>&-; { echo \"$CONTAINER_NAMESPACE $CONTAINER_ID $*\"; cat <&3; cat <&4; } > $2",
        );
        let uri = format!("{uri}?to={}", log.display());
        let (logger, mut input) = Logger::start(&uri, &owner()).await.unwrap();
        input.stdout.write_all(b"out\n").await.unwrap();
        input.stderr.write_all(b"err\n").await.unwrap();
        drop(input);
        logger.end().await;
        let text = std::fs::read_to_string(&log).unwrap();
        let expected = format!("k8s.io c1 to {}\nout\nerr\n", log.display());
        assert_eq!(text, expected);
    }

    #[tokio::test]
    async fn one_that_holds_on_is_told_to_end() {
        let dir = tempfile::tempdir().unwrap();
        let ended = dir.path().join("ended");
        let text = format!(
            "trap 'touch {}; exit' TERM; exec 5>&-; while :; do sleep 0.1; done",
            ended.display()
        );
        let uri = script(dir.path(), &text);
        let (logger, input) = Logger::start(&uri, &owner()).await.unwrap();
        drop(input);
        logger.end().await;
        assert!(ended.exists());
    }

    #[tokio::test]
    async fn one_that_is_not_there_is_named() {
        let error = Logger::start("binary:///no/such?a=b", &owner()).await;
        let text = crate::error::chain(&error.err().unwrap());
        assert!(text.contains("/no/such"), "{text}");
        assert!(text.contains("No such file"), "{text}");
    }
}
