//! Builds the benchmarks' own BPF programs.

use std::path::Path;
use std::process::{Command, exit};

fn main() {
    for path in ["bpf/src", "bpf/Cargo.toml", "bpf/Cargo.lock", "../scripts/build-bpf.sh"] {
        println!("cargo:rerun-if-changed={path}");
    }
    let out = std::env::var("OUT_DIR").unwrap_or_default();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/build-bpf.sh");
    match Command::new(&script).args([&out, "bench/bpf"]).status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("{} ended with {status}; its words are above", script.display())),
        Err(error) => fail(&format!("cannot run {}: {error}", script.display())),
    }
}

fn fail(why: &str) {
    println!("cargo:warning={why}");
    exit(1);
}
