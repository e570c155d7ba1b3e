//! Builds the XDP program, so that a plain `cargo build` gives a binary with the program inside.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// What the program is made of, from the top of the source tree.
const SOURCES: [&str; 11] = [
    "crates/xdp/Cargo.toml",
    "crates/xdp/Cargo.lock",
    "crates/xdp/src",
    "crates/pipeline/Cargo.toml",
    "crates/pipeline/src",
    "crates/tables/Cargo.toml",
    "crates/tables/src",
    "crates/wire/Cargo.toml",
    "crates/wire/src",
    "scripts/build-bpf.sh",
    "scripts/bpf-toolchain.sh",
];

fn main() -> ExitCode {
    let (Some(here), Some(out)) = (std::env::var_os("CARGO_MANIFEST_DIR"), std::env::var_os("OUT_DIR")) else {
        return fail("CARGO_MANIFEST_DIR and OUT_DIR are not set: this is cargo's build script");
    };
    let root = PathBuf::from(here).join("../..");
    for source in SOURCES {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    println!("cargo::rerun-if-env-changed=TOWPATH_BPF_TOOLCHAIN");
    let script = root.join("scripts/build-bpf.sh");
    match Command::new(&script).arg(&out).output() {
        Ok(output) if output.status.success() => ExitCode::SUCCESS,
        Ok(output) => fail(&format!(
            "the XDP program was not built ({} {}):\n{}",
            script.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )),
        Err(error) => fail(&format!("cannot run {}: {error}", script.display())),
    }
}

/// Every line as an error of cargo's, so that it is shown as it is.
fn fail(message: &str) -> ExitCode {
    for line in message.lines() {
        println!("cargo::error={line}");
    }
    ExitCode::FAILURE
}
