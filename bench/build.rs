//! Builds the benchmarks' own BPF programs.

include!("../scripts/build_bpf.rs");

fn main() -> ExitCode {
    build_bpf("bench/bpf", &[])
}
