//! Generates the messages of `proto/`.

use std::path::PathBuf;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    println!("cargo:rerun-if-changed=proto");
    Codegen::new()
        .out_dir(&out)
        .include("proto")
        .input("proto/pod_config.proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .customize(Customize::default())
        .run()?;
    std::fs::write(out.join("mod.rs"), "pub mod pod_config;\n")?;
    Ok(())
}
