//! The pretended agent's programs beside all containers.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread::{self, JoinHandle};

use async_trait::async_trait;
use husk_protocol::agent::{
    Empty, ResizeShellRequest, RunShellRequest, Shell, ShellRequest, WaitResponse,
};
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, Result};

use crate::agent::{act, missing, status};
use crate::vmm::Ports;

/// How a program ended, and what it had printed.
type End = (u32, u64, u64);

struct Program {
    end: watch::Sender<Option<End>>,
    /// A terminal whose size is told.
    terminal: Option<UnixStream>,
}

/// Serves them.
pub struct Shells {
    ports: Ports,
    all: Mutex<HashMap<String, Program>>,
}

impl Shells {
    /// With the machine's host ports.
    pub fn new(ports: Ports) -> Self {
        Self {
            ports,
            all: Mutex::default(),
        }
    }

    fn dial(&self, port: u32) -> Option<UnixStream> {
        let stream = self.ports.lock().unwrap().remove(&port)?;
        stream.set_nonblocking(false).unwrap();
        Some(stream)
    }

    fn run(&self, request: RunShellRequest) -> Result<()> {
        let streams = request.streams.unwrap_or_default();
        let stdin = self.dial(streams.stdin_port);
        let stdout = self.dial(streams.stdout_port);
        let stderr = self.dial(streams.stderr_port);
        assert_eq!(stderr.is_none(), request.terminal);
        let end = watch::Sender::new(None);
        let mut program = Program {
            end: end.clone(),
            terminal: None,
        };
        let words: Vec<&str> = request.args.iter().map(String::as_str).collect();
        match words[..] {
            ["missing"] => return Err(status(Code::NOT_FOUND, "missing: not found")),
            ["die"] => std::process::exit(1),
            ["terminal"] => {
                let (kind, width, height) = (&request.terminal_kind, request.width, request.height);
                let mut terminal = stdout.unwrap();
                write!(terminal, "{kind} {width}x{height}").unwrap();
                program.terminal = Some(terminal);
            }
            ["shells"] => {
                let count = (self.all.lock().unwrap().len() + 1).to_string();
                stdout.unwrap().write_all(count.as_bytes()).unwrap();
                end.send_replace(Some((0, count.len() as u64, 0)));
            }
            _ => {
                let args = request.args.clone();
                let (stdout, output) = counted(stdout);
                let (stderr, errors) = counted(stderr);
                thread::spawn(move || {
                    if let Some(code) = act(&args, stdin, stdout, stderr) {
                        let printed = [output, errors].map(|count| count.join().unwrap());
                        end.send_replace(Some((code, printed[0], printed[1])));
                    }
                });
            }
        }
        self.all.lock().unwrap().insert(request.shell_id, program);
        Ok(())
    }
}

/// What is written to the stream is passed on and counted.
fn counted(to: Option<UnixStream>) -> (Option<UnixStream>, JoinHandle<u64>) {
    let Some(mut to) = to else {
        return (None, thread::spawn(|| 0));
    };
    let (near, mut far) = UnixStream::pair().unwrap();
    let count = thread::spawn(move || io::copy(&mut far, &mut to).unwrap_or(0));
    (Some(near), count)
}

#[async_trait]
impl Shell for Shells {
    async fn run_shell(&self, _: &TtrpcContext, request: RunShellRequest) -> Result<Empty> {
        self.run(request).map(|()| Empty::default())
    }

    async fn wait_shell(&self, _: &TtrpcContext, request: ShellRequest) -> Result<WaitResponse> {
        let mut end = {
            let all = self.all.lock().unwrap();
            all.get(&request.shell_id)
                .ok_or_else(missing)?
                .end
                .subscribe()
        };
        let end = end.wait_for(Option::is_some).await.map_err(|_| missing())?;
        let (exit_code, stdout_bytes, stderr_bytes) = end.unwrap();
        Ok(WaitResponse {
            exit_code,
            stdout_bytes,
            stderr_bytes,
            ..WaitResponse::default()
        })
    }

    /// The first new size is told, and the end.
    async fn resize_shell(&self, _: &TtrpcContext, request: ResizeShellRequest) -> Result<Empty> {
        let mut all = self.all.lock().unwrap();
        let program = all.get_mut(&request.shell_id).ok_or_else(missing)?;
        let told = format!(" {}x{}", request.width, request.height);
        let mut terminal = program.terminal.take().ok_or_else(missing)?;
        terminal.write_all(told.as_bytes()).unwrap();
        // "xterm 80x25" came before.
        program
            .end
            .send_replace(Some((0, 11 + told.len() as u64, 0)));
        Ok(Empty::default())
    }

    async fn end_shell(&self, _: &TtrpcContext, request: ShellRequest) -> Result<Empty> {
        let ended = self.all.lock().unwrap().remove(&request.shell_id);
        ended.map(|_| Empty::default()).ok_or_else(missing)
    }
}
