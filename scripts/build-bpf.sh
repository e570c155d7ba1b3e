#!/usr/bin/env bash
# Builds a crate of BPF programs (crates/xdp unless another is named) and puts the object into the folder named first,
# under the crate's name: towpath-xdp.o. Called by build scripts, whose own settings for cargo and rustc must not reach
# this build.
set -euo pipefail

out=${1:?usage: build-bpf.sh OUT_DIR [CRATE]}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
toolchain=$("$root/scripts/bpf-toolchain.sh")
crate=$root/${2:-crates/xdp}
target=${TOWPATH_BPF_TARGET_DIR:-$crate/target}
object=$(sed -n 's/^name = "\(.*\)"/\1/p' "$crate/Cargo.toml" | head -n 1)
setting() { sed -n "s/^$1=//p" "$toolchain/env"; }

# What the toolchain and the network need stays; what describes the outer build goes.
for name in $(compgen -e); do
    case $name in
        CARGO_HOME | CARGO_HTTP_* | CARGO_NET_* | CARGO_REGISTRIES_* | CARGO_BUILD_JOBS | RUSTUP_HOME) ;;
        CARGO | CARGO_* | RUSTC | RUSTC_* | RUSTFLAGS | RUSTDOC | RUSTDOCFLAGS | RUSTUP_* | DEP_* | TARGET | HOST | PROFILE | OPT_LEVEL | DEBUG)
            unset "$name" ;;
    esac
done

# -Ctarget-cpu=v3: 32-bit arithmetic and jumps (kernel 5.1). Packets are not aligned, and neither x86 nor arm64 minds.
flags=(
    -Ctarget-cpu=v3 -Ctarget-feature=+allows-misaligned-mem-access
    -Clinker="$(setting BPF_LINKER)" -Clink-arg=--btf -Cdebuginfo=2 -Cpanic=abort
)
cd "$crate"
CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f'; printf '%s' "${flags[*]}") \
RUSTC=$(setting RUSTC) LD_LIBRARY_PATH=$(setting LD_LIBRARY_PATH) RUSTC_BOOTSTRAP=1 \
    cargo build --quiet --release -Zbuild-std=core --target bpfel-unknown-none --target-dir "$target" >&2
install -D -m 0644 "$target/bpfel-unknown-none/release/$object" "$out/$object.o"
