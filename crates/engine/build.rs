//! Builds the XDP program, so that a plain `cargo build` gives a binary with the program inside.

include!("../../scripts/build_bpf.rs");

fn main() -> ExitCode {
    let parts = ["crates/pipeline", "crates/tables", "crates/wire"];
    let sources = parts.map(|part| [format!("{part}/Cargo.toml"), format!("{part}/src")]);
    build_bpf("crates/xdp", &sources.as_flattened().iter().map(String::as_str).collect::<Vec<_>>())
}
