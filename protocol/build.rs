//! Generates the message types and the async service from `proto/`.

use std::path::PathBuf;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    println!("cargo:rerun-if-changed=proto");
    Codegen::new()
        .out_dir(&out)
        .include("proto")
        .inputs(["proto/agent.proto", "proto/cgroup2_metrics.proto"])
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // The generator lists the messages alone; the service stands beside them.
    std::fs::write(
        out.join("mod.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\npub mod cgroup2_metrics;\n",
    )?;
    Ok(())
}
