#!/usr/bin/env bash
# Checks the models of publication, reclaim and sequence counts under loom, every interleaving of them.
set -euo pipefail
cd "$(dirname "$0")/.."
RUSTFLAGS="--cfg loom ${RUSTFLAGS:-}" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom" \
    exec cargo test --release -p towpath-tables --test loom "$@"
