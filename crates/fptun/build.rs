//! Builds the tc program, so that a plain `cargo build` gives a library with the program inside.

include!("../../scripts/build_bpf.rs");

fn main() -> ExitCode {
    build_bpf("crates/fptun/bpf", &["crates/wire/Cargo.toml", "crates/wire/src"])
}
