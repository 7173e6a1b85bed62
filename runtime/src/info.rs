//! `-info`: what this runtime is and can do.

use std::error::Error;
use std::io::{self, Write};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::json;

use crate::config::Config;
use crate::machine::host_facts;
use crate::template::TemplateKey;

/// Type of OCI's features document.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Prints the `RuntimeInfo` message.
///
/// # Errors
/// Nobody reads it.
pub fn print() -> io::Result<()> {
    let text = info().write_to_bytes().map_err(io::Error::other)?;
    io::stdout().write_all(&text)
}

/// Prints the names of the templates from which pods of this node begin, as it is
/// installed and configured now, one a line; nothing where there are to be none.
///
/// # Errors
/// The configuration is wrong, or nobody reads it.
pub fn print_templates() -> Result<(), Box<dyn Error>> {
    let config = Config::load()?;
    for key in TemplateKey::all_of_node(&config, host_facts()) {
        writeln!(io::stdout(), "{}", key.name())?;
    }
    Ok(())
}

fn info() -> RuntimeInfo {
    RuntimeInfo {
        name: "io.containerd.husk.v2".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES.to_owned(),
            value: features().into_bytes(),
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    }
}

/// OCI's features.md: what clients may ask for. Only what is known to work.
fn features() -> String {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            // Kubernetes wants to know before it gives a pod users of its own.
            "mountExtensions": {"idmap": {"enabled": true}},
            "cgroup": {"v1": false, "v2": true},
            "seccomp": {"enabled": true},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
        },
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_containerd_reads() {
        let info = info();
        assert_eq!(info.name, "io.containerd.husk.v2");
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["linux"]["cgroup"]["v2"], true);
        let mapped = &features["linux"]["mountExtensions"]["idmap"]["enabled"];
        assert_eq!(*mapped, true);
    }
}
