#!/usr/bin/env bash
# Builds the XDP program and puts it into the folder named by the first argument as towpath-xdp.o. Called by the
# engine's build script, whose own settings for cargo and rustc must not reach this build.
set -euo pipefail

out=${1:?usage: build-bpf.sh OUT_DIR}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
toolchain=$("$root/scripts/bpf-toolchain.sh")
target=${TOWPATH_BPF_TARGET_DIR:-$root/crates/xdp/target}
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
cd "$root/crates/xdp"
CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f'; printf '%s' "${flags[*]}") \
RUSTC=$(setting RUSTC) LD_LIBRARY_PATH=$(setting LD_LIBRARY_PATH) RUSTC_BOOTSTRAP=1 \
    cargo build --quiet --release -Zbuild-std=core --target bpfel-unknown-none --target-dir "$target" >&2
install -D -m 0644 "$target/bpfel-unknown-none/release/towpath-xdp" "$out/towpath-xdp.o"
