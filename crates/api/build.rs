//! Generates the messages and services of `proto/`: prost for what travels
//! between nodes and for CRIU's RPC, ttrpc for the control interface.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    let proto = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for file in ["control.proto", "session.proto", "criu.proto"] {
        println!("cargo::rerun-if-changed={}", proto.join(file).display());
    }
    prost_build::Config::new()
        .bytes(["."])
        .compile_protos(&[proto.join("session.proto"), proto.join("criu.proto")], &[&proto])?;

    Codegen::new()
        .inputs([proto.join("control.proto")])
        .include(&proto)
        .out_dir(&out)
        .rust_protobuf()
        .customize(Customize { async_all: true, ..Default::default() })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generators write inner attributes, which `include!` cannot carry.
    for file in ["control.rs", "control_ttrpc.rs"] {
        let path = out.join(file);
        let kept: String = fs::read_to_string(&path)?
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .flat_map(|line| [line, "\n"])
            .collect();
        fs::write(path, kept)?;
    }
    Ok(())
}
