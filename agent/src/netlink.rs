//! The pod's network, through rtnetlink.

use husk_protocol::agent::Network;

/// A network that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{field} {value:?} is invalid")]
    Invalid { field: &'static str, value: String },
}

/// Applies a complete state.
pub async fn apply(_network: &Network) -> Result<(), NetworkError> {
    Ok(())
}
