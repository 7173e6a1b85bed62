//! Programs in the guest itself. An agent whose machine was not started for that
//! knows nothing of them.

use husk_protocol::agent::{ResizeShellRequest, RunShellRequest, ShellRequest};
use ttrpc::context::Context;

use super::{Agent, AgentError, ENDING, EXIT_CODE_MOST, QUICK, SLOW, Written, check_size};

impl Agent {
    /// Runs a program beside all containers.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn run_shell(&self, request: &RunShellRequest) -> Result<(), AgentError> {
        check_size("RunShell", request)?;
        let ask = |context| self.shells.run_shell(context, request);
        self.answer("RunShell", SLOW, ask).await?;
        Ok(())
    }

    /// Returns when it has ended, with its exit code and what it had printed.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn wait_shell(&self, id: &str) -> Result<(u8, Written), AgentError> {
        let response = self
            .shells
            .wait_shell(Context::default(), &of(id))
            .await
            .map_err(|error| AgentError::new("WaitShell", error))?;
        let code = response.exit_code.min(EXIT_CODE_MOST);
        let written = Written {
            stdout: response.stdout_bytes,
            stderr: response.stderr_bytes,
        };
        Ok((u8::try_from(code).unwrap_or(u8::MAX), written))
    }

    /// Sets its terminal's size.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn resize_shell(&self, id: &str, width: u16, height: u16) -> Result<(), AgentError> {
        let request = ResizeShellRequest {
            shell_id: id.to_owned(),
            width: width.into(),
            height: height.into(),
            ..ResizeShellRequest::default()
        };
        let ask = |context| self.shells.resize_shell(context, &request);
        self.answer("ResizeShell", QUICK, ask).await?;
        Ok(())
    }

    /// Ends what is left of it.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn end_shell(&self, id: &str) -> Result<(), AgentError> {
        let request = of(id);
        let ask = |context| self.shells.end_shell(context, &request);
        self.answer("EndShell", ENDING, ask).await?;
        Ok(())
    }
}

fn of(id: &str) -> ShellRequest {
    ShellRequest {
        shell_id: id.to_owned(),
        ..ShellRequest::default()
    }
}
