//! Calls to the agent that fail.

use husk_protocol::limit;
use ttrpc::Code;

use super::clean;

/// A call to the agent that failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It answered that it could not.
    #[error("{message}")]
    Refused {
        /// Why, as ttrpc's code.
        code: Code,
        /// Why, in words.
        message: String,
    },
    /// It did not answer in time.
    #[error("the agent did not answer {call} within {seconds} s")]
    Deadline {
        /// What was asked.
        call: &'static str,
        /// How long it had.
        seconds: u64,
    },
    /// What is asked does not go into one message.
    #[error(
        "{call} is {bytes} bytes; at most {} can be sent",
        limit::MESSAGE_BYTES
    )]
    TooLarge {
        /// What was to be asked.
        call: &'static str,
        /// How much it is.
        bytes: u64,
    },
    /// The answer is not what it should be.
    #[error("the agent's answer to {call}")]
    Garbled {
        /// What was asked.
        call: &'static str,
        /// What is wrong.
        #[source]
        source: protobuf::Error,
    },
    /// The connection has ended.
    #[error("the connection to the agent has ended")]
    Gone,
    /// The connection could not be set up.
    #[error("agent's connection")]
    Connect(#[source] std::io::Error),
}

impl AgentError {
    /// What containerd is told.
    pub fn code(&self) -> Code {
        match self {
            Self::Refused { code, .. } => *code,
            Self::Deadline { .. } => Code::DEADLINE_EXCEEDED,
            Self::TooLarge { .. } => Code::INVALID_ARGUMENT,
            Self::Gone => Code::UNAVAILABLE,
            Self::Garbled { .. } | Self::Connect(_) => Code::UNKNOWN,
        }
    }

    pub(super) fn new(what: &'static str, error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self::Refused {
                code: status.code(),
                message: clean(&status.message),
            },
            error => {
                tracing::debug!(what, error = %error, "agent");
                Self::Gone
            }
        }
    }
}
