// Included by build scripts: builds a crate of BPF programs.

use std::path::Path;
use std::process::{Command, ExitCode};

/// Builds the crate in this folder and has cargo build it again when one of `sources` changes; all of them seen from the
/// top of the source tree.
fn build_bpf(folder: &str, sources: &[&str]) -> ExitCode {
    let (Some(here), Some(out)) = (std::env::var_os("CARGO_MANIFEST_DIR"), std::env::var_os("OUT_DIR")) else {
        return fail("CARGO_MANIFEST_DIR and OUT_DIR are not set: this is cargo's build script");
    };
    let root = Path::new(&here).ancestors().find(|folder| folder.join("scripts/build-bpf.sh").exists());
    let Some(root) = root else { return fail("scripts/build-bpf.sh is missing") };
    let own = ["Cargo.toml", "Cargo.lock", "src"].map(|name| format!("{folder}/{name}"));
    let scripts = ["scripts/build-bpf.sh", "scripts/build_bpf.rs", "scripts/bpf-toolchain.sh"];
    for source in own.iter().map(String::as_str).chain(scripts).chain(sources.iter().copied()) {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    println!("cargo::rerun-if-env-changed=TOWPATH_BPF_TOOLCHAIN");
    let script = root.join("scripts/build-bpf.sh");
    match Command::new(&script).arg(&out).arg(folder).output() {
        Ok(output) if output.status.success() => ExitCode::SUCCESS,
        Ok(output) => fail(&format!(
            "the BPF programs in {folder} were not built ({} {}):\n{}",
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
