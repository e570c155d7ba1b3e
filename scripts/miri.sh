#!/usr/bin/env bash
# Runs the unit tests of towpath-tables under Miri, if there is a nightly toolchain with miri and rust-src
# ('rustup toolchain install nightly --component miri,rust-src'); otherwise says so and succeeds.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! cargo +nightly miri --version >/dev/null 2>&1 ||
    [ ! -d "$(rustc +nightly --print sysroot)/lib/rustlib/src/rust/library/core" ]; then
    echo "miri: SKIPPED: no nightly toolchain with miri and rust-src"
    exit 0
fi
# Mapped memory and files are Linux's: Miri is to let them through.
MIRIFLAGS="-Zmiri-disable-isolation" exec cargo +nightly miri test -p towpath-tables --lib --target-dir target/miri
